"""Three ways to stream over HTTP from Python: plain text, NDJSON and server-sent events.

Run it with `uvicorn main:app --reload`, then open http://localhost:8000 or run `python client.py`.

The file reads from top to bottom, in the order of the README. Its parts know nothing of one
another, and each can be copied away alone:

1. the events: a generator that yields, and sleeps until its next event is due;
2. the three formats: pure functions from an event to its bytes on the wire;
3. `Stream`: a response that sends each event when it is yielded;
4. `EndStreams`: a middleware that ends open streams when the server is asked to stop;
5. the endpoints, and how a stream is resumed;
6. the page that a browser gets at `/`.
"""

import asyncio
import itertools
import logging
import math
import mimetypes
import signal
import threading
from collections.abc import AsyncGenerator, Callable
from contextlib import AsyncExitStack, aclosing, suppress
from functools import wraps
from inspect import unwrap
from pathlib import Path
from types import FrameType
from typing import Annotated, Any, ClassVar
from weakref import WeakKeyDictionary, WeakSet

import uvicorn
from fastapi import FastAPI, Header, Query, Request, Response
from fastapi.responses import FileResponse, JSONResponse
from fastapi.staticfiles import StaticFiles
from pydantic import BaseModel, BeforeValidator, WithJsonSchema
from pydantic_core import PydanticCustomError
from starlette.datastructures import Headers
from starlette.middleware.exceptions import ExceptionMiddleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

logger = logging.getLogger(__name__)
Loop = asyncio.AbstractEventLoop


# 1. The events ------------------------------------------------------------------------------------


class Event(BaseModel):
    """What all three streams carry: an id that counts from 0, some text, and whether it ends here.

    Only `is_last_event` lets a reader tell a stream that ended from one that was cut off.
    """

    event_id: int
    data: str
    is_last_event: bool


async def generate_events(first: int, steps: int, interval: float) -> AsyncGenerator[Event]:
    """Yield the events `first` to `steps - 1`, one each `interval` seconds, the first at once.

    Event k is due k × interval after the first, however late the one before it was: a plain
    `asyncio.sleep(interval)` would add every lateness to all that follow.
    """
    start = asyncio.get_running_loop().time()
    event_id = first
    try:
        for event_id in range(first, steps):
            await sleep_until(start + (event_id - first) * interval)
            yield Event(
                event_id=event_id,
                # The cup is three bytes of UTF-8, and 16 bytes end in the middle of it.
                data=f"Step {event_id + 1} of {steps}: ☕",
                is_last_event=event_id == steps - 1,
            )
    finally:
        # However the stream ends, this runs at once: the place to give back what it used.
        logger.debug("generator closed at event %d of %d", event_id, steps)


# Whoever is due in the same 2 ms is woken by one timer: with thousands of streams a timer for each
# event would cost a third of all CPU.
RESOLUTION = 0.002
_sleepers: dict[tuple[Loop, int], list[asyncio.Future[None]]] = {}
_count = itertools.count(1)


async def sleep_until(due: float) -> None:
    """Sleep until the event loop's clock shows `due`, in seconds: not earlier, up to 2 ms later."""
    loop = asyncio.get_running_loop()
    if due <= loop.time():
        # A stream that need not sleep lets the others have their turn now and then. Not after each
        # event: those in between leave in one system call.
        if next(_count) % 16 == 0:
            await asyncio.sleep(0)
        return
    tick = math.ceil(due / RESOLUTION)
    sleepers = _sleepers.get((loop, tick))
    if sleepers is None:
        sleepers = _sleepers[loop, tick] = []
        loop.call_at(tick * RESOLUTION, _wake, loop, tick)
    sleeper = loop.create_future()
    sleepers.append(sleeper)
    await sleeper


def _wake(loop: Loop, tick: int) -> None:
    for sleeper in _sleepers.pop((loop, tick)):
        if not sleeper.done():  # its reader has left
            sleeper.set_result(None)


# 2. The three formats -----------------------------------------------------------------------------


def to_text(event: Event) -> bytes:
    """The event's text and a newline: easy to print, but nothing says which event it was."""
    return f"{event.data}\n".encode()


def to_ndjson(event: Event) -> bytes:
    """The event as one line of JSON. JSON escapes newlines, so a newline always ends an event.

    Newline-delimited JSON: https://github.com/ndjson/ndjson-spec
    """
    return f"{event.model_dump_json()}\n".encode()


def to_sse(event: Event) -> bytes:
    """The event for a browser's `EventSource`: an id to resume by, the JSON, and a blank line.

    `retry` is how many milliseconds the browser waits before it reconnects. Without an `event`
    field a plain `onmessage` sees every event.
    https://html.spec.whatwg.org/multipage/server-sent-events.html#event-stream-interpretation
    """
    return f"id: {event.event_id}\nretry: 1000\ndata: {event.model_dump_json()}\n\n".encode()


