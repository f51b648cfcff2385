"""feed: one feed, any number of readers: what is posted here, everybody reads.

Take it for notifications, scores, prices: one event for everybody. What must not be lost with a
disk goes into a database first. For events that have one reader take `long_task`.

Run it with `uvicorn recipes.feed:app --reload`, then open http://localhost:8000 in two tabs, or
read it with `curl -N localhost:8000/feed`.

The log is in memory, for one process. With `REDIS_URL` (such as redis://localhost:6379) it is a
Redis Stream, for any number of processes and machines.

1. the log;
2. its readers, each at its own speed;
3. the log in Redis;
4. the endpoints.
"""

import asyncio
import contextvars
import json
import logging
import os
import re
import time
import types
from asyncio.tasks import _enter_task, _leave_task
from bisect import bisect_right
from collections.abc import Coroutine, Generator
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Annotated, Any, NamedTuple

from fastapi import Depends, FastAPI, Header, HTTPException, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse
from pydantic import BaseModel, Field, ValidationError
from redis.asyncio import BlockingConnectionPool, Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from starlette.types import Receive, Send

from main import HEADERS, PAGE_HEADERS, EndStreams, FreeStack, PageFiles, Stream

logger = logging.getLogger(__name__)


# 1. The log ---------------------------------------------------------------------------------------

KEEP = 1000  # events
SILENCE = 10.0  # seconds without an event, after which a comment says that the stream is alive
WRITE = 65_536  # bytes that several events may have in one write


class EventId(NamedTuple):
    """As Redis has them: milliseconds, and a sequence number."""

    ms: int
    seq: int

    @classmethod
    def parse(cls, text: str) -> "EventId":
        return cls(*map(int, text.split("-")))

    def __str__(self) -> str:
        return f"{self.ms}-{self.seq}"


SSE = "text/event-stream"
UNKNOWN = EventId(-1, -1)


def to_sse(event_id: EventId, data: str) -> bytes:
    """The event as all its readers get it. Each kind of line break makes a line of its own."""
    lines = "".join(f"data: {line}\n" for line in re.split(r"\r\n|\r|\n", data))
    return f"id: {event_id}\n{lines}\n".encode()


def gap(reason: str) -> bytes:
    """Something is missing here. It has no id: the reader keeps that of the last event it got."""
    return f"event: gap\ndata: {json.dumps({'reason': reason})}\n\n".encode()


class LogIsAway(Exception):
    """The log did not answer in time. What was to be published may still appear."""


class Log:
    """The last events, each as the bytes that everybody gets, and the readers that have them all.

    Events are numbered as they come: `start` is the first that is kept, `end` the one to come.

    This log is in memory. One that is elsewhere is a subclass, as `RedisLog` is: its `publish` puts
    an event there, and its `follow` calls `append` with all that is put there, in order.
    """

    shared = False  # whether other servers publish in it too

    def __init__(self) -> None:
        self.ids: list[EventId] = []
        self.frames: list[bytes] = []
        self.start = self.end = 1
        # Its beginning is in all its ids, so those of the server before are not taken for its own.
        self.began = time.time_ns() // 1_000_000
        # Nothing is missing after `floor`; `last` is the newest event.
        self.floor = self.last = EventId(self.began, 0)
        self.joined = (0, 0, (b"", 0))
        self.waiting: dict[Reader, None] = {}  # a set in order: memory is faster that way
        self.woken = False
        self.silence: asyncio.TimerHandle | None = None

    async def publish(self, data: str) -> EventId:
        """Put an event into the log. Raises `LogIsAway`."""
        event_id = EventId(self.began, self.end)
        self.append(event_id, data)
        return event_id

    async def follow(self) -> None:
        """Called for each reader that comes."""
        if not self.silence:
            self.wake_soon()

    def append(self, event_id: EventId, data: str) -> None:
        self.ids.append(event_id)
        self.frames.append(to_sse(event_id, data))
        self.last, self.end = event_id, self.end + 1
        if len(self.frames) > KEEP:
            self.floor, self.start = self.ids.pop(0), self.start + 1
            del self.frames[0]
        self.wake_soon()

    def begin(self, floor: EventId) -> None:
        """Begin anew after `floor`. Whoever has read until here is told of a gap."""
        self.ids, self.frames = [], []
        self.floor = self.last = floor
        self.start = self.end = self.end + 1
        self.wake_soon()

    def chunk(self, place: int) -> tuple[bytes, int]:
        """Return the events from `place` on, joined up to 64 KB, and the place after them."""
        if self.joined[:2] != (place, self.end):  # most readers are at the same place
            frames = self.frames[place - self.start :]
            count = bisect_right(list(accumulate(map(len, frames))), WRITE) or 1
            self.joined = place, self.end, (b"".join(frames[:count]), place + count)
        return self.joined[2]

    def wake_soon(self) -> None:
        """Let the readers go on in the event loop's next turn, with all that came until then."""
        if not self.woken:
            self.woken = True
            asyncio.get_running_loop().call_soon(self.wake)

    def wake(self, silence: bytes = b"") -> None:
        self.woken = False
        if self.silence:
            self.silence.cancel()
        loop = asyncio.get_running_loop()
        self.silence = loop.call_later(SILENCE, self.wake, b": keep-alive\n\n")
        waiting, self.waiting = self.waiting, {}
        for reader in waiting:
            reader.go_on(silence)


