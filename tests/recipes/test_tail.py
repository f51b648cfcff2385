"""recipes/tail.py: a log that is written, rotated and removed; servers and readers that go away."""

import os
import re
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import psutil
import pytest
import requests

from tests.support.processes import LIMIT, Process, need, starting, wait_for
from tests.support.raw_reader import RawReader, read_until
from tests.support.recipes import start_recipe

ROTATED = "rotated"


class Event(NamedTuple):
    """What an `EventSource` would make of it, but for an event without data, which it drops."""

    type: str
    data: str
    id: int | None


def parse(body: bytes) -> list[Event]:
    """The whole events of a body, and `Event("comment", …)` for the comments.

    A line ends with CRLF, LF or CR, as the standard has it.
    https://html.spec.whatwg.org/multipage/server-sent-events.html#parsing-an-event-stream
    """
    events = []
    fields: dict[str, str] = {}
    *lines, _ = re.split("\r\n|\n|\r", body.decode())
    for line in lines:
        name, _, value = line.partition(":")
        value = value.removeprefix(" ")
        if line and not name:
            events.append(Event("comment", value, None))
        elif line:
            assert name not in fields, line  # this recipe has no field twice
            fields[name] = value
        elif "data" in fields:
            event_id = int(fields["id"]) if "id" in fields else None
            events.append(Event(fields.get("event", "message"), fields["data"], event_id))
            fields = {}
        else:
            fields = {}
    assert not fields
    return events


class Reader:
    """Reads `/log` in a thread of its own, until it is closed or the server ends the body."""

    def __init__(self, server: Process, query: str = "?lines=0", last_event_id: int | None = None):
        headers = f"Last-Event-ID: {last_event_id}\r\n" if last_event_id is not None else ""
        self.raw = RawReader(server.port, f"/log{query}", headers)
        self.leaving = False
        self.thread = threading.Thread(target=self.read)
        self.thread.start()
        # By then it is known where this reader begins.
        wait_for(lambda: self.raw.body, "the first bytes of the stream")

    def read(self) -> None:
        read_until([self.raw], lambda: self.leaving or self.raw.ended_at, limit=LIMIT * 3)

    @property
    def events(self) -> list[Event]:
        body = bytes(self.raw.body)
        return parse(body[: body.rfind(b"\n\n") + 2])

    @property
    def lines(self) -> list[str]:
        return [event.data for event in self.events if event.type == "message"]

    def wait_for(self, *data: str) -> list[Event]:
        """Wait until the last events have this data; return all events."""
        wait_for(lambda: [event.data for event in self.events][-len(data) :] == [*data], str(data))
        return self.events

    def wait_for_rotations(self, count: int) -> None:
        wait_for(
            lambda: sum(event.type == ROTATED for event in self.events) == count,
            f"{count} rotations to be told",
        )

    def wait_for_lines(self, count: int) -> None:
        wait_for(lambda: len(self.lines) > count, f"more than {count} lines")

    def wait_for_end(self) -> None:
        wait_for(lambda: self.raw.ended_at, "the end of the stream")

    def close(self) -> None:
        self.leaving = True
        self.thread.join(LIMIT)
        self.raw.close()


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
    shutil.rmtree(log.parent, ignore_errors=True)
    log.parent.mkdir()
    return log


@pytest.fixture
def server(shared: Process, log: Path) -> Process:
    """One server for all tests here: those that stop it leave the next one a new one."""
    if shared.popen.poll() is not None:
        shared.start()
    return shared


@pytest.fixture
def read(server: Process) -> Iterator[Callable[..., Reader]]:
    readers = []

    def read(query: str = "?lines=0", last_event_id: int | None = None) -> Reader:
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


# Where a reader begins ----------------------------------------------------------------------------


def test_the_last_lines_then_each_new_one(log: Path, read: Read) -> None:
    append(log, numbered(0, 2000))
    readers = {lines: read(f"?lines={lines}") for lines in (0, 3, 1000)} | {10: read("")}
    append(log, "whole ")
    append(log, "only when it ends\n")
    for lines, reader in readers.items():
        events = reader.wait_for("whole only when it ends")
        assert reader.lines[:-1] == [f"line {i}" for i in range(2000 - lines, 2000)]
        # What is before its id in the file is all up to the event.
        content = log.read_text()
        assert all(content[: event.id].endswith(f"{event.data}\n") for event in events)