# 3. The response ----------------------------------------------------------------------------------

HEADERS = {
    # no-cache: a cache would replay an old stream. no-transform: HAProxy would compress it.
    "Cache-Control": "no-cache, no-transform",
    # nginx holds a stream that it compresses back until the end, unless it is told not to buffer.
    # https://nginx.org/en/docs/http/ngx_http_proxy_module.html#proxy_buffering
    "X-Accel-Buffering": "no",
}


class Stream(Response):
    """A response that sends each event of an async generator at the moment it is yielded.

    The reader goes away: the generator is closed at once, whether it was sleeping or sending.
    The reader is slow: `send` waits, and so does the generator; nothing piles up.
    The generator raises: the body is cut off, so that it does not look whole.
    """

    def __init__(
        self, events: AsyncGenerator[Any], to_bytes: Callable[[Any], bytes], media_type: str
    ) -> None:
        self.events = events
        self.to_bytes = to_bytes
        self.background = None
        self.init_headers({"Content-Type": media_type, **HEADERS})

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the events, until their end or until the reader is gone."""
        app, root_path, left = scope.get("free_stack", (None, None, None))
        # A mounted app may have middlewares of its own: then it is sent from in here.
        if left is not None and (app, root_path) == (scope["app"], scope["root_path"]):
            left.append((self, scope["fastapi_inner_astack"].pop_all()))
        else:
            await self.send_events(receive, send)

    async def send_events(self, receive: Receive, send: Send) -> None:
        sender = asyncio.current_task()
        assert sender is not None
        cancelled_before = sender.cancelling()
        watcher = asyncio.create_task(cancel_when_the_reader_leaves(sender, receive))
        try:
            head = {"type": "http.response.start", "status": 200, "headers": self.raw_headers}
            await send(head)
            async with aclosing(self.events):
                async for event in self.events:
                    body = self.to_bytes(event)
                    await send({"type": "http.response.body", "body": body, "more_body": True})
                    del event, body  # or a stream that sleeps would keep them, a tenth of its size
            await send({"type": "http.response.body"})
        except asyncio.CancelledError:
            # The server may have cancelled it too, and that is not ours to swallow.
            if not watcher.done() or sender.uncancel() > cancelled_before:
                raise
        finally:
            watcher.cancel()
        if self.background:
            await self.background()


async def cancel_when_the_reader_leaves(sender: asyncio.Task[Any], receive: Receive) -> None:
    """uvicorn's `send` says nothing when the reader is gone; only `receive` tells."""
    while (await receive())["type"] != "http.disconnect":
        pass
    sender.cancel()


