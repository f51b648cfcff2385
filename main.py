"""Three ways to stream over HTTP from Python: plain text, NDJSON and server-sent events.

Run it with `uvicorn main:app --reload`, then open http://localhost:8000 or run `python client.py`.

The file reads from top to bottom, in the order of the README:

1. the events, and one generator that sleeps between them;
2. the three formats: pure functions from an event to its bytes on the wire;
3. the request: its parameters, and how a stream is resumed;
4. when things end early: readers that go away, a server that is asked to stop;
5. the endpoints;
6. the page that a browser gets at `/`.
"""

import asyncio
import logging
import math
import mimetypes
import re
import signal
import threading
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import aclosing, asynccontextmanager
from functools import cache
from pathlib import Path
from types import FrameType
from typing import Annotated, Any

import uvicorn
from fastapi import FastAPI, Header, Query, Request, Response
from fastapi.responses import FileResponse
from fastapi.staticfiles import StaticFiles
from pydantic import BaseModel, BeforeValidator, WithJsonSchema
from pydantic_core import PydanticCustomError
from starlette.datastructures import Headers
from starlette.types import Receive, Scope, Send

logger = logging.getLogger(__name__)


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
    `asyncio.sleep(interval)` would add every lateness to all that follow. Ends early, after a whole
    event, when the server is asked to stop.
    """
    start = asyncio.get_running_loop().time()
    event_id = first
    try:
        for event_id in range(first, steps):
            if event_id > first:
                await alarm.sleep_until(start + (event_id - first) * interval)
                if alarm.stopping:
                    return
            yield Event(
                event_id=event_id,
                # The cup is three bytes of UTF-8, and 16 bytes end in the middle of it.
                data=f"Step {event_id + 1} of {steps}: ☕",
                is_last_event=event_id == steps - 1,
            )
    finally:
        # However the stream ends, this runs at once: the place to give back what it used.
        logger.debug("generator closed at event %d of %d", event_id, steps)


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


# 3. The request -----------------------------------------------------------------------------------


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

HEADERS = {
    # no-cache: a cache would replay an old stream. no-transform: HAProxy would compress it.
    "Cache-Control": "no-cache, no-transform",
    # nginx holds a stream that it compresses back until the end, unless it is told not to buffer.
    # https://nginx.org/en/docs/http/ngx_http_proxy_module.html#proxy_buffering
    "X-Accel-Buffering": "no",
}


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


# 4. When things end early -------------------------------------------------------------------------


@cache
def stream_headers(media_type: str) -> list[tuple[bytes, bytes]]:
    """The headers of a stream as ASGI wants them, encoded once and not for each stream."""
    return Headers({"Content-Type": media_type, **HEADERS}).raw


class Stream(Response):
    """A response that sends each event when the generator yields it, and then the end of the body.

    The reader goes away: the generator is closed at once, whether it was sleeping or sending.
    The reader is slow: `send` waits, and so does the generator; nothing piles up.
    """

    def __init__(
        self,
        events: AsyncGenerator[Event],
        to_bytes: Callable[[Event], bytes],
        media_type: str,
    ) -> None:
        self.events = events
        self.to_bytes = to_bytes
        self.status_code = 200
        self.background = None
        self.raw_headers = [*stream_headers(media_type)]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Leave the sending to `StreamingApp`, which calls `run` when FastAPI has returned."""
        scope["stream"] = self

    async def run(self, receive: Receive, send: Send) -> None:
        """Send the events, until their end or until the reader is gone."""
        sender = asyncio.current_task()
        assert sender is not None

        async def cancel_sender_when_the_reader_leaves() -> None:
            # uvicorn's `send` says nothing when the reader is gone; only `receive` tells.
            while (await receive())["type"] != "http.disconnect":
                pass
            sender.cancel()

        watcher = asyncio.create_task(cancel_sender_when_the_reader_leaves())
        try:
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            more = True
            async with aclosing(self.events):
                async for event in self.events:
                    more = not event.is_last_event
                    body = self.to_bytes(event)
                    await send({"type": "http.response.body", "body": body, "more_body": more})
            if more:  # the server is stopping; even so the body gets its proper end
                await send({"type": "http.response.body"})
        except asyncio.CancelledError:
            if not watcher.done():  # the server cancelled, not the watcher
                raise
            sender.uncancel()
        except OSError:
            # The reader is gone, as servers with ASGI 2.4 say it.
            # https://github.com/django/asgiref/pull/431
            pass
        finally:
            watcher.cancel()