# 2. Its readers -----------------------------------------------------------------------------------


class Reader(Stream):
    """The answer to one reader: all events after `after`, or from now on.

    It has no queue, but a place in the log: the number of the event that it gets next.

    It has no task that waits for events either: to wake a task for each of them costs a third more
    CPU. The log runs `send_next`, nearly always to its end at once; only if a reader is slow, a
    task goes on with it. Either a reader waits in the log, or its `send_next` is under way, never
    both: so nothing is lost, doubled or out of order.
    """

    def __init__(self, log: Log, after: EventId | None) -> None:
        self.log, self.after = log, after
        self.place, self.came = 0, log.end
        self.background = None
        self.init_headers({"Content-Type": SSE, **HEADERS})
        self.task: asyncio.Task[None] | None = None

    async def send_events(self, receive: Receive, send: Send) -> None:
        loop, owner = asyncio.get_running_loop(), asyncio.current_task()
        assert owner is not None
        self.send, self.owner, self.context = send, owner, contextvars.copy_context()
        await self.log.follow()
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        first = loop.call_soon(self.go_on)
        try:
            while (await receive())["type"] != "http.disconnect":
                pass
        finally:
            first.cancel()
            self.log.waiting.pop(self, None)
            if self.task:
                self.task.cancel()

    def go_on(self, silence: bytes = b"") -> None:
        self.task = run_eagerly(self.send_next(silence), self.owner, self.context)

    async def send_next(self, silence: bytes) -> None:
        """Send all that is there, or else `silence`, and wait in the log for more."""
        chunk = self.next_chunk() or silence
        try:
            while chunk:
                await self.send({"type": "http.response.body", "body": chunk, "more_body": True})
                chunk = self.next_chunk()
            self.log.waiting[self] = None
        except OSError:
            pass  # the reader has left, as servers with ASGI 2.4 say it
        except Exception:
            logger.exception("A reader cannot be sent to, and is cut off.")
            self.owner.cancel()

    def next_chunk(self) -> bytes:
        """Return what comes next, and move on. Nothing: the reader has all that there is."""
        log, after = self.log, self.after
        if self.place == log.end:
            return b""
        if self.place >= log.start:
            chunk, self.place = log.chunk(self.place)
            return chunk
        if self.place:
            self.place = log.start
            return gap("Events were dropped before they could be sent.")
        # It has no place yet.
        if log.last == UNKNOWN:
            return b""
        if after is None:
            self.place = log.end
            # No event, but an id to resume from, should the first event not get there.
            return f"retry: 1000\nid: {log.last}\n\n".encode()
        if after > log.last and (log.shared or log.end == self.came):
            return b""  # another server was quicker; where there is no other, it is not our id
        if log.floor <= after <= log.last:
            passed = bisect_right(log.ids, after)
            self.place = log.start + passed
            if after in (log.floor, *log.ids[passed - 1 : passed]):
                return self.next_chunk()
            # Redis was killed before it had written that event down, and others perhaps.
            return gap(f"Nobody knows {after} any more, nor what came before and after it.")
        self.place = log.start
        return gap(f"What came after {after} is no longer kept.")


