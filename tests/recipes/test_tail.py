"""recipes/tail.py: a log that is written, rotated and removed; servers and readers that go away."""

import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple
from zlib import crc32

import psutil
import pytest
import requests

from tests.support.processes import (
    ENVIRONMENT,
    LIMIT,
    ROOT,
    Process,
    Start,
    need,
    starting,
    wait_for,
)
from tests.support.raw_reader import RawReader, read_until
from tests.support.recipes import start_app, start_recipe

ROTATED = "rotated"


class Event(NamedTuple):
    """What a reader makes of it; a comment is an event here, too."""

    type: str
    data: str
    id: str | None


def parse(body: bytes) -> list[Event]:
    """The complete events of a body, and `Event("comment", …)` for the comments."""
    events = []
    complete, _, _ = body.rpartition(b"\n\n")  # the rest may end in the middle of a character
    for frame in complete.decode().split("\n\n"):
        assert "\r" not in frame
        fields = dict(line.split(": ", 1) for line in frame.split("\n"))
        assert len(fields) == frame.count("\n") + 1, frame  # this recipe has no field twice
        if "" in fields:
            events.append(Event("comment", fields[""], None))
        elif "data" in fields:
            events.append(Event(fields.get("event", "message"), fields["data"], fields["id"]))
    return events


class Reader:
    """Reads `/log` in a thread of its own, until it is closed or the server ends the body."""

    def __init__(self, server: Process, query: str = "?lines=0", last_event_id: str = "") -> None:
        self.raw = RawReader(server.port, f"/log{query}", f"Last-Event-ID: {last_event_id}\r\n")
        self.leaving = False
        self.thread = threading.Thread(target=self.read)
        self.thread.start()
        # By then it is known where this reader begins.
        wait_for(lambda: self.raw.body, "the first bytes of the stream")

    def read(self) -> None:
        read_until([self.raw], lambda: self.leaving or self.raw.ended_at, limit=LIMIT * 3)

    @property
    def events(self) -> list[Event]:
        return parse(bytes(self.raw.body))

    @property
    def lines(self) -> list[str]:
        return [event.data for event in self.events if event.type == "message"]

    def wait_for(self, *data: str) -> list[Event]:
        """Wait until the last events have this data; return all events."""
        what = f"the lines {str(data)[:200]}"
        wait_for(lambda: [event.data for event in self.events][-len(data) :] == [*data], what)
        return self.events

    def wait_for_lines(self, count: int) -> None:
        wait_for(lambda: len(self.lines) > count, f"more than {count} lines")

    def close(self) -> None:
        self.leaving = True
        self.thread.join(LIMIT)
        self.raw.close()


def clear(folder: Path) -> None:
    shutil.rmtree(folder) if folder.is_dir() else folder.unlink(missing_ok=True)


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Process]:
    directory = tmp_path_factory.mktemp("tail")
    with starting(directory) as start:
        log = directory / "logs" / "app.log"
        yield start_recipe(start, "recipes.tail", directory, LOG=str(log))


@pytest.fixture
def log(shared: Process) -> Path:
    """The log, which does not exist; its directory does, and nothing is in it."""
    log = Path(shared.options["env"]["LOG"])
    clear(log.parent)
    log.parent.mkdir()
    return log


@pytest.fixture
def server(shared: Process, log: Path) -> Process:
    """One server for all tests here. One that was stopped is started again."""
    if shared.popen.poll() is not None:
        shared.start()
    return shared


@pytest.fixture
def read(server: Process) -> Iterator[Callable[..., Reader]]:
    readers = []

    def read(query: str = "?lines=0", last_event_id: str = "") -> Reader:
        readers.append(Reader(server, query, last_event_id))
        return readers[-1]

    yield read
    for reader in readers:
        reader.close()


Read = Callable[..., Reader]


def append(log: Path, text: str | bytes) -> None:
    with log.open("ab") as file:
        file.write(text.encode() if isinstance(text, str) else text)


def numbered(first: int, stop: int) -> str:
    return "".join(f"line {i}\n" for i in range(first, stop))


def id_at(content: bytes, offset: int) -> str:
    """The id as the contract has it."""
    return f"{offset}-{crc32(content[max(offset - 256, 0) : offset]):08x}"


# Where a reader begins ----------------------------------------------------------------------------


