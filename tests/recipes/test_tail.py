"""recipes/tail.py: a log that is written, rotated and removed; servers and readers that go away."""

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from zlib import crc32

import psutil
import pytest
import requests

from recipes import tail
from tests.support.event_sources import Event, EventSource, EventSources, event_sources
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
from tests.support.recipes import start_changed

pytestmark = pytest.mark.xdist_group("tail")  # in one worker, because they share a server
Read = Callable[..., EventSource]


def clear(folder: Path) -> None:
    shutil.rmtree(folder) if folder.is_dir() else folder.unlink(missing_ok=True)


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Process]:
    """One server for all tests. Nobody who waits in it for a line looks by himself."""
    folder = tmp_path_factory.mktemp("tail")
    with starting(folder) as start:
        files = {"LOG": f"{folder}/logs/app.log", "FAULT": f"{folder}/fault"}
        yield start_changed(start, "tests.support.broken_tail:app", tail__KEEP_ALIVE=9999, **files)


@pytest.fixture
def log(shared: Process) -> Path:
    """The log, which does not exist; its directory does, and nothing is in it."""
    log = Path(shared.options["env"]["LOG"])
    clear(log.parent)
    log.parent.mkdir()
    return log


@pytest.fixture
def server(shared: Process, log: Path) -> Iterator[Process]:
    yield shared
    assert "Traceback" not in shared.log
    assert "ERROR" not in shared.log


@pytest.fixture
def sources() -> Iterator[EventSources]:
    with event_sources() as sources:
        yield sources


@pytest.fixture
def read(server: Process, sources: EventSources) -> Read:
    """`read(query, id)` opens a reader. When it returns, it is known where this reader begins."""

    def read(query: str = "?lines=0", last_event_id: str = "") -> EventSource:
        (reader,) = sources.open(server.port, path=f"/log{query}", last_event_id=last_event_id)
        wait_for(lambda: reader.retry, "the stream to begin")
        return reader

    return read


def wait_for_data(reader: EventSource, *data: str) -> None:
    """Wait until the last events have this data."""
    what = f"the lines {str(data)[:200]}"
    wait_for(lambda: [event.data for event in reader.events][-len(data) :] == [*data], what)


def wait_for_lines(reader: EventSource, count: int) -> None:
    wait_for(lambda: len(reader.data) >= count, f"{count} lines")


def rotations(reader: EventSource) -> int:
    return sum(event.name == "rotated" for event in reader.events)


def append(log: Path, text: str | bytes) -> None:
    with log.open("ab") as file:
        file.write(text.encode() if isinstance(text, str) else text)


def id_at(content: bytes, offset: int) -> str:
    """The id as the contract has it."""
    return f"{offset}-{crc32(content[max(offset - 256, 0) : offset]):08x}"


# Where a reader begins ----------------------------------------------------------------------------


def test_the_last_lines_then_each_new_one(log: Path, read: Read) -> None:
    """A line that has not ended yet is none of the last ones."""
    append(log, "".join(f"line {i}\n" for i in range(20_000)) + "sent ")
    readers = {lines: read(f"?lines={lines}") for lines in (0, 3, 1000)} | {10: read("")}
    append(log, "when it ends\n")
    content = log.read_bytes()
    for lines, reader in readers.items():
        wait_for_data(reader, "sent when it ends")
        assert reader.data[:-1] == [f"line {i}" for i in range(20_000 - lines, 20_000)]
        for event in reader.events:
            offset = int(event.id.partition("-")[0])
            assert event.id == id_at(content, offset)
            assert content[:offset].endswith(f"{event.data}\n".encode())


def test_bad_input(server: Process) -> None:
    def status(lines: str, last_event_id: str) -> int:
        url, headers = f"{server.url}/log?lines={lines}", {"Last-Event-ID": last_event_id}
        return requests.get(url, headers=headers, timeout=LIMIT).status_code

    for lines in ("-1", "1001", "", "1e1", "9" * 5000):
        assert status(lines, "") == 422, lines
    for event_id in ("-1", "x", "1", "8-x", "8-ABCDEF01", "+8-00000000", "9" * 20 + "-00000000"):
        assert status("1", event_id) == 422, event_id


def test_an_id_says_where_to_go_on_if_it_is_of_this_file(log: Path, read: Read) -> None:
    content = b"one\ntwo\n"
    append(log, content)
    wait_for_data(read("", id_at(content, 0)), "one", "two")
    after_one, at_the_end = (read("", id_at(content, offset)) for offset in (4, 8))
    # Beyond the end, in the middle of a line, and of a file with the same lines' ends.
    others = ["9-12345678", "9" * 18 + "-00000000", "12-00000000", "5-12345678"]
    for event_id in (*others, id_at(b"eno\ntwo\n", 8)):
        reader = read("", event_id)
        wait_for_data(reader, "one", "two")
        assert [event.name for event in reader.events] == ["rotated", "message", "message"]
        assert reader.events[0].id == id_at(b"", 0)
    append(log, "three\n")
    wait_for_data(at_the_end, "three")
    assert at_the_end.events == [Event(id_at(log.read_bytes(), 14), "three")]
    wait_for_data(after_one, "two", "three")
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
    wait_for_data(reader, *lines.values())


