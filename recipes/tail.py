"""A log file, live: its last lines, then each new one when it is written, as server-sent events.

Use it to watch a server, or to send the lines of a file to another program. Use a feed instead if
several servers write, or if readers may be away for longer than a log file is kept.

    LOG=/var/log/syslog uvicorn recipes.tail:app --reload
    curl -N "localhost:8000/log?lines=3"

Without `LOG` it follows `tail.log`, next to this file, and writes a line a second to it.
"""

import asyncio
import os
import re
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager, suppress
from datetime import datetime
from io import FileIO
from pathlib import Path
from random import randrange
from typing import Annotated
from zlib import crc32

from fastapi import FastAPI, Header, Query, Response
from starlette.concurrency import run_in_threadpool

from main import EndStreams, Stream
from recipes.common import in_one_line, keep_going, logger, prepare

LOG = Path(os.environ.get("LOG") or Path(__file__).with_name("tail.log")).absolute()
LOOK = 0.05  # seconds between two looks at the file
KEEP_ALIVE = 10.0  # seconds of silence
BLOCK = 64 * 1024  # bytes that are read at once
MAX_LINE = 1024 * 1024  # bytes; a longer line is sent in pieces
CHECKED = 256  # bytes before an offset that tell whether the file is still the same
START = "0-00000000"  # the id before the first line
ROTATED = f"event: rotated\nid: {START}\ndata: The log was truncated or replaced.\n\n".encode()

# 1. The file, and one look at it for all readers --------------------------------------------------


class LogFile(FileIO):
    """A file that is the log, or was until `next` took its place. Its readers keep it open."""

    next: "LogFile | None" = None

    def size(self) -> int:
        return os.fstat(self.fileno()).st_size

    def read_at(self, start: int, end: int) -> bytes:
        return os.pread(self.fileno(), end - max(start, 0), max(start, 0))


class Watch:
    """Looks at the log for all readers, and wakes them when it has changed."""

    def __init__(self) -> None:
        self.file: LogFile | None = None
        self.seen: object = None
        self.problem = ""
        self.changed = asyncio.Event()

    def look(self) -> LogFile | None:
        """Return the file that is the log now. If there is none, log why and return None."""
        try:
            status = LOG.stat()
            if not self.file or not os.path.samestat(status, os.fstat(self.file.fileno())):
                if not LOG.is_file():  # opening a named pipe would wait for its writer
                    raise OSError(f"{LOG} is not a file")
                old, self.file = self.file, LogFile(LOG)
                if old:
                    old.next = self.file
            self.problem = ""
        except Exception as error:  # whatever it is, the next look may succeed
            if str(error) != self.problem:
                logger.warning("Waiting for LOG: %s", in_one_line(error))
            self.problem = str(error)
        if self.file:
            status = os.fstat(self.file.fileno())
            seen = self.file, status.st_size, status.st_mtime_ns
            if seen != self.seen:
                self.seen = seen
                self.changed.set()
                self.changed = asyncio.Event()
        return None if self.problem else self.file

    async def keep_looking(self) -> None:
        self.look()
        await asyncio.sleep(LOOK)


watch = Watch()

# 2. What a reader gets: each reads the file itself, so a slow reader delays nobody ----------------


def id_at(offset: int, before: bytes | memoryview) -> str:
    """Return the id of a line that ends at `offset`, after at least 256 bytes of what is before."""
    return f"{offset}-{crc32(before[-CHECKED:]):08x}"


def to_sse(line: bytes, event_id: str) -> bytes:
    line = line.lstrip(b"\0").removesuffix(b"\n").removesuffix(b"\r")
    # A CR alone also ends a line of an event stream.
    text = line.decode(errors="backslashreplace").replace("\r", r"\x0d")
    return f"id: {event_id}\ndata: {text}\n\n".encode()


def find_last_lines(file: LogFile, count: int) -> str:
    """Return the id before the last `count` complete lines."""
    end = file.size()
    # A block of NULs is a hole (see below); an empty one was truncated just now.
    while end > 0 and (block := file.read_at(end - BLOCK, end)).strip(b"\0"):
        rest, *lines = block.rsplit(b"\n", count + 1)
        if len(lines) > count:
            end -= len(block) - len(rest) - 1
            break
        end -= len(block)
        count -= len(lines)
    return id_at(end, file.read_at(end - CHECKED, end))