def test_the_last_lines_then_each_new_one(log: Path, read: Read) -> None:
    """A line that has not ended yet is none of the last ones."""
    append(log, numbered(0, 20_000) + "sent ")
    readers = {lines: read(f"?lines={lines}") for lines in (0, 3, 1000)} | {10: read("")}
    append(log, "when it ends\n")
    content = log.read_bytes()
    for lines, reader in readers.items():
        for event in reader.wait_for("sent when it ends"):
            offset = int(str(event.id).partition("-")[0])
            assert event.id == id_at(content, offset)
            assert content[:offset].endswith(f"{event.data}\n".encode())
        assert reader.lines[:-1] == [f"line {i}" for i in range(20_000 - lines, 20_000)]
    append(log.with_name("new"), "one\ntwo\nthr")
    log.with_name("new").rename(log)  # with fewer lines than somebody asks for
    wait_for(lambda: readers[0].lines[-1] == "two", "the new file")
    read("?lines=1000").wait_for("one", "two")


def test_bad_input(server: Process, log: Path) -> None:
    append(log, "one\ntwo\n")

    def status(query: str, last_event_id: str) -> int:
        headers = {"Last-Event-ID": last_event_id}
        url = f"{server.url}/log{query}"
        with requests.get(url, headers=headers, stream=True, timeout=LIMIT) as response:
            return response.status_code

    for lines in ("-1", "1001", "", "1e1", "9" * 5000):
        assert status(f"?lines={lines}", "") == 422, lines
    for event_id in ("-1", "x", "1", "8-x", "8-ABCDEF01", "+8-00000000", "9" * 20 + "-00000000"):
        assert status("", event_id) == 422, event_id


def test_an_id_says_where_to_go_on_if_it_is_of_this_file(log: Path, read: Read) -> None:
    content = b"one\ntwo\n"
    append(log, content)
    read("", id_at(content, 0)).wait_for("one", "two")
    after_one, at_the_end = (read("", id_at(content, offset)) for offset in (4, 8))
    # Beyond the end, in the middle of a line, and of a file with the same lines' ends.
    others = ["9-12345678", "9" * 18 + "-00000000", "12-00000000", "5-12345678"]
    for event_id in (*others, id_at(b"eno\ntwo\n", 8)):
        events = read("", event_id).wait_for("one", "two")
        assert [event.type for event in events] == [ROTATED, "message", "message"], event_id
        assert events[0].id == id_at(b"", 0)
    append(log, "three\n")
    assert at_the_end.wait_for("three") == [Event("message", "three", id_at(log.read_bytes(), 14))]
    after_one.wait_for("two", "three")
    assert len(after_one.events) == 2


# What a line may hold -----------------------------------------------------------------------------


def test_every_byte_reaches_the_reader(log: Path, read: Read) -> None:
    lines = {
        b"": "",
        b"  spaces  ": "  spaces  ",
        "Zoë ☕ 山 \u2028 \ufeff".encode(): "Zoë ☕ 山 \u2028 \ufeff",
        b"data: x": "data: x",
        b"not \xff UTF-8 \xe2\x98": r"not \xff UTF-8 \xe2\x98",
        b"surrogate \xed\xa0\x80": r"surrogate \xed\xa0\x80",
        b"50%\r100%": r"50%\x0d100%",
        b"Windows\r": "Windows",
        b"\x1b[31mred\x7f\0.": "\x1b[31mred\x7f\0.",
    }
    reader = read()
    append(log, b"".join(line + b"\n" for line in lines))
    reader.wait_for(*lines.values())