def run_eagerly(
    coroutine: Coroutine[Any, Any, None], owner: asyncio.Task[Any], context: contextvars.Context
) -> asyncio.Task[None] | None:
    """Run a coroutine up to where it would wait; return a task that goes on with it, if it would.

    What it calls may ask for the current task: https://docs.python.org/3/library/asyncio-extending.html
    From Python 3.12 on `asyncio.Task(coroutine, eager_start=True)` is nearly the same.
    """
    loop = owner.get_loop()
    _enter_task(loop, owner)
    try:
        future = context.run(coroutine.send, None)
    except StopIteration:
        return None
    finally:
        _leave_task(loop, owner)
    return loop.create_task(go_on_with(coroutine, future), context=context)


@types.coroutine
def go_on_with(coroutine: Coroutine[Any, Any, None], future: Any) -> Generator[Any, Any, None]:
    """Do what a task does with a coroutine that waits for `future`."""
    while True:
        try:
            step = partial(coroutine.send, (yield future))
        except BaseException as error:  # it was cancelled, or what it waits for was
            step = partial(coroutine.throw, error)
        try:
            future = step()
        except StopIteration:
            return


# 3. The log in Redis ------------------------------------------------------------------------------


class RedisLog(Log):
    """A Redis Stream, and what this process has read of it. One connection reads, one publishes.

    https://redis.io/docs/latest/develop/data-types/streams/
    """

    shared = True
    KEY = "feed"
    BLOCK = 2  # seconds, after which Redis answers that there is nothing new
    ANSWER = 5  # seconds without any answer, after which the connection is taken for dead
    PATIENCE = 4  # seconds that publishing may take

    def __init__(self, url: str) -> None:
        super().__init__()
        self.floor = self.last = UNKNOWN
        self.following: asyncio.Task[None] | None = None
        self.tried = asyncio.Event()
        self.posted: list[tuple[str, asyncio.Future[str]]] = []
        self.publishing: asyncio.Task[None] | None = None
        self.reader, self.publisher = (self.connect(url), self.connect(url))

    def connect(self, url: str) -> Redis:
        pool = BlockingConnectionPool.from_url(
            url,
            max_connections=1,  # who wants it meanwhile waits
            timeout=None,
            socket_timeout=self.ANSWER,
            retry=Retry(NoBackoff(), 0),  # a command that is sent again may be done twice
            protocol=2,  # with 3 a connection that broke while idle is not noticed before its use
            decode_responses=True,
            encoding_errors="replace",
        )
        return Redis.from_pool(pool)

    async def publish(self, data: str) -> EventId:
        entry: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self.posted.append((data, entry))
        if self.publishing is None or self.publishing.done():
            self.publishing = asyncio.create_task(self.publish_posted())
        try:
            async with asyncio.timeout(self.PATIENCE):
                return EventId.parse(await entry)
        except Exception as error:
            logger.warning("Not known to be published: %s: %s", type(error).__name__, error)
            raise LogIsAway from error

    async def publish_posted(self) -> None:
        """What is posted while the connection is busy then goes to Redis all at once."""
        while self.posted:
            batch = [(data, entry) for data, entry in self.posted if not entry.done()]
            self.posted = []
            entries: list[Any]
            try:
                pipeline = self.publisher.pipeline(transaction=False)
                for data, _ in batch:
                    # One more than a server keeps: a server that missed what was trimmed here has
                    # then too much to keep the place of its readers, and they are told.
                    pipeline.xadd(self.KEY, {"data": data}, maxlen=KEEP + 1)
                entries = await pipeline.execute(raise_on_error=False)
            except Exception as error:
                entries = [error] * len(batch)
            for (_, entry), answer in zip(batch, entries, strict=True):
                if entry.done():  # it took too long
                    continue
                if isinstance(answer, Exception):
                    entry.set_exception(answer)
                else:
                    entry.set_result(answer)

    async def follow(self) -> None:
        await super().follow()
        if self.following is None or self.following.done():
            self.following = asyncio.create_task(self.read_for_ever())
        await self.tried.wait()

    async def read_for_ever(self) -> None:
        away = False
        while True:
            try:
                await self.read_new()
                if away:
                    logger.warning("Redis is back.")
                away = False
            # RedisError, OSError, and on uvloop RuntimeError for a connection that has just closed:
            # https://github.com/MagicStack/uvloop/issues/506
            except Exception as error:
                self.tried.set()
                if not away:
                    name = type(error).__name__
                    logger.warning("Redis is away, the readers wait for it: %s: %s", name, error)
                away = True
                await asyncio.sleep(0.5)

    async def read_new(self) -> None:
        """Append what is new in the stream, then wait until there is more."""
        seen = max(self.last, EventId(0, 0))
        newest: Any = await self.reader.xrevrange(self.KEY, min=str(seen), count=KEEP + 1)
        entries = [(EventId.parse(entry), fields) for entry, fields in reversed(newest)]
        # What was read last comes first again. If it is gone, so may be others after it.
        oldest = entries[0][0] if entries else seen
        if self.last == UNKNOWN or (oldest != seen != EventId(0, 0)):
            self.begin(oldest)
        for event_id, fields in entries:
            if event_id > seen:
                self.append(event_id, fields.get("data", ""))
        self.tried.set()
        await self.reader.xread({self.KEY: str(self.last)}, block=self.BLOCK * 1000, count=1)


