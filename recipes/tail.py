"""A log file, live: its last lines, then each new one when it is written, as server-sent events.

Use it to watch a server, or to send the lines of a file to another program. Use a feed instead if
several servers write, or if readers may be away for longer than a log file is kept.

    LOG=/var/log/syslog uvicorn recipes.tail:app --reload
    curl -N "localhost:8000/log?lines=3"

Without `LOG` it follows `tail.log`, next to this file, and writes a line a second to it.
"""

import asyncio
import os
from collections.abc import AsyncGenerator, AsyncIterator, Generator
from contextlib import asynccontextmanager, suppress
from datetime import datetime
from io import FileIO
from pathlib import Path
from random import randrange
from typing import Annotated
from zlib import crc32

from fastapi import FastAPI, Header, Query, Response

from main import EndStreams, Stream
from recipes.common import keep_going, logger, prepare

LOG = Path(os.environ.get("LOG") or Path(__file__).with_name("tail.log")).absolute()
LOOK = 0.1  # seconds between two looks at the file
KEEP_ALIVE = 10.0  # seconds of silence
MAX_LINE = 1024 * 1024  # bytes; a longer line is sent in pieces
BLOCK = 64 * 1024  # bytes that are read at once
CHECKED = 256  # bytes before an offset that tell whether the file is still the same

# 1. The file, and one look at it for all readers --------------------------------------------------


class LogFile(FileIO):
    """A file that is the log, or was until `next` took its place. Its readers keep it open."""

    next: "LogFile | None" = None

    def size(self) -> int:
        return os.fstat(self.fileno()).st_size

    def read_at(self, start: int, end: int) -> bytes:
        return os.pread(self.fileno(), end - max(start, 0), max(start, 0))


class Watch:
    """Looks at the log for all readers, and wakes them when it has changed.

    inotify would also report each write to other files in the folder, and it does not see changes
    on a network disk.
    """

    def __init__(self) -> None:
        self.file: LogFile | None = None
        self.seen: object = None
        self.problem = ""
        self.changed = asyncio.Event()

    def open(self) -> LogFile | None:
        """Return the file that is the log now; without one, log why and return None."""
        try:
            status = LOG.stat()
            if not self.file or not os.path.samestat(status, os.fstat(self.file.fileno())):
                if not LOG.is_file():  # opening a named pipe would wait for its writer
                    raise OSError(f"{LOG} is not a file")
                old, self.file = self.file, LogFile(LOG)
                if old:
                    old.next = self.file
            self.problem = ""
            return self.file
        except Exception as error:  # whatever it is, the next look may succeed
            if str(error) != self.problem:
                logger.warning("Waiting for LOG: %s: %s", type(error).__name__, error)
            self.problem = str(error)
            return None

    async def look(self) -> None:
        self.open()
        status = self.file and os.fstat(self.file.fileno())
        seen = status and (self.file, status.st_size, status.st_mtime_ns)
        if seen != self.seen:
            self.seen = seen
            self.changed.set()
            self.changed = asyncio.Event()
        await asyncio.sleep(LOOK)


watch = Watch()

# 2. What a reader gets: each reads the file itself, so a slow reader delays nobody ----------------


def id_at(offset: int, before: bytes) -> str:
    """Return the id of a line that ends at `offset`; `before` ends with the bytes before it."""
    return f"{offset}-{crc32(before[-CHECKED:]):08x}"


def to_sse(line: bytes, event_id: str) -> bytes:
    text = line.lstrip(b"\0").removesuffix(b"\r").decode(errors="backslashreplace")
    text = text.replace("\r", r"\x0d")  # a CR alone also ends a line of an event stream
    return f"id: {event_id}\ndata: {text}\n\n".encode()


def find_last_lines(file: LogFile, count: int, end: int) -> Generator[bytes, None, int]:
    """Return the offset at which the last `count` complete lines before `end` begin."""
    while end > 0:
        start = max(end - BLOCK, 0)
        block = file.read_at(start, end)
        if len(block) < end - start or not block.strip(b"\0"):
            break  # it has been truncated, or this is a hole
        before, *ends = block.rsplit(b"\n", count + 1)
        if len(ends) > count:
            return start + len(before) + 1
        count -= len(ends)
        end = start
        yield b""
    return end


def read_log(lines: int, last_id: str) -> Generator[bytes | None]:
    """Yield the last lines, or those after the id, then new ones, as events; None: no more yet."""
    file = watch.open()
    offset = file.size() if file else 0
    while not (file := file or watch.open()):
        yield None
    if last_id:
        offset = int(last_id.partition("-")[0])
    else:
        offset = yield from find_last_lines(file, lines, offset)
    while True:
        file = yield from read_file(file, offset, last_id)
        yield b"event: rotated\nid: 0-00000000\ndata: The log was truncated or replaced.\n\n"
        offset, last_id = 0, ""