def test_a_line_that_is_not_whole_yet_is_no_last_line(log: Path, read: Read) -> None:
    append(log, "one\ntwo\nthr")
    all_there_are, last = read("?lines=1000"), read("?lines=1")
    none = read()
    append(log, "ee\n")
    assert [event.id for event in all_there_are.wait_for("one", "two", "three")] == [4, 8, 14]
    last.wait_for("two", "three")
    assert none.wait_for("three") == [Event("message", "three", 14)]


def test_bad_input(server: Process, log: Path) -> None:
    append(log, "one\ntwo\n")

    def status(query: str = "", **headers: str) -> int:
        with requests.get(
            f"{server.url}/log{query}", headers=headers, stream=True, timeout=LIMIT
        ) as response:
            return response.status_code

    for lines in ("-1", "1001", "", "1e1", "ten", "9" * 5000):
        assert status(f"?lines={lines}") == 422, lines
    for event_id in ("-1", "x", "", "1.0", "+1", "1_0", "9" * 5000):
        assert status(**{"Last-Event-ID": event_id}) == 422, event_id


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
        b"\0\x1b[31mred\x7f": "\0\x1b[31mred\x7f",
    }
    reader = read()
    append(log, b"".join(line + b"\n" for line in lines))
    reader.wait_for(*lines.values())