def read_on(file: LogFile, last_id: str) -> tuple[LogFile, str, bytes]:
    """Return the events after an id, with the file and the id to continue from."""
    # Checked before reading. While a new file is empty, the writer may still write to this one.
    following = file.next if file.next and (file.next.size() > 0 or file.next.next) else None
    try:
        return file, *read_events(file, last_id, is_over=following is not None)
    except OSError:  # nothing follows the id, or the file cannot be read now
        return (following, START, ROTATED) if following else (file, last_id, b"")


def read_events(file: LogFile, last_id: str, is_over: bool) -> tuple[str, bytes]:
    """Return the last id and the events of the next lines. Raises OSError if there are none."""
    offset = int(last_id.partition("-")[0])
    start = max(offset - CHECKED, 0)
    data = file.read_at(start, offset + BLOCK)
    if len(data) >= BLOCK and data.find(b"\n", offset - start) < 0:  # a long line
        data = file.read_at(start, offset + MAX_LINE + 1)
    before, new = data[: offset - start], data[offset - start :]
    if id_at(start + len(before), before) != last_id:
        return START, ROTATED  # it was truncated, even if it has grown again since
    if not (hole := new[:BLOCK]).strip(b"\0"):
        # Nothing, or a hole, which a writer without O_APPEND leaves after a truncation:
        # https://github.com/logrotate/logrotate/issues/286
        end = os.lseek(file.fileno(), offset + len(hole), os.SEEK_DATA)
        return id_at(end, file.read_at(end - CHECKED, end)), b""

    lines = [line + b"\n" for line in new.split(b"\n")[:-1]]
    if not lines and len(new) > MAX_LINE:
        # A piece does not end in the middle of a character, or between CR and LF.
        lines = [re.sub(rb"(\r|[\xc0-\xff][\x80-\xbf]{,2})\Z", b"", new[:MAX_LINE])]
    elif not lines and is_over:
        lines = [new]  # nothing will complete this line
    events = []
    for line in lines:
        offset += len(line)
        last_id = id_at(offset, memoryview(data)[: offset - start])
        events.append(to_sse(line, last_id))
    return last_id, b"".join(events)


async def follow(lines: int, last_id: str) -> AsyncGenerator[bytes]:
    """Yield the last lines, or those after the id, then each new one, as events."""
    file = watch.look()
    if not last_id:
        last_id = START
        with suppress(OSError):  # it cannot be read now
            last_id = await run_in_threadpool(find_last_lines, file, lines) if file else START
    events = b"retry: 1000\n\n"  # ms; from here on, the reader misses nothing
    clock = asyncio.get_running_loop().time
    while True:
        if events:
            yield events
            due = clock() + KEEP_ALIVE
        await asyncio.sleep(0)  # let other tasks run
        changed = watch.changed  # taken before the look, so that no change is missed
        before, events = last_id, b""
        if file := file or watch.look():
            file, last_id, events = read_on(file, last_id)
        if not events and last_id == before:
            try:
                async with asyncio.timeout_at(due):
                    await changed.wait()
            except TimeoutError:
                events = b": keep-alive\n\n"


# 3. The recipe's own log, and the app -------------------------------------------------------------


async def write_a_line() -> None:
    """Write a line, and wait a second. After half a minute, begin a new file like logrotate."""
    if LOG.exists() and LOG.stat().st_size > 1000:
        LOG.replace(LOG.with_suffix(".log.1"))
    now = datetime.now().time().isoformat("milliseconds")
    with LOG.open("a") as log:
        log.write(f"{now} GET /orders/{randrange(100)}\n")
    await asyncio.sleep(1)


@asynccontextmanager
async def lifespan(_: FastAPI) -> AsyncIterator[None]:
    tasks = []
    if not os.environ.get("LOG"):  # before the watch, which would report a missing file
        tasks.append(asyncio.create_task(keep_going("Writing tail.log", write_a_line)))
    tasks.append(asyncio.create_task(keep_going("The watch of LOG", watch.keep_looking)))
    yield
    for task in tasks:
        task.cancel()


app = FastAPI(title="Tail", lifespan=lifespan)
app.add_middleware(EndStreams)
prepare(app, page="tail.html")


@app.get("/log", response_class=Response, responses={200: {"content": {"text/event-stream": {}}}})
async def log(
    lines: Annotated[int, Query(ge=0, le=1000, description="How many lines to begin with.")] = 10,
    last_event_id: Annotated[str, Header(pattern="^([0-9]{1,18}-[0-9a-f]{8})?$")] = "",
) -> Stream:
    """The log's last lines, or those after an event, then each new one when it is written."""
    return Stream(follow(lines, last_event_id), media_type="text/event-stream")
