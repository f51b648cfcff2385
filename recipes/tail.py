"""A log file, live: its last lines, then each new one when it is written, as server-sent events.

Take it to look over a server's shoulder, or to bring the lines of a file to another program. Take
a feed instead when several servers write, or when readers may be away for longer than a log lasts.

    LOG=/var/log/syslog uvicorn recipes.tail:app --reload
    curl -N "localhost:8000/log?lines=3"

Without `LOG` it follows `tail.log`, next to this file, and writes a line a second to it. The id of
an event is the offset of the byte after its line, so that a reader resumes exactly where it was.
"""

import asyncio
import os
from collections.abc import AsyncGenerator, AsyncIterator, Generator
from contextlib import aclosing, asynccontextmanager, closing, suppress
from datetime import datetime
from io import FileIO
from pathlib import Path
from typing import Annotated

from fastapi import FastAPI, Query, Response
from watchfiles import Change, awatch

from main import SSE, EndStreams, LastEventID, Stream

LOG = Path(os.environ.get("LOG", Path(__file__).with_name("tail.log"))).absolute()
KEEP_ALIVE = 10.0  # seconds of silence
MAX_LINE = 1024 * 1024  # bytes of a line that are kept and sent
BLOCK = 64 * 1024  # bytes that are read at once

# 1. The file, as one reader reads it --------------------------------------------------------------

# With an id: a reader that loses the connection right here goes on at the start of the new log.
ROTATED = b"event: rotated\nid: 0\ndata: The log was truncated or replaced. Here is its start.\n\n"


def to_sse(line: bytes, left_out: int, end: int) -> bytes:
    """A line as an event; `end` is the offset of the byte after it."""
    line = line.removesuffix(b"\r")
    if not line.isascii():
        line = line.decode(errors="backslashreplace").encode()
    line = line.replace(b"\r", rb"\x0d")  # by itself, too, a CR ends a line of an event stream
    more = b" [and %d bytes more]" % left_out if left_out else b""
    return b"id: %d\ndata: %s%s\n\n" % (end, line, more)


def open_log() -> FileIO | None:
    """Open the log; None if there is no such file now."""
    with suppress(FileNotFoundError, NotADirectoryError):
        # O_NONBLOCK: to open a named pipe would wait for its writer, and all readers with it.
        return FileIO(LOG, opener=lambda path, flags: os.open(path, flags | os.O_NONBLOCK))
    return None


def find_last_lines(count: int) -> int:
    """Return the offset at which the last `count` whole lines begin."""
    if (file := open_log()) is None:
        return 0
    with file:
        position = file.seek(0, os.SEEK_END)
        while position > 0:
            start = max(position - BLOCK, 0)
            block = os.pread(file.fileno(), position - start, start)
            newline = len(block)
            while (newline := block.rfind(b"\n", 0, newline)) >= 0:
                if count == 0:
                    return start + newline + 1
                count -= 1
            position = start
    return 0


def read_log(offset: int) -> Generator[bytes | None]:
    """Yield the lines from `offset` on as events, many at a time; None when there are no more yet.

    After a rotation it goes on with the file that is there then, from its start.
    """
    while True:
        if (file := open_log()) is None:
            yield None
            continue
        with file:
            size = file.seek(0, os.SEEK_END)
            # An offset at which no line ends is of another file.
            if not offset or (offset <= size and os.pread(file.fileno(), 1, offset - 1) == b"\n"):
                yield from read_file(file, offset)
        yield ROTATED
        offset = 0


def read_file(file: FileIO, offset: int) -> Generator[bytes | None]:
    """Yield events as `read_log` does, until this file is truncated or replaced."""
    line, left_out = bytearray(), 0  # a line that has not ended yet, and the bytes not kept of it
    seen = b""  # what was last read: if it is no longer there, the file was written anew
    while True:
        # Asked before the last look into this file: when something is in the new one, the writer
        # has left this one for good.
        replaced = is_replaced(file)
        while (block := os.pread(file.fileno(), len(seen) + BLOCK, offset - len(seen))) != seen:
            if not block.startswith(seen):
                return
            events = []
            for number, piece in enumerate(block[len(seen) :].split(b"\n")):
                if number > 0:  # behind a newline
                    offset += 1
                    events.append(to_sse(bytes(line), left_out, offset))
                    line, left_out = bytearray(), 0
                room = MAX_LINE - len(line)
                line += piece[:room]
                left_out += max(len(piece) - room, 0)
                offset += len(piece)
            seen = block[-256:]
            yield b"".join(events)
        if replaced:
            if line:  # without an end, which it will not get any more
                yield to_sse(bytes(line), left_out, offset)
            return
        yield None