def test_a_line_of_1_mb_and_one_that_is_too_long(log: Path, read: Read) -> None:
    mb = 1024 * 1024
    reader = read()
    for _ in range(16):  # it is written in pieces, as a log is whose writer has a buffer
        append(log, "x" * (mb // 16))
    append(log, "\n" + "y" * (2 * mb) + "\nz\n")
    events = reader.wait_for("x" * mb, "y" * mb + f" [and {mb} bytes more]", "z")
    assert [event.id for event in events] == [mb + 1, 3 * mb + 2, 3 * mb + 4]


def test_a_line_without_end_takes_no_memory(server: Process, log: Path, read: Read) -> None:
    reader = read()
    append(log, "before\n")
    reader.wait_for("before")
    process = psutil.Process(server.pid)
    before = process.memory_info().rss
    for _ in range(100):
        append(log, b"x" * 1_000_000)
    append(log, "\nafter\n")
    reader.wait_for("after")
    assert reader.lines[1].endswith(" [and 98951424 bytes more]")
    assert process.memory_info().rss - before < 20_000_000


# Many lines, many readers -------------------------------------------------------------------------


def test_a_burst_of_100_000_lines(log: Path, read: Read) -> None:
    reader = read()
    append(log, numbered(0, 100_000))
    end = log.stat().st_size
    wait_for(lambda: reader.raw.body.endswith(b"id: %d\ndata: line 99999\n\n" % end), "the burst")
    assert reader.lines == [f"line {i}" for i in range(100_000)]
    content = log.read_bytes()
    assert all(content[event.id - 1] == ord("\n") for event in reader.events if event.id)


def test_more_readers_than_threads(server: Process, log: Path) -> None:
    readers = [RawReader(server.port, "/log?lines=0") for _ in range(100)]
    assert read_until(readers, lambda: all(reader.body for reader in readers))
    append(log, "for all\n")
    assert read_until(readers, lambda: all(b"for all" in reader.body for reader in readers))
    for reader in readers:
        reader.close()


def test_a_slow_reader_gets_all_and_takes_no_memory(server: Process, log: Path) -> None:
    slow = RawReader(server.port, "/log?lines=0", receive_buffer=4096)
    assert read_until([slow], lambda: slow.body)
    process = psutil.Process(server.pid)
    before = process.memory_info().rss
    line = b"x" * 1000
    append(log, b"".join(b"%d %s\n" % (i, line) for i in range(20_000)))
    quick = RawReader(server.port, "/log?lines=1")
    # While the slow one does not read at all, the others are served.
    assert read_until([quick], lambda: b"data: 19999 " in quick.body)
    quick.close()
    assert process.memory_info().rss - before < 10_000_000
    assert read_until(
        [slow], lambda: b"data: 19999 " in slow.body[-2000:] and slow.body.endswith(b"\n\n")
    )
    slow.close()
    numbers = [int(event.data.split()[0]) for event in parse(bytes(slow.body))]
    assert numbers == list(range(20_000))


def test_a_reader_that_leaves_gives_back_its_file(server: Process, log: Path) -> None:
    append(log, b"x" * 1000 + b"\n")
    log.write_bytes(log.read_bytes() * 20_000)
    process = psutil.Process(server.pid)

    def is_open() -> bool:
        return any(file.path == str(log) for file in process.open_files())

    sleeping = RawReader(server.port, "/log?lines=1")
    assert read_until([sleeping], lambda: b"data" in sleeping.body)
    blocked = RawReader(server.port, "/log?lines=1", "Last-Event-ID: 0\r\n", receive_buffer=4096)
    assert read_until([blocked], lambda: b"data" in blocked.body)
    wait_for(is_open, "the file to be open")
    sleeping.close()
    blocked.reset()
    wait_for(lambda: not is_open(), "the file to be closed")
    append(log, "and nothing is amiss\n")
    assert "Traceback" not in server.log


# Rotation -----------------------------------------------------------------------------------------


def test_replaced_as_logrotate_does_with_create(log: Path, read: Read) -> None:
    append(log, "one\n")
    reader = read("")
    reader.wait_for("one")
    log.rename(log.with_suffix(".1"))
    log.touch()
    # The writer has the old file still open, until it is told.
    append(log.with_suffix(".1"), "two\nno end")
    reader.wait_for("two")
    append(log, "three\n")
    events = reader.wait_for("three")
    assert [(event.type, event.id) for event in events] == [
        ("message", 4),
        ("message", 8),
        ("message", 14),  # what is left of a line whose end will not come
        (ROTATED, 0),
        ("message", 6),
    ]
    assert reader.lines == ["one", "two", "no end", "three"]


def test_truncated_as_logrotate_does_with_copytruncate(log: Path, read: Read) -> None:
    append(log, "one\ntwo\n")
    reader = read("?lines=1")
    reader.wait_for("two")
    os.truncate(log, 0)
    reader.wait_for_rotations(1)
    append(log, "three\n")
    assert reader.wait_for("three")[1:] == [
        Event(ROTATED, "The log was truncated or replaced. Here is its start.", 0),
        Event("message", "three", 6),
    ]


def test_truncated_and_grown_again_before_it_is_seen(log: Path, read: Read) -> None:
    append(log, "one\ntwo\n")
    reader = read("")
    reader.wait_for("one", "two")
    log.write_text("1\n2\n3\nfour\nfive\n")
    reader.wait_for("1", "2", "3", "four", "five")
    assert [event.type for event in reader.events][2] == ROTATED


def test_removed_and_written_again(log: Path, read: Read) -> None:
    append(log, "one\n")
    reader = read("")
    reader.wait_for("one")
    log.unlink()
    append(log, "two\n")
    assert reader.wait_for("two")[1].type == ROTATED


def test_a_symlink_is_switched(log: Path, read: Read) -> None:
    first, second = log.parent.parent / "first", log.parent.parent / "second"
    for directory in (first, second):
        directory.mkdir()
        append(directory / "app.log", f"{directory.name}\n")
    log.symlink_to(first / "app.log")
    reader = read("")
    append(first / "app.log", "one\n")  # in a directory that is not the link's
    reader.wait_for("first", "one")
    log.with_suffix(".new").symlink_to(second / "app.log")
    log.with_suffix(".new").rename(log)
    reader.wait_for("second")
    append(second / "app.log", "two\n")
    reader.wait_for("second", "two")


def test_a_log_that_is_not_there_yet_nor_its_directory(log: Path, read: Read) -> None:
    log.parent.rmdir()
    reader = read("")
    log.parent.mkdir()
    append(log, "one\n")
    assert reader.wait_for("one") == [Event("message", "one", 4)]
    # And once more: the directory goes away, with all that is in it.
    shutil.rmtree(log.parent)
    log.parent.mkdir()
    append(log, "two\n")
    reader.wait_for("two")
    append(log, "three\n")
    reader.wait_for("two", "three")


def test_a_name_that_is_no_utf_8_next_to_the_log(log: Path, read: Read) -> None:
    reader = read()
    Path(os.fsdecode(os.fsencode(log.parent) + b"/\xff")).touch()
    lines = [f"line {i}" for i in range(6)]
    for line in lines:
        append(log, f"{line}\n")
        reader.wait_for(line)
    # Without a watch each line would be seen only after a silence of 10 seconds.
    assert sum(event.type == "comment" for event in reader.events) < len(lines) - 1


@pytest.mark.parametrize("how", ["create", "copytruncate"])
def test_logrotate(log: Path, read: Read, tmp_path: Path, how: str) -> None:
    """A real writer, rotated three times by the real program while it writes."""
    writer = subprocess.Popen([sys.executable, "-c", WRITER, log])
    config = tmp_path / "logrotate.conf"
    after = f"postrotate\nkill -HUP {writer.pid}\nendscript" if how == "create" else ""
    config.write_text(f"{log} {{\nrotate 9\n{how}\n{after}\n}}\n")
    command = [need("logrotate", "logrotate"), "-f", "-s", str(tmp_path / "state"), str(config)]
    try:
        wait_for(log.exists, "the log")
        reader = read("?lines=1000")
        for count in range(1, 4):
            reader.wait_for_lines(100 * count)
            subprocess.run(command, check=True, timeout=LIMIT)
            reader.wait_for_rotations(count)
        reader.wait_for_lines(len(reader.lines) + 1)
    finally:
        writer.kill()
        writer.wait()
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


# Coming back --------------------------------------------------------------------------------------


def test_an_id_that_is_not_of_this_file(log: Path, read: Read) -> None:
    append(log, "one\ntwo\n")
    # Beyond the end, beyond 64 bits, and where no line ends.
    for event_id in (9, 10**20, 5):
        reader = read("", event_id)
        reader.wait_for("one", "two")
        assert [event.type for event in reader.events] == [ROTATED, "message", "message"]
    # The whole file, from before its first byte; and nothing, from its end.
    read("", 0).wait_for("one", "two")
    at_the_end = read("", 8)
    append(log, "three\n")
    assert at_the_end.wait_for("three") == [Event("message", "three", 14)]


def test_nothing_is_lost_or_doubled_over_kill_9(server: Process, log: Path) -> None:
    writer = subprocess.Popen([sys.executable, "-c", WRITER, log])
    events: list[Event] = []
    try:
        for _ in range(3):
            last = events[-1].id if events else 0
            reader = Reader(server, "", last)
            reader.wait_for_lines(100)
            server.kill()
            reader.wait_for_end()
            reader.close()
            events += reader.events
            server.start()
    finally:
        writer.kill()
        writer.wait()
    assert [event.data for event in events] == [str(number) for number in range(len(events))]


# When things end ----------------------------------------------------------------------------------


def test_a_reader_hears_in_the_silence_that_the_stream_is_alive(read: Read) -> None:
    assert read().wait_for("keep-alive") == [Event("comment", "keep-alive", None)]


def test_what_inotify_does_not_tell_is_seen_all_the_same(log: Path, read: Read) -> None:
    reader = read()
    append(log, "one\n")
    reader.wait_for("one")
    other_name = log.parent.parent / "other"  # in a directory that nobody watches
    other_name.unlink(missing_ok=True)
    other_name.hardlink_to(log)
    append(other_name, "two\n")
    wait_for(lambda: reader.lines == ["one", "two"], "the second line")


def test_the_server_is_asked_to_stop(server: Process, log: Path, read: Read) -> None:
    append(log, "one\n")
    readers = [read("?lines=1") for _ in range(5)]
    for reader in readers:
        reader.wait_for("one")
    server.signal(signal.SIGTERM)
    assert server.wait() == -signal.SIGTERM
    for reader in readers:
        reader.wait_for_end()
        assert reader.raw.ended_properly
    assert "Traceback" not in server.log
    assert "ERROR" not in server.log


@pytest.mark.parametrize(
    ("make", "why"), [(Path.mkdir, "Is a directory"), (os.mkfifo, "Illegal seek")]
)
def test_a_log_that_cannot_be_read(
    log: Path, read: Read, make: Callable[[Path], None], why: str
) -> None:
    make(log)
    reader = read()
    reader.wait_for_end()
    assert reader.raw.ended_properly
    assert reader.events == [Event("failed", f"The log cannot be read: {why}.", None)]