class StreamingApp(FastAPI):
    """FastAPI, but its own work on a request is over when the stream begins.

    FastAPI checks the request and calls the endpoint from inside a dozen coroutines and three exit
    stacks. Sent from in there, every open stream would keep all that for as long as it lasts, and
    each event would pass through it: 25 KB a stream instead of 13, and a tenth more CPU an event.
    So `Stream` only leaves itself in the scope, and is run from out here. By then dependencies with
    `yield` are closed, and middleware has seen the request end.
    """

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        fastapi_scope = {**scope}  # FastAPI keeps its exit stacks in here
        await super().__call__(fastapi_scope, receive, send)
        stream = fastapi_scope.get("stream")
        del fastapi_scope
        if stream:
            await stream.run(receive, send)


class Alarm:
    """Wakes each sleeping stream when its event is due, and all of them when the server stops."""

    # Whoever is due in the same 2 ms is woken by one timer: with thousands of streams a timer for
    # each event would cost more than the event.
    RESOLUTION = 0.002
    # A stream that need not sleep lets the others have their turn after so many events, and not
    # after each: those then leave in one system call.
    EVENTS_IN_A_TURN = 16

    def __init__(self) -> None:
        self.stopping = False
        self._events = 0  # since a stream let the others have their turn
        self._sleepers: dict[tuple[asyncio.AbstractEventLoop, int], set[asyncio.Future[None]]] = {}

    async def sleep_until(self, due: float) -> None:
        """Sleep until the event loop's clock shows `due`, in seconds, or until the server stops.

        Not earlier, and up to 2 ms later. Where `due` is past, others have a turn now and then.
        """
        loop = asyncio.get_running_loop()
        if due <= loop.time() or self.stopping:
            self._events += 1
            if self._events >= self.EVENTS_IN_A_TURN:
                self._events = 0
                await asyncio.sleep(0)
            return
        tick = math.ceil(due / self.RESOLUTION)
        sleepers = self._sleepers.get((loop, tick))
        if sleepers is None:
            sleepers = self._sleepers[loop, tick] = set()
            loop.call_at(tick * self.RESOLUTION, self._wake, loop, tick)
        sleeper = loop.create_future()
        sleepers.add(sleeper)
        try:
            await sleeper
        finally:
            sleepers.discard(sleeper)

    def stop(self, loop: asyncio.AbstractEventLoop) -> None:
        """Wake everybody who sleeps on this loop, now and from now on."""
        self.stopping = True
        for sleeping_loop, tick in list(self._sleepers):
            if sleeping_loop is loop:
                self._wake(loop, tick)

    def _wake(self, loop: asyncio.AbstractEventLoop, tick: int) -> None:
        for sleeper in self._sleepers.pop((loop, tick), ()):
            if not sleeper.done():
                sleeper.set_result(None)


alarm = Alarm()


@asynccontextmanager
async def lifespan(_: FastAPI) -> AsyncIterator[None]:
    """Stop the streams when the server is asked to stop: on Ctrl-C, SIGTERM or `--reload`.

    uvicorn tells an app of its shutdown only when all connections are closed, so an open stream
    holds it up until the stream's own end (https://github.com/sysid/sse-starlette/issues/128). It
    told `receive` for a while (https://github.com/Kludex/uvicorn/pull/2829), but no longer. So
    listen to the same signals, and pass them on to the handler that was there: the server still
    does all that it did before.
    """
    loop = asyncio.get_running_loop()
    handlers: dict[int, Callable[[int, FrameType | None], Any]] = {}

    def stop_streams(signum: int, frame: FrameType | None) -> None:
        # A signal interrupts Python between any two lines; the loop must not be touched from here.
        loop.call_soon_threadsafe(alarm.stop, loop)
        handlers[signum](signum, frame)

    # Python runs signal handlers in the main thread only; elsewhere (TestClient, a server in a
    # thread) there is no signal to take. A handler that is not Python's is left alone.
    if threading.current_thread() is threading.main_thread():
        for signum in (signal.SIGINT, signal.SIGTERM):
            handler = signal.getsignal(signum)
            if callable(handler):
                handlers[signum] = handler
                signal.signal(signum, stop_streams)
    alarm.stopping = False
    yield
    for number, handler in handlers.items():
        if signal.getsignal(number) is stop_streams:
            signal.signal(number, handler)


# 5. The endpoints ---------------------------------------------------------------------------------