def is_replaced(file: FileIO) -> bool:
    """Tell whether `LOG` names another file by now, and something is in that one."""
    with suppress(FileNotFoundError, NotADirectoryError):
        status = LOG.stat()
        return status.st_size > 0 and not os.path.samestat(status, os.fstat(file.fileno()))
    return False


# 2. When something happens to it ------------------------------------------------------------------

changed = asyncio.Event()


def wake_readers() -> None:
    global changed
    changed.set()
    changed = asyncio.Event()


async def watch() -> None:
    """Wake the readers when something happens to the log.

    One watch for all of them: each takes a thread of the 40 that there are, and an inotify
    instance of the 128 that a user has.
    """
    while True:
        entries = directory_entries()
        directories = {entry.parent for entry in entries}
        names = {str(path) for path in entries | directories}
        changes = awatch(
            *directories,
            watch_filter=None,
            recursive=False,
            rust_timeout=10_000,  # ms; by then the directories may be others, without a word
            yield_on_timeout=True,
        )
        # Soon is when the watch has begun: what happened before it is seen, too.
        asyncio.get_running_loop().call_soon(wake_readers)
        try:
            async with aclosing(changes):
                async for batch in changes:
                    kinds = {kind for kind, path in batch if path in names}
                    if kinds:
                        wake_readers()
                    if not batch or kinds - {Change.modified}:
                        break
        except Exception:
            # A directory is gone already, a limit of the kernel's is reached, or a file next to the
            # log has a name that watchfiles cannot decode. Look again in a second, and until then
            # each second: without a watch the readers would wait for their keep-alive.
            await asyncio.sleep(1)


def directory_entries() -> set[Path]:
    """The entries that decide which file the log is; of a missing directory, the entry for it."""
    entries = {entry for entry in (LOG, *LOG.parents) if entry.is_symlink()}
    for entry in (LOG, Path(os.path.realpath(LOG))):
        while not entry.parent.is_dir():
            entry = entry.parent
        entries.add(entry)
    return entries


# 3. The stream ------------------------------------------------------------------------------------


async def follow(lines: int, last_event_id: int | None) -> AsyncGenerator[bytes]:
    """Yield the last lines, or those after the id, and each new one, as events."""
    loop = asyncio.get_running_loop()
    try:
        if last_event_id is None:
            # In a thread: it may have to read far. All other reads are of one block, mostly just
            # written: less work than the way to a thread and back.
            last_event_id = await asyncio.to_thread(find_last_lines, lines)
        yield b"retry: 1000\n\n"  # ms; who has this misses nothing that is written from now on
        with closing(read_log(last_event_id)) as log:
            due = loop.time() + KEEP_ALIVE
            change = changed  # taken before each look: nothing can happen in between
            for events in log:
                if events:
                    yield events
                    due = loop.time() + KEEP_ALIVE
                if events is not None:
                    await asyncio.sleep(0)  # the others have their turn
                    continue
                try:
                    async with asyncio.timeout_at(due):
                        await change.wait()
                except TimeoutError:
                    yield b": keep-alive\n\n"
                    due = loop.time() + KEEP_ALIVE
                change = changed
    except OSError as error:
        yield f"event: failed\ndata: The log cannot be read: {error.strerror}.\n\n".encode()


def write_a_line() -> None:
    if LOG.exists() and LOG.stat().st_size > 1_000_000:
        LOG.replace(LOG.with_suffix(".log.1"))
    with LOG.open("a") as log:
        log.write(f"{datetime.now().time().isoformat('milliseconds')} all is well\n")


async def write_a_line_a_second() -> None:
    while True:
        write_a_line()
        await asyncio.sleep(1)


@asynccontextmanager
async def lifespan(_: FastAPI) -> AsyncIterator[None]:
    tasks = [asyncio.create_task(watch())]
    if "LOG" not in os.environ:
        tasks.append(asyncio.create_task(write_a_line_a_second()))
    yield
    for task in tasks:
        task.cancel()


app = FastAPI(title="Tail", lifespan=lifespan)
app.add_middleware(EndStreams)


@app.get("/log", response_class=Response, responses={200: {"content": {SSE: {}}}})
async def log(
    lines: Annotated[int, Query(ge=0, le=1000, description="How many of the last lines.")] = 10,
    last_event_id: LastEventID = None,
) -> Stream:
    """The log's last lines, then each new one when it is written."""
    return Stream(follow(lines, last_event_id), bytes, SSE)