class FreeStack:
    """Lets FastAPI's work on a request end before its `Stream` begins. All it does is save memory.

        app.add_middleware(FreeStack)  # before all others: it works only as the innermost

    FastAPI sends a response from inside a dozen coroutines, and an open stream keeps them all for
    as long as it lasts: 10 KB of 27. So a `Stream` only leaves itself in there, and is sent from
    out here. What dependencies with `yield` have opened stays open until it ends, as always.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app
        # What comes next to the router; a middleware in between would not see the stream.
        self.innermost = isinstance(app, ExceptionMiddleware)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        left: list[tuple[Stream, AsyncExitStack]] = []
        if scope["type"] == "http" and self.innermost:
            scope = {**scope, "free_stack": (scope["app"], scope["root_path"], left)}
        await self.app(scope, receive, send)
        del scope
        if left:
            stream, dependencies = left.pop()
            async with dependencies:
                await stream.send_events(receive, send)


# 4. When the server is asked to stop --------------------------------------------------------------


class EndStreams:
    """Ends open streams properly when the server is asked to stop: on Ctrl-C, SIGTERM, `--reload`.

        app.add_middleware(EndStreams)

    uvicorn waits for open connections, and tells an app of its shutdown only when all are closed:
    a stream holds a reload up until its own end (https://github.com/encode/uvicorn/issues/451).
    Here each stream is told that its reader has left (`http.disconnect`). It closes its generator,
    as it does when that happens, and then its body gets the proper end. This works for every
    response that listens for its reader to leave: Starlette's `StreamingResponse`, FastAPI's and
    sse-starlette's `EventSourceResponse`, and what is built on them.

    Only `media_types` whose readers come back by themselves are ended. Any other response, a
    download say, runs on to its own end while the server waits: a body that lacks something must
    not look whole. So is one that is compressed already: add this before such a middleware.

    A program that stops its server without a signal (a server in a thread) first calls
    `EndStreams.stop()`.
    """

    # By event loop: what it has open. And the loops whose server is stopping.
    _open: ClassVar[WeakKeyDictionary[Loop, set["_Exchange"]]] = WeakKeyDictionary()
    _stopping: ClassVar[WeakSet[Loop]] = WeakSet()
    _handlers: ClassVar[WeakSet[Any]] = WeakSet()  # ours, for signals

    def __init__(self, app: ASGIApp, media_types: tuple[str, ...] = ("text/event-stream",)) -> None:
        self.app = app
        self.media_types = media_types

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        loop = asyncio.get_running_loop()
        # With a lifespan a server starts, perhaps not the first one on this loop.
        if scope["type"] == "lifespan" or loop not in self._open:
            self._open.setdefault(loop, set())
            self._stopping.discard(loop)
            self._listen_to_signals()
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        asgi = scope.get("asgi", {})
        if asgi.get("spec_version", "2.0") >= "2.4":
            # There Starlette counts on `send` to raise, and does not listen for the reader.
            scope = {**scope, "asgi": {**asgi, "spec_version": "2.3"}}
        exchange = _Exchange(self, loop, receive, send)
        try:
            await self.app(scope, exchange.receive, exchange.send)
        finally:
            self._open[loop].discard(exchange)
        if exchange.ended and not exchange.complete:
            await exchange.send({"type": "http.response.body"})

    @classmethod
    def stop(cls) -> None:
        """End the streams of this process that are open, and those that its servers still begin.

        May be called from any thread, and from a signal handler.
        """
        for reference in cls._open.keyrefs():
            if loop := reference():
                with suppress(RuntimeError):  # it is closed
                    loop.call_soon_threadsafe(cls._end_streams, loop)

    @classmethod
    def _end_streams(cls, loop: Loop) -> None:
        cls._stopping.add(loop)
        for exchange in cls._open[loop]:
            exchange.end()

    @classmethod
    def _listen_to_signals(cls) -> None:
        """Listen to the server's signals too, and pass them on to the handlers that were there."""
        if threading.current_thread() is not threading.main_thread():
            return  # Python runs signal handlers in the main thread only
        ours = cls._handlers
        for signum in (signal.SIGINT, signal.SIGTERM):
            handler = signal.getsignal(signum)
            if not callable(handler) or unwrap(handler, stop=ours.__contains__) in ours:
                continue  # the default, or we listen already

            @wraps(handler)
            def stop(signum: int, frame: FrameType | None, handler: Any = handler) -> None:
                cls.stop()
                handler(signum, frame)

            ours.add(stop)
            signal.signal(signum, stop)


class _Exchange:
    """A request and its response, between the server and the app that `EndStreams` wraps."""

    __slots__ = ("_receive", "_send", "complete", "ended", "listening", "loop", "middleware")

    def __init__(self, middleware: EndStreams, loop: Loop, receive: Receive, send: Send) -> None:
        self.middleware, self.loop, self._receive, self._send = middleware, loop, receive, send
        self.listening: tuple[asyncio.Task[Any], ...] = ()  # tasks that wait in `receive`
        self.ended = self.complete = False

    def end(self) -> None:
        if not self.ended:  # a second signal must not cancel once more
            self.ended = True
            for task in self.listening:
                task.cancel()

    async def receive(self) -> Message:
        if self.ended:
            return {"type": "http.disconnect"}
        task = asyncio.current_task()
        assert task is not None
        cancelled_before = task.cancelling()
        self.listening += (task,)
        try:
            return await self._receive()
        except asyncio.CancelledError:
            # Somebody else may have cancelled it too, and that is not ours to swallow.
            if not self.ended or task.uncancel() > cancelled_before:
                raise
            return {"type": "http.disconnect"}
        finally:
            self.listening = tuple(other for other in self.listening if other is not task)

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.body":
            self.complete = not message.get("more_body")
        elif message["type"] == "http.response.start" and self.ended:
            # The MCP SDK answers a reader that it believes gone once more. Nobody must see that.
            await self.send({"type": "http.response.body"})
            self._send = _to_nobody
        elif message["type"] == "http.response.start":
            headers = Headers(raw=message.get("headers", []))
            media_type = headers.get("content-type", "").partition(";")[0].strip().lower()
            fixed = "content-length" in headers or "content-encoding" in headers
            if media_type in self.middleware.media_types and not fixed:
                self.middleware._open[self.loop].add(self)
                if self.loop in self.middleware._stopping:
                    self.end()
        await self._send(message)


async def _to_nobody(message: Message) -> None:
    """What a server does with a message when the reader has left."""


# 5. The endpoints ---------------------------------------------------------------------------------


def only_digits(value: str) -> str:
    """`int` alone would also take "+1", "1_0" and "1.0", which no event has as its id."""
    if not (value.isascii() and value.isdigit()):
        raise PydanticCustomError(
            "event_id", "Input should be a whole number from 0: the id of the last event received"
        )
    return value


Steps = Annotated[int, Query(ge=1, le=100_000, description="How many events the whole stream has.")]
# No stream is silent for longer than the idle timeouts of the usual proxies (30 to 60 s), so none
# needs keep-alive comments.
Interval = Annotated[
    float,
    Query(ge=0, le=10, allow_inf_nan=False, description="Seconds from one event to the next."),
]
LastEventID = Annotated[
    int | None,
    BeforeValidator(only_digits),
    WithJsonSchema({"type": "integer", "minimum": 0}),  # a header can be absent, but never null
    Header(ge=0, description="The stream goes on after this event. `EventSource` sends it itself."),
]

NDJSON, SSE = "application/x-ndjson", "text/event-stream"
NOTHING_LEFT = {"description": "No event is left after `Last-Event-ID`."}

app = FastAPI(title="Streaming over HTTP")
app.add_middleware(FreeStack)  # can be left out, see there
app.add_middleware(EndStreams, media_types=("text/plain", NDJSON, SSE))


def stream_after(
    last_event_id: int | None,
    steps: int,
    interval: float,
    to_bytes: Callable[[Event], bytes],
    media_type: str,
) -> Response:
    """Answer with the events after `last_event_id`, or with 204 if none is left.

    The request alone says where to go on. Nothing is remembered between requests, so any worker,
    any machine and a server that has just started can answer.
    """
    first = 0 if last_event_id is None else last_event_id + 1
    if first >= steps:
        # An `EventSource` reconnects after every end of a stream, until it gets a 204. A cache may
        # keep a 204 (RFC 9110, section 15.3.5), and would then give it to somebody who wants all.
        return Response(status_code=204, headers=HEADERS)
    return Stream(generate_events(first, steps, interval), to_bytes, media_type)


@app.get("/text", response_class=Response, responses={200: {"content": {"text/plain": {}}}})
async def text(steps: Steps = 10, interval: Interval = 1.0) -> Response:
    """The events' text, a line each. It cannot be resumed: no id is on the wire to resume by."""
    return stream_after(None, steps, interval, to_text, "text/plain; charset=utf-8")


@app.get(
    "/ndjson",
    response_class=Response,
    responses={200: {"content": {NDJSON: {}}}, 204: NOTHING_LEFT},
)
async def ndjson(
    steps: Steps = 10, interval: Interval = 1.0, last_event_id: LastEventID = None
) -> Response:
    """The events as lines of JSON, for programs."""
    return stream_after(last_event_id, steps, interval, to_ndjson, NDJSON)


@app.get(
    "/sse", response_class=Response, responses={200: {"content": {SSE: {}}}, 204: NOTHING_LEFT}
)
async def sse(
    steps: Steps = 10, interval: Interval = 1.0, last_event_id: LastEventID = None
) -> Response:
    """The events as server-sent events, for a browser's `EventSource`."""
    return stream_after(last_event_id, steps, interval, to_sse, SSE)


# 6. The page --------------------------------------------------------------------------------------

# The page lies next to this file. Nothing of it is inline, nothing comes from another host.
PAGE = Path(__file__).resolve().parent / "page"
PAGE_HEADERS = {
    "Content-Security-Policy": "default-src 'self'; base-uri 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Cache-Control": "no-cache",  # keep it, but ask each time whether it has changed
}


class PageFiles(StaticFiles):
    def file_response(self, *args: Any, **kwargs: Any) -> Response:
        response = super().file_response(*args, **kwargs)
        response.headers.update(PAGE_HEADERS)
        return response


@app.get("/", include_in_schema=False)
async def index(request: Request) -> Response:
    """The page that shows the streams live; to a program, which streams there are."""
    if PAGE.is_dir() and "text/html" in request.headers.get("accept", ""):
        return FileResponse(PAGE / "index.html", headers={"Vary": "Accept", **PAGE_HEADERS})
    what = {"message": "The same events three times.", "streams": ["/text", "/ndjson", "/sse"]}
    return JSONResponse(what, headers={"Vary": "Accept"})


# Windows takes media types from its registry, where another program may have put text/plain.
mimetypes.add_type("text/javascript", ".js")
if PAGE.is_dir():
    app.mount("/page", PageFiles(directory=PAGE))


if __name__ == "__main__":
    uvicorn.run(app, host="127.0.0.1", port=8000)