app = StreamingApp(title="Streaming over HTTP", lifespan=lifespan)


def documented(
    to_bytes: Callable[[Event], bytes], media_type: str, **schema: Any
) -> dict[int | str, Any]:
    """What /docs shows of a stream: its media type, its items, and what its first events look like.

    `itemSchema` is OpenAPI 3.2's, for media types that are a sequence of items:
    https://learn.openapis.org/specification/media-types
    """
    events = (
        Event(event_id=i, data=f"Step {i + 1} of 2: ☕", is_last_event=i == 1) for i in range(2)
    )
    example = b"".join(map(to_bytes, events)).decode()
    content = {media_type: {**schema, "example": example}}
    return {200: {"description": "The events, each sent when it is due.", "content": content}}


EVENT_SCHEMA = Event.model_json_schema()
DATA_SCHEMA = {
    "type": "string",
    "contentMediaType": "application/json",
    "contentSchema": EVENT_SCHEMA,
}
SSE_SCHEMA = {
    "type": "object",
    "properties": {"id": {"type": "string"}, "retry": {"type": "integer"}, "data": DATA_SCHEMA},
    "required": ["id", "data"],
}
RESUMABLE: dict[int | str, Any] = {204: {"description": "No event is left after `Last-Event-ID`."}}


@app.get(
    "/text",
    response_class=Response,
    responses=documented(to_text, "text/plain", schema={"type": "string"}),
)
async def text(steps: Steps = 10, interval: Interval = 1.0) -> Response:
    """The events' text, a line each. It cannot be resumed: no id is on the wire to resume by."""
    return stream_after(None, steps, interval, to_text, "text/plain; charset=utf-8")


@app.get(
    "/ndjson",
    response_class=Response,
    responses=documented(to_ndjson, "application/x-ndjson", itemSchema=EVENT_SCHEMA) | RESUMABLE,
)
async def ndjson(
    steps: Steps = 10, interval: Interval = 1.0, last_event_id: LastEventID = None
) -> Response:
    """The events as lines of JSON, for programs."""
    return stream_after(last_event_id, steps, interval, to_ndjson, "application/x-ndjson")


@app.get(
    "/sse",
    response_class=Response,
    responses=documented(to_sse, "text/event-stream", itemSchema=SSE_SCHEMA) | RESUMABLE,
)
async def sse(
    steps: Steps = 10, interval: Interval = 1.0, last_event_id: LastEventID = None
) -> Response:
    """The events as server-sent events, for a browser's `EventSource`."""
    return stream_after(last_event_id, steps, interval, to_sse, "text/event-stream")


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


def quality(accept: str, media_type: str) -> float:
    """How much `Accept` wants a media type, from 0 to 1: its most specific range counts.

    https://www.rfc-editor.org/rfc/rfc9110#section-12.5.1
    """
    qualities = {}
    for item in accept.lower().split(","):
        media_range, *parameters = (part.strip() for part in item.split(";"))
        q = next((value[2:] for value in parameters if value.startswith("q=")), "1")
        qualities[media_range] = float(q) if re.fullmatch(r"[01](\.[0-9]{0,3})?", q) else 0
    ranges = (media_type, media_type.split("/")[0] + "/*", "*/*")
    return next((qualities[name] for name in ranges if name in qualities), 0)


class Index(BaseModel):
    """What `/` tells a program."""

    message: str = "Three streams of the same events."
    streams: list[str] = ["/text", "/ndjson", "/sse"]


@app.get(
    "/",
    response_model=Index,
    responses={
        200: {
            "description": "The page if `Accept` prefers `text/html`, as a browser's does.",
            "content": {"text/html": {"schema": {"type": "string"}}},
        }
    },
)
async def index(request: Request, response: Response) -> Index | FileResponse:
    """The page that shows the streams live; to a program, which streams there are."""
    accept = ",".join(request.headers.getlist("accept"))
    if PAGE.is_dir() and quality(accept, "text/html") > quality(accept, "application/json"):
        return FileResponse(PAGE / "index.html", headers={"Vary": "Accept", **PAGE_HEADERS})
    response.headers["Vary"] = "Accept"
    return Index()


# Windows takes media types from its registry, where another program may have put text/plain.
mimetypes.add_type("text/javascript", ".js")
if PAGE.is_dir():
    app.mount("/page", PageFiles(directory=PAGE))


if __name__ == "__main__":
    uvicorn.run(app, host="127.0.0.1", port=8000)