# 4. The endpoints ---------------------------------------------------------------------------------

MAX_BODY = 65_536  # bytes
PAGES = Path(__file__).parent / "pages"


class Event(BaseModel):
    data: Annotated[str, Field(min_length=1, max_length=10_000)]


class Published(BaseModel):
    id: str


async def read_event(request: Request) -> Event:
    """Read the body here: FastAPI would read it all, and answer 500 when its 422 repeats a NaN."""
    if not request.headers.get("content-type", "").startswith("application/json"):
        # Any other type could come from somebody else's page, which a browser does not ask.
        where, what = ("header", "content-type"), "Input should be application/json"
        raise RequestValidationError([{"type": "content_type", "loc": where, "msg": what}])
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > MAX_BODY:
            raise HTTPException(413, f"The body should have at most {MAX_BODY} bytes.")
    try:
        return Event.model_validate_json(bytes(body))
    except ValidationError as error:
        errors = error.errors(include_input=False, include_url=False)
        raise RequestValidationError([e | {"loc": ("body", *e["loc"])} for e in errors]) from None


log = RedisLog(os.environ["REDIS_URL"]) if "REDIS_URL" in os.environ else Log()
app = FastAPI(title="One feed, any number of readers")
app.add_middleware(FreeStack)  # saves memory; can be left out
app.add_middleware(EndStreams)


@app.post("/feed", status_code=201)
async def publish(event: Annotated[Event, Depends(read_event)]) -> Published:
    """Publish an event to all readers."""
    try:
        return Published(id=str(await log.publish(event.data)))
    except LogIsAway:
        detail = "The log is away: not known to be published, it may still appear."
        raise HTTPException(503, detail, {"Retry-After": "1"}) from None


@app.get("/feed", response_class=Response, responses={200: {"content": {SSE: {}}}})
async def feed(
    last_event_id: Annotated[str | None, Header(pattern="^[0-9]{1,20}-[0-9]{1,20}$")] = None,
) -> Response:
    """All events from now on, or all after `Last-Event-ID`, as server-sent events."""
    after = EventId.parse(last_event_id) if last_event_id else None
    return Reader(log, after)


@app.get("/", include_in_schema=False)
async def page() -> Response:
    return FileResponse(PAGES / "feed.html", headers=PAGE_HEADERS)


app.mount("/pages", PageFiles(directory=PAGES))