def read_file(file: LogFile, offset: int, last_id: str) -> Generator[bytes | None, None, LogFile]:
    """Yield what `read_log` does. Return the file to go on with, from its start."""
    known = file.read_at(offset - CHECKED, offset)
    if len(known) < min(offset, CHECKED) or last_id not in ("", id_at(offset, known)):
        return file  # not the file of the id, even if a line ends at the same place
    line = b""  # a line that has not ended yet
    while True:
        # Checked before reading. While a new file is empty, the writer may still write to this one.
        follower = file.next
        replaced = follower and (follower.size() > 0 or follower.next)
        data = file.read_at(offset - len(known), offset + BLOCK)
        if not data.startswith(known):
            return file  # it was truncated, even if it has grown again since
        if data == known and follower and replaced:
            if line:
                yield to_sse(line, id_at(offset, known))  # nothing will complete this line
            return follower
        if data == known:
            yield None
            continue
        if not line and data[len(known)] == 0:
            # A writer without O_APPEND leaves a hole after a truncation, which reads as NULs.
            # https://github.com/logrotate/logrotate/issues/286
            with suppress(OSError):  # there is no data after it yet
                offset = os.lseek(file.fileno(), offset, os.SEEK_DATA)
            known = file.read_at(offset - CHECKED, offset)
            data = known + file.read_at(offset, offset + BLOCK)
        start, at, events = offset - len(known), len(known), []
        while (newline := data.find(b"\n", at)) >= 0:
            line, at = line + data[at:newline], newline + 1
            events.append(to_sse(line, id_at(start + at, data[max(at - CHECKED, 0) : at])))
            line = b""
        line = (line + data[at:]).lstrip(b"\0")
        offset, known = start + len(data), data[-CHECKED:]
        if len(line) >= MAX_LINE:
            events.append(to_sse(line, id_at(offset, known)))
            line = b""
        yield b"".join(events)


async def follow(lines: int, last_id: str) -> AsyncGenerator[bytes]:
    """Yield what `read_log` does; wait for the watch when there is nothing more."""
    clock = asyncio.get_running_loop().time
    due = clock() + KEEP_ALIVE
    retry = b"retry: 1000\n\n"  # ms
    changed = watch.changed  # taken before each look: nothing can happen in between
    for events in read_log(lines, last_id):
        if retry and events != b"":  # it says: you will get all that is written from now on
            events, retry = retry + (events or b""), b""
        if not events and clock() >= due:
            events = b": keep-alive\n\n"
        if events:
            yield events
            due = clock() + KEEP_ALIVE
        elif events is None:
            with suppress(TimeoutError):
                async with asyncio.timeout_at(due):
                    await changed.wait()
        await asyncio.sleep(0)  # let other tasks run
        changed = watch.changed


# 3. The recipe's own log, and the app -------------------------------------------------------------


async def write_a_line() -> None:
    """Write a line, and wait a second. After half a minute begin a new file, as logrotate does."""
    if LOG.exists() and LOG.stat().st_size > 1000:
        LOG.replace(LOG.with_suffix(".log.1"))
    with LOG.open("a") as log:
        log.write(
            f"{datetime.now().time().isoformat('milliseconds')} GET /orders/{randrange(100)}\n"
        )
    await asyncio.sleep(1)


@asynccontextmanager
async def lifespan(_: FastAPI) -> AsyncIterator[None]:
    tasks = [asyncio.create_task(keep_going("The watch of LOG", watch.look))]
    if not os.environ.get("LOG"):
        tasks.append(asyncio.create_task(keep_going("Writing tail.log", write_a_line)))
    yield
    for task in tasks:
        task.cancel()


app = FastAPI(title="Tail", lifespan=lifespan)
app.add_middleware(EndStreams)
prepare(app, page="tail.html")


@app.get("/log", response_class=Response, responses={200: {"content": {"text/event-stream": {}}}})
async def log(
    lines: Annotated[int, Query(ge=0, le=1000, description="How many of the last lines.")] = 10,
    last_event_id: Annotated[str, Header(pattern="^([0-9]{1,18}-[0-9a-f]{8})?$")] = "",
) -> Stream:
    """The log's last lines, or those after an event, then each new one when it is written."""
    return Stream(follow(lines, last_event_id), media_type="text/event-stream")