def test_a_line_of_1_mb_and_one_without_end(server: Process, log: Path, read: Read) -> None:
    reader = read()
    mb = 1024 * 1024
    for _ in range(16):  # it is written in pieces, as a log is whose writer has a buffer
        append(log, "x" * (mb // 16 - 1))
    append(log, "\n")
    wait_for_data(reader, "x" * (mb - 16))
    process = psutil.Process(server.pid)
    before = process.memory_info().rss
    line = "yé☕" * 3_000_000  # characters of one, two and three bytes
    append(log, f"{line}\nafter\n")
    wait_for_data(reader, "after")
    assert process.memory_info().rss - before < 10_000_000
    pieces = reader.data[1:-1]
    assert "".join(pieces) == line
    assert max(map(len, pieces)) < 1.1 * mb
    # After a lost connection it goes on in the middle of the line, perhaps in other pieces.
    again = read("", reader.events[-4].id)
    wait_for_data(again, "after")
    assert "".join(again.data[:-1]) == "".join(pieces[-2:])


# Many lines, many readers -------------------------------------------------------------------------


def test_slow_readers_get_all_and_take_neither_memory_nor_files(
    server: Process, log: Path, read: Read, sources: EventSources
) -> None:
    """Each file is open once, for all readers, until the last of them has read it, or has left."""
    process = psutil.Process(server.pid)

    def open_logs() -> list[Path]:
        paths = [Path(file.path) for file in process.open_files()]
        return sorted(path for path in paths if path.parent == log.parent)

    log.touch()
    slow, leaving = read(), read()
    for reader in (slow, leaving):
        sources.pause(reader)
    before, old = process.memory_info().rss, []
    for last in (9_999, 19_999):  # more than what fits on the way to a slow one
        append(log, b"".join(b"%d %s\n" % (i, b"x" * 1000) for i in range(last - 9_999, last + 1)))
        quick = read("?lines=1")  # the others are served
        wait_for_data(quick, f"{last} {'x' * 1000}")
        sources.close([quick])
        old.append(log.rename(log.with_suffix(f".{last}")))
    append(log, "20000 is the last\n")
    wait_for(lambda: open_logs() == sorted([*old, log]), "each file to be open once")
    assert process.memory_info().rss - before < 10_000_000
    sources.close([leaving])
    sources.pause(slow, False)
    wait_for_data(slow, "20000 is the last")
    wait_for(lambda: open_logs() == [log], "the old files to be closed")
    assert [int(line.split()[0]) for line in slow.data] == list(range(20_001))


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
    wait_for_lines(readers[1], 10)
    new = [f"new line {i:02}" for i in range(written + 1)]
    sh(change, log)
    append(log, "".join(f"{line}\n" for line in new[:written]))
    append(log, f"{new[written]}\n")
    for reader in readers:
        wait_for_data(reader, new[-1])
        names = [event.name for event in reader.events if not event.data.startswith("old")]
        assert names[0] == "rotated"
        assert [line for line in reader.data if line.startswith("new")] == new


def test_what_is_written_to_a_renamed_log_comes_first(log: Path, read: Read) -> None:
    append(log, "one\n")
    reader = read("")
    wait_for_data(reader, "one")
    old = log.rename(log.with_suffix(".1"))
    log.touch()
    read()  # the server has seen the new file
    # The writer has the old file still open, until it is told.
    append(old, "two\n")
    os.truncate(old, 3_000_000)  # a hole
    append(old, "no end")
    append(log, "three\n")
    wait_for_data(reader, "three")
    content = old.read_bytes()
    assert [(event.name, event.id) for event in reader.events] == [
        *[("message", id_at(content, offset)) for offset in (4, 8, 3_000_006)],
        ("rotated", id_at(b"", 0)),
        ("message", id_at(b"three\n", 6)),
    ]
    assert reader.data == ["one", "two", "no end", "three"]


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
                wait_for_data(reader, f"{count} half and half", "next")
                assert rotations(reader) == count
        content = log.read_bytes()
        after = [read("?lines=1000"), read("?lines=2"), read("", id_at(content, len(content) - 5))]
        writer.write(b"last\n")
    new = ["2 half and half", "next", "last"]
    for reader, lines in zip(after, (new, new, new[1:]), strict=True):
        wait_for_data(reader, *lines)
        assert (reader.data, rotations(reader)) == (lines, 0)
    wait_for_data(before[0], "last")
    assert before[0].data == ["1 half and half", "next", *new]


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


def test_logrotate(log: Path, read: Read, tmp_path: Path) -> None:
    """A real writer, rotated three times by the real program while it writes."""
    config = tmp_path / "logrotate.conf"
    command = [need("logrotate", "logrotate"), "-f", "-s", str(tmp_path / "state"), str(config)]
    reader = read()
    with writing(log) as pid:
        after = f"postrotate\nkill -HUP {pid}\nendscript"
        config.write_text(f"{log} {{\nrotate 9\ncompress\ncreate\n{after}\n}}\n")
        for count in (1, 2, 3):
            wait_for_lines(reader, 100 * count)
            subprocess.run(command, check=True, timeout=LIMIT)
            wait_for(lambda: rotations(reader) == count, "the rotation to be told")  # noqa: B023
        wait_for_lines(reader, len(reader.data) + 1)
    assert reader.data == [str(number) for number in range(len(reader.data))]


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
    why = UNREADABLE[spoil]
    server.wait_for_log(f"Waiting for LOG: .*({why}.*{log}|{log}.*{why})")
    for line in ("one", "two"):
        clear(log.parent)
        log.parent.mkdir()
        append(log, f"{line}\n")
        for reader in readers:
            wait_for_data(reader, line)
        log.unlink()
        sh(spoil, log)
    for reader in readers:
        assert reader.data == ["one", "two"]


def test_the_watch_survives_every_exception(log: Path, server: Process, read: Read) -> None:
    """Whatever is thrown into what it calls: it is logged in one line, and all goes on."""
    fault = Path(server.options["env"]["FAULT"])
    kinds = ("PermissionError", "RuntimeError", "MemoryError")
    log.touch()
    reader = read()
    for kind in kinds:
        fault.write_text(kind)
        server.wait_for_log(f"{kind}: a fault")
        append(log, f"{kind}\n")
        fault.unlink()
        wait_for_data(reader, kind)
    assert reader.data == [*kinds]


def test_a_read_error_is_waited_for(log: Path, server: Process, read: Read) -> None:
    """And no longer when another file is the log."""
    fault = Path(server.options["env"]["FAULT"]).with_suffix(".read")
    append(log, "one\n")
    early = read("")
    wait_for_data(early, "one")
    fault.touch()
    late = read("")
    fault.unlink()
    append(log, "two\n")
    for reader in (early, late):
        wait_for_data(reader, "one", "two")
    fault.touch()
    log.unlink()
    append(log, "three\n")
    wait_for(lambda: rotations(early), "the new file")
    fault.unlink()
    append(log, "four\n")
    for reader in (early, late):
        wait_for_data(reader, "three", "four")


# Servers and readers that go away -----------------------------------------------------------------


def test_nothing_is_lost_or_repeated_over_a_restart(server: Process, log: Path, read: Read) -> None:
    """A server that is asked to stop ends its streams properly; one that is killed cuts them."""
    reader = read()
    with writing(log):
        for signum in (signal.SIGTERM, signal.SIGKILL):
            wait_for_lines(reader, len(reader.data) + 100)
            server.signal(signum)
            assert server.wait() == -signum
            server.start()
        wait_for_lines(reader, len(reader.data) + 100)
    assert reader.data == [str(number) for number in range(len(reader.data))]
    assert reader.cut == 1


def test_a_reader_hears_in_the_silence_that_the_stream_is_alive(
    start: Start, tmp_path: Path, sources: EventSources
) -> None:
    """Also when something is written all the time, but no line ends (a progress bar)."""
    assert tail.KEEP_ALIVE == 10
    log = tmp_path / "app.log"
    server = start_changed(start, "tail", tail__KEEP_ALIVE=1, LOG=str(log))
    (reader,) = sources.open(server.port, path="/log")

    def is_told() -> bool:
        append(log, "#")
        return reader.comments > 0

    wait_for(is_told, "a comment")
    assert reader.events == []


# The recipe's own log -----------------------------------------------------------------------------


def test_without_a_log_it_writes_its_own(
    start: Start, tmp_path: Path, sources: EventSources
) -> None:
    """In a copy of the project, and with an empty LOG, as a compose file sets it."""
    root = tmp_path / "project"
    shutil.copytree(ROOT / "recipes", root / "recipes", ignore=shutil.ignore_patterns("*.log*"))
    (root / "main.py").symlink_to(ROOT / "main.py")
    log = root / "recipes" / "tail.log"
    command = (sys.executable, "-m", "uvicorn", "recipes.tail:app", "--port", "{port}")
    server = start(*command, env=ENVIRONMENT | {"LOG": ""}, cwd=root)
    (reader,) = sources.open(server.port, path="/log")
    wait_for_lines(reader, 1)
    append(log, "an old line\n" * 200)  # it is time for a new file
    wait_for(lambda: rotations(reader), "a new file")
    wait_for_lines(reader, 203)
    assert log.with_suffix(".log.1").read_text().endswith("an old line\n")
    assert "old" not in log.read_text()
    assert "Waiting for LOG" not in server.log