def test_a_line_of_1_mb_and_one_without_end(server: Process, log: Path, read: Read) -> None:
    reader = read()
    mb = 1024 * 1024
    for _ in range(16):  # it is written in pieces, as a log is whose writer has a buffer
        append(log, "x" * (mb // 16 - 1))
    append(log, "\n")
    reader.wait_for("x" * (mb - 16))
    process = psutil.Process(server.pid)
    before = process.memory_info().rss
    line = "yé☕" * 3_000_000  # characters of one, two and three bytes
    append(log, f"{line}\nafter\n")
    reader.wait_for("after")
    assert process.memory_info().rss - before < 10_000_000
    pieces = reader.lines[1:-1]
    assert "".join(pieces) == line
    assert max(map(len, pieces)) < 1.1 * mb
    # After a lost connection it goes on in the middle of the line, perhaps in other pieces.
    again = read("", [str(event.id) for event in reader.events if event.id][-4])
    again.wait_for("after")
    assert "".join(again.lines[:-1]) == "".join(pieces[-2:])


# Many lines, many readers -------------------------------------------------------------------------


def test_slow_readers_get_all_and_take_neither_memory_nor_files(server: Process, log: Path) -> None:
    """Each file is open once, for all readers, until the last of them has read it, or has left."""
    process = psutil.Process(server.pid)

    def open_logs() -> list[Path]:
        paths = [Path(file.path) for file in process.open_files()]
        return sorted(path for path in paths if path.parent == log.parent)

    log.touch()
    slow, leaving = (RawReader(server.port, "/log?lines=0", receive_buffer=4096) for _ in range(2))
    assert read_until([slow, leaving], lambda: slow.body and leaving.body)
    before, old = process.memory_info().rss, []
    for last in (9_999, 19_999):  # more than what fits on the way to a slow one
        append(log, b"".join(b"%d %s\n" % (i, b"x" * 1000) for i in range(last - 9_999, last + 1)))
        quick = Reader(server, "?lines=1")  # the others are served
        quick.wait_for(f"{last} {'x' * 1000}")
        quick.close()
        old.append(log.rename(log.with_suffix(f".{last}")))
    append(log, "20000 is the last\n")
    wait_for(lambda: open_logs() == sorted([*old, log]), "each file to be open once")
    assert process.memory_info().rss - before < 10_000_000
    leaving.reset()
    assert read_until([slow], lambda: slow.body.endswith(b"data: 20000 is the last\n\n"))
    wait_for(lambda: open_logs() == [log], "the old files to be closed")
    slow.close()
    events = parse(bytes(slow.body))
    numbers = [int(event.data.split()[0]) for event in events if event.type == "message"]
    assert numbers == list(range(20_001))
    assert "Traceback" not in server.log


# Rotation -----------------------------------------------------------------------------------------


# A new line is written after each of these.
CHANGES = [
    "truncate -s 0 $LOG",
    "echo first > $LOG",  # truncated, and something written at once
    "rm $LOG",
    "mv $LOG $LOG.1",
    "mv $LOG $LOG.1; echo between > $LOG; mv $LOG $LOG.2",
    "touch $LOG.other; ln -s $LOG.other $LOG.new; mv -T $LOG.new $LOG",
    "cp $LOG $LOG.copy; echo first > $LOG.copy; mv $LOG.copy $LOG",
    "mv $LOG_DIR $LOG_DIR.old; mkdir $LOG_DIR; rm -r $LOG_DIR.old",
]


def sh(command: str, log: Path) -> None:
    environment = {"LOG": str(log), "LOG_DIR": str(log.parent)}
    subprocess.run(["sh", "-c", command], env=ENVIRONMENT | environment, check=True)


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("written", [0, 49, 70])
def test_a_change_is_noticed_whatever_was_read_before(
    log: Path, read: Read, change: str, written: int
) -> None:
    """All new lines are as long as the old ones; of 50 old ones, fewer, as many or more are new."""
    append(log, "".join(f"old line {i:02}\n" for i in range(50)))
    content = log.read_bytes()
    readers = [read("?lines=0"), read("?lines=10"), read("", id_at(content, len(content)))]
    readers[1].wait_for_lines(9)
    new = [f"new line {i:02}" for i in range(written + 1)]
    sh(change, log)
    append(log, "".join(f"{line}\n" for line in new[:written]))
    append(log, f"{new[written]}\n")
    for reader in readers:
        events = reader.wait_for(new[-1])
        types = [event.type for event in events if not event.data.startswith("old")]
        assert types[0] == ROTATED
        assert [line for line in reader.lines if line.startswith("new")] == new


def test_what_is_written_to_a_renamed_log_comes_first(log: Path, read: Read) -> None:
    append(log, "one\n")
    reader = read("")
    reader.wait_for("one")
    old = log.rename(log.with_suffix(".1"))
    log.touch()
    read()  # the server has seen the new file
    # The writer has the old file still open, until it is told.
    append(old, "two\n")
    os.truncate(old, 3_000_000)  # a hole
    append(old, "no end")
    append(log, "three\n")
    events = reader.wait_for("three")
    content = old.read_bytes()
    assert [(event.type, event.id) for event in events] == [
        *[("message", id_at(content, offset)) for offset in (4, 8, 3_000_006)],
        (ROTATED, id_at(b"", 0)),
        ("message", id_at(b"three\n", 6)),
    ]
    assert reader.lines == ["one", "two", "no end", "three"]


@pytest.mark.parametrize("size", [100, 5_000, 2**20 - 1, 3_000_000])
def test_a_hole_is_left_out(log: Path, read: Read, size: int) -> None:
    """As a writer without O_APPEND leaves it (`program > app.log`) when its log is truncated."""
    with log.open("wb", buffering=0) as writer:
        writer.write(b"x" * (size - 1) + b"\n")
        before = [read("?lines=0"), read("?lines=1")]
        for count in (1, 2):
            os.truncate(log, 0)
            writer.write(b"%d half " % count)
            writer.write(b"and half\nnext\n")
            for reader in before:
                reader.wait_for(f"{count} half and half", "next")
                assert sum(event.type == ROTATED for event in reader.events) == count
                assert b"\0" not in reader.raw.body
        after = [
            read("?lines=1000"),
            read("?lines=2"),
            read("", id_at(log.read_bytes(), log.stat().st_size - 5)),
        ]
        writer.write(b"last\n")
    for reader in after:
        events = reader.wait_for("last")
        assert b"\0" not in reader.raw.body
        assert not any(event.type == ROTATED for event in events[:2])
    assert after[0].lines == after[1].lines == ["2 half and half", "next", "last"]


@pytest.mark.parametrize("how", ["create", "copytruncate"])
def test_logrotate(log: Path, read: Read, tmp_path: Path, how: str) -> None:
    """A real writer, rotated three times by the real program while it writes."""
    config = tmp_path / "logrotate.conf"
    command = [need("logrotate", "logrotate"), "-f", "-s", str(tmp_path / "state"), str(config)]
    with writing(log) as pid:
        after = f"postrotate\nkill -HUP {pid}\nendscript" if how == "create" else ""
        config.write_text(f"{log} {{\nrotate 9\ncompress\n{how}\n{after}\n}}\n")
        wait_for(log.exists, "the log")
        reader = read("?lines=1000")
        for count in range(1, 4):
            reader.wait_for_lines(100 * count)
            subprocess.run(command, check=True, timeout=LIMIT)
            wait_for(
                lambda: [event.type for event in reader.events].count(ROTATED) == count,  # noqa: B023
                "the rotation to be told",
            )
        reader.wait_for_lines(len(reader.lines) + 1)
    numbers = [int(line) for line in reader.lines]
    if how == "create":
        assert numbers == list(range(len(numbers)))
    else:
        # Lines that nobody had read yet when the file was truncated are in the copy alone.
        assert numbers == sorted(set(numbers))


WRITER = """
import itertools, signal, sys, time
def open_log(*_):
    global log
    log = open(sys.argv[1], "a", buffering=1)
open_log()
signal.signal(signal.SIGHUP, open_log)
for number in itertools.count():
    print(number, file=log)
    time.sleep(0.001)
"""


@contextmanager
def writing(log: Path) -> Iterator[int]:
    """Write the numbers from 0, a thousand a second; give the writer's process id."""
    writer = subprocess.Popen([sys.executable, "-c", WRITER, log])
    try:
        yield writer.pid
    finally:
        writer.kill()
        writer.wait()


# A log that cannot be read now --------------------------------------------------------------------


UNREADABLE = {
    "rm -r $LOG_DIR": "No such file",
    "rm -r $LOG_DIR; touch $LOG_DIR": "Not a directory",
    "mkdir $LOG": "is not a file",
    "mkfifo $LOG": "is not a file",
    "ln -s $LOG $LOG": "Too many levels of symbolic links",
    "ln -s nothing $LOG": "No such file",
}


@pytest.mark.parametrize("spoil", UNREADABLE)
def test_it_is_waited_for(log: Path, server: Process, read: Read, spoil: str) -> None:
    sh(spoil, log)
    readers = [read(""), read("?lines=0")]
    server.wait_for_log(
        f"Waiting for LOG: .*({UNREADABLE[spoil]}.*{log}|{log}.*{UNREADABLE[spoil]})"
    )
    for line in ("one", "two"):
        clear(log.parent)
        log.parent.mkdir()
        append(log, f"{line}\n")
        for reader in readers:
            reader.wait_for(line)
        log.unlink()
        sh(spoil, log)
    for reader in readers:
        assert reader.lines == ["one", "two"]
    assert "Traceback" not in server.log


def test_the_watch_survives_every_exception(start: Start, tmp_path: Path) -> None:
    """Whatever is thrown into what it calls: it is logged in one line, and all goes on."""
    log, fault = tmp_path / "app.log", tmp_path / "fault"
    app = "tests.support.broken_tail:app"
    server = start_app(start, app, LOG=str(log), FAULT=str(fault))
    append(log, "one\n")
    reader = Reader(server, "")
    try:
        reader.wait_for("one")
        for kind in ("PermissionError", "RuntimeError", "MemoryError"):
            fault.write_text(kind)
            wait_for(lambda: f"{kind}" in server.log, "the fault in the log")  # noqa: B023
            append(log, f"{kind}\n")
            fault.unlink()
            reader.wait_for(kind)
        assert reader.lines == ["one", "PermissionError", "RuntimeError", "MemoryError"]
        assert "Traceback" not in server.log
    finally:
        reader.close()


# Servers and readers that go away -----------------------------------------------------------------


def test_nothing_is_lost_or_repeated_over_kill_9(server: Process, log: Path) -> None:
    events: list[Event] = []
    with writing(log):
        for _ in range(3):
            reader = Reader(server, "?lines=1000", (events[-1].id or "") if events else "")
            reader.wait_for_lines(100)
            server.kill()
            wait_for(lambda: reader.raw.ended_at, "the end of the stream")  # noqa: B023
            reader.close()
            events += reader.events
            server.start()
    assert [event.data for event in events] == [str(number) for number in range(len(events))]


def test_a_reader_hears_in_the_silence_that_the_stream_is_alive(log: Path, read: Read) -> None:
    """Also when something is written all the time, but no line ends (a progress bar)."""
    reader = read()
    done = threading.Event()

    def write() -> None:
        while not done.wait(1):
            append(log, "#")

    thread = threading.Thread(target=write)
    thread.start()
    try:
        assert reader.wait_for("keep-alive") == [Event("comment", "keep-alive", None)]
    finally:
        done.set()
        thread.join()


def test_the_server_is_asked_to_stop(server: Process, log: Path, read: Read) -> None:
    append(log, "one\n")
    readers = [read("?lines=1") for _ in range(5)]
    for reader in readers:
        reader.wait_for("one")
    server.signal(signal.SIGTERM)
    assert server.wait() == -signal.SIGTERM
    for reader in readers:
        wait_for(lambda: reader.raw.ended_properly, "the end of the stream")  # noqa: B023
    assert "Traceback" not in server.log
    assert "ERROR" not in server.log


# The recipe's own log -----------------------------------------------------------------------------


@pytest.mark.parametrize("old", ["", "an old line\n" * 200], ids=["missing", "there"])
def test_without_a_log_it_writes_its_own(start: Start, tmp_path: Path, old: str) -> None:
    """In a copy of the project, and with an empty LOG, as a compose file sets it."""
    root = tmp_path / "project"
    shutil.copytree(ROOT / "recipes", root / "recipes", ignore=shutil.ignore_patterns("*.log*"))
    for name in ("main.py", "page"):
        (root / name).symlink_to(ROOT / name)
    log = root / "recipes" / "tail.log"
    if old:
        log.write_text(old)
    command = (sys.executable, "-m", "uvicorn", "recipes.tail:app", "--port", "{port}")
    server = start(*command, env=ENVIRONMENT | {"LOG": ""}, cwd=root)
    reader = Reader(server, "?lines=0")
    try:
        reader.wait_for_lines(2)
    finally:
        reader.close()
    if old:
        assert log.with_suffix(".log.1").read_text().startswith("an old line\n")
    assert "old" not in log.read_text()
    assert "Waiting for LOG" not in server.log
    assert [event.type for event in reader.events][-2:] == ["message", "message"]
