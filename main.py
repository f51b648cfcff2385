"""Three ways to stream over HTTP from Python: plain text, NDJSON and server-sent events.

Run `uvicorn main:app --reload`, then open http://localhost:8000 or run `python client.py`.
Sections 2 and 4 have their own imports, so that you can copy each into a file of its own.
"""

import asyncio
import logging
import math
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Annotated, Any

import uvicorn
from fastapi import FastAPI, Header, Query, Request, Response
from fastapi.staticfiles import StaticFiles
from pydantic import BaseModel

logger = logging.getLogger(__name__)


# 1. The events ------------------------------------------------------------------------------------
class Event(BaseModel):
    """What all three streams carry. `is_last_event` tells the end of a stream from a cut."""

    event_id: int  # from 0
    data: str
    is_last_event: bool


async def generate_events(first: int, steps: int, interval: float) -> AsyncGenerator[Event]:
    """Yield the events `first` to `steps - 1`. Event k is due k × interval after the first."""
    start, event_id = asyncio.get_running_loop().time(), first
    try:
        for event_id in range(first, steps):
            await sleep_until(start + (event_id - first) * interval)
            # The cup is three bytes of UTF-8, and a chunk of 16 bytes ends in the middle of it.
            data = f"Step {event_id + 1} of {steps}: ☕"
            yield Event(event_id=event_id, data=data, is_last_event=event_id == steps - 1)
    finally:
        # However the stream ends, this runs at once. Release here what the stream used.
        logger.debug("generator closed at event %d of %d", event_id, steps)


TICK = 0.002  # Events due in the same tick share a timer: separate timers cost a third of the CPU.
_ticks: dict[tuple[asyncio.AbstractEventLoop, int], asyncio.Event] = {}


async def sleep_until(due: float) -> None:
    """Sleep until the event loop's clock shows `due` (in seconds), or up to 2 ms longer."""
    loop = asyncio.get_running_loop()
    if due > loop.time():
        tick = loop, math.ceil(due / TICK)
        if (event := _ticks.get(tick)) is None:
            event = _ticks[tick] = asyncio.Event()
            loop.call_at(tick[1] * TICK, lambda: _ticks.pop(tick).set())
        await event.wait()


# 2. The response ----------------------------------------------------------------------------------
import asyncio
from collections.abc import AsyncGenerator, AsyncIterable
from contextlib import aclosing, suppress
from typing import Any

import anyio
from starlette.concurrency import iterate_in_threadpool, run_in_threadpool
from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

# Without them a cache replays a stream, HAProxy compresses it, nginx with `gzip on` holds it back.
HEADERS = {"Cache-Control": "no-cache, no-transform", "X-Accel-Buffering": "no"}


class Stream(StreamingResponse):
    """A `StreamingResponse` that closes its generator at once, however the stream ends.

    When the generator ends or raises, its reader leaves, the server stops or the task is cancelled,
    its `finally` runs, and may `await`. (Starlette cancels a cleanup at its first `await`.)
    `content` yields bytes, text, or what a subclass turns into bytes in `render`. A sync generator
    may block: it runs in threads. The arguments are those of `StreamingResponse`.
    """

    def __init__(self, content: Any, status_code: int = 200, *args: Any, **options: Any) -> None:
        self.content, self.rendered, self.over = content, self.render_each(content), False
        super().__init__(self.rendered, status_code, *args, **options)
        for name, value in HEADERS.items():
            self.headers.setdefault(name, value)

    async def render_each(self, content: Any) -> AsyncGenerator[bytes | memoryview]:
        is_async, count = isinstance(content, AsyncIterable), 0
        try:
            async for chunk in content if is_async else iterate_in_threadpool(content):
                yield self.render(chunk)
                if (count := count + 1) % 64 == 0:
                    await asyncio.sleep(0)  # a generator that never awaits would block all others
        finally:
            await self.aclose()

    async def aclose(self) -> None:
        content, self.content = self.content, ()  # closed once
        while getattr(content, "gi_running", False):  # noqa: ASYNC110  # it runs in a thread
            await asyncio.sleep(0.01)
        if hasattr(content, "aclose"):
            await content.aclose()
        elif not isinstance(content, AsyncIterable) and hasattr(content, "close"):
            await run_in_threadpool(content.close)

    async def stream_response(self, send: Send) -> None:
        start = {"type": "http.response.start", "status": self.status_code}
        async with aclosing(self), aclosing(self.rendered):
            await send(start | {"headers": self.raw_headers})
            async for chunk in self.body_iterator:  # a library may have wrapped it
                body = chunk.encode() if isinstance(chunk, str) else chunk
                await send({"type": "http.response.body", "body": body, "more_body": True})
                if self.over:  # the generator swallowed the cancellation
                    raise asyncio.CancelledError
            await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send in one task and listen in another: only `receive` says that the reader has left."""
        if scope["type"] == "websocket":  # a WebSocket is refused with this response
            await super().__call__(scope, receive, send)
            return
        sender = asyncio.create_task(self.stream_response(send))
        with suppress(TimeoutError):
            async with asyncio.timeout(None) as until_sent:
                sender.add_done_callback(lambda _: None if self.over else until_sent.reschedule(0))
                try:
                    await asyncio.sleep(0)  # it begins, or it could not close the generator
                    while (await receive())["type"] != "http.disconnect":  # noqa: ASYNC110
                        await asyncio.sleep(0)  # some middlewares repeat the request's body forever
                finally:
                    self.over = True
                    sender.cancel()
                    # If AnyIO cancelled this task (a middleware's timeout), waiting needs a shield.
                    with anyio.CancelScope(shield=True):
                        await asyncio.wait([sender])
        if not sender.cancelled():
            sender.result()  # raises what the generator raised
        if self.background is not None:
            await self.background()


# 3. The three formats -----------------------------------------------------------------------------
class TextStream(Stream):
    """The text of each event, one per line: easy to print, but without event ids."""

    media_type = "text/plain"

    def render(self, event: Event) -> bytes:
        return f"{event.data}\n".encode()


class NDJSONStream(Stream):
    """One line of JSON per event: https://github.com/ndjson/ndjson-spec."""

    media_type = "application/x-ndjson"

    def render(self, event: Event) -> bytes:
        return f"{event.model_dump_json()}\n".encode()


class SSEStream(Stream):
    """For a browser's `EventSource`, which reconnects after `retry` ms and sends the last `id`.

    https://html.spec.whatwg.org/multipage/server-sent-events.html#event-stream-interpretation
    """

    media_type = "text/event-stream"

    def init_headers(self, headers: Any = None) -> None:  # without Starlette's "; charset=utf-8"
        super().init_headers({"Content-Type": self.media_type, **(headers or {})})

    def render(self, event: Event) -> bytes:
        data = event.model_dump_json()
        return f"id: {event.event_id}\nretry: 1000\ndata: {data}\n\n".encode()


# 4. When the server is asked to stop --------------------------------------------------------------
import asyncio
import functools
import signal
from contextlib import suppress
from typing import Any, ClassVar
from weakref import WeakKeyDictionary


class EndStreams:
    """Ends open streams properly when the server is asked to stop: on Ctrl-C, SIGTERM, `--reload`.

    uvicorn first waits for all open connections. Only then does it tell the app that it stops:
    https://github.com/encode/uvicorn/issues/451. So this sends each open stream `http.disconnect`,
    as if its reader had left, and cancels an app that ignores it. Then it adds the end of the body.
    It ends only event streams that answer a GET, because their readers reconnect and resume.
    Downloads and answers to a POST are left alone: ended early, they would look complete.
    """

    _stopping: ClassVar[WeakKeyDictionary[Any, bool]] = WeakKeyDictionary()  # by event loop
    _open: ClassVar[set["_Exchange"]] = set()

    def __init__(
        self, app: Any, methods: Any = ("GET",), media_types: Any = ("text/event-stream",)
    ) -> None:
        self.app, self.methods = app, ("HEAD", *methods)
        self.media_types = [t.lower().partition(";")[0].strip().encode() for t in media_types]

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        loop = asyncio.get_running_loop()
        if scope["type"] == "lifespan" or loop not in self._stopping:
            self._stopping[loop] = False  # a server starts, perhaps not the first on this loop
            self._watch(loop)
        if scope["type"] != "http" or scope.get("method", "GET") not in self.methods:
            await self.app(scope, receive, send)
            return
        exchange = _Exchange(self, receive, send)
        try:
            async with exchange.running:
                await self.app(scope, exchange.receive, exchange.send)
        except TimeoutError:
            if not exchange.running.expired():
                raise
        finally:
            self._open.discard(exchange)
        if exchange.ended and exchange.owes_end:
            await send({"type": "http.response.body"})

    @staticmethod
    def stop(handler: Any = None, *args: object) -> None:
        """End all streams of this process. Call it before you stop a server in a thread."""
        EndStreams._stopping.update(dict.fromkeys(EndStreams._stopping, True))
        for exchange in list(EndStreams._open):
            with suppress(RuntimeError):  # its loop is closed
                exchange.loop.call_soon_threadsafe(exchange.end)
        if handler:
            handler(*args)

    @staticmethod
    def _watch(loop: asyncio.AbstractEventLoop, server: Any = None) -> None:
        """Ten times a second, wrap new signal handlers, so that they call `stop` first."""
        for signum in (signal.SIGINT, signal.SIGTERM):
            chain: list[Any] = [handler := signal.getsignal(signum)]
            while isinstance(chain[-1], functools.partial) and chain[-1].args:
                chain.append(chain[-1].args[0])  # copies of this class wrap one another's handler
            is_ours = EndStreams.stop in [getattr(each, "func", None) for each in chain]
            owner = getattr(getattr(chain[-1], "func", chain[-1]), "__self__", None)
            server = owner if hasattr(owner, "should_exit") else server
            # Python's own handler and that of asyncio.run() do not stop a server.
            no_server = handler is signal.default_int_handler or isinstance(owner, asyncio.Runner)
            if callable(handler) and not no_server and not is_ours:
                with suppress(ValueError):  # Python lets only the main thread set a handler
                    signal.signal(signum, functools.partial(EndStreams.stop, handler))
        # uvicorn's `Server` also stops without a signal, as for `--limit-max-requests`.
        if server and server.started and not any(each.is_serving() for each in server.servers):
            EndStreams.stop()
        else:
            loop.call_later(0.1, EndStreams._watch, loop, server)


class _Exchange:
    """A request and its response, between the server and the app that `EndStreams` wraps."""

    def __init__(self, middleware: EndStreams, receive: Any, send: Any) -> None:
        self.middleware, self._receive, self._send = middleware, receive, send
        self.loop, self.running = asyncio.get_running_loop(), asyncio.timeout(None)
        self.task = asyncio.current_task()
        self.receiving: set[asyncio.Timeout] = set()  # one for each task that waits in `receive`
        self.ended = self.owes_end = self.silent = False

    def end(self) -> None:
        if self in EndStreams._open:  # not over yet, and not ended before
            EndStreams._open.discard(self)
            self.ended = True
            for waiting in self.receiving:
                waiting.reschedule(0)
            self.running.reschedule(self.loop.time() + 0.2)  # cancel it unless it calls receive

    async def receive(self) -> Any:
        if not self.ended:
            with suppress(TimeoutError):
                async with asyncio.timeout(None) as waiting:
                    self.receiving.add(waiting)
                    try:
                        return await self._receive()
                    finally:
                        self.receiving.discard(waiting)
        with suppress(RuntimeError):  # the app has returned, but one of its tasks still listens
            # Another task may only set a flag, as Falcon's does: the app sees it one event later.
            own = asyncio.current_task() is self.task
            self.running.reschedule(None if own else self.loop.time() + 1)
        return {"type": "http.disconnect"}

    async def send(self, message: Any) -> None:
        if message["type"] == "http.response.body":
            self.owes_end &= self.silent or message.get("more_body", False)
        elif message["type"] == "http.response.start" and self.ended:
            self.silent = True  # the MCP SDK answers again after a disconnect
        elif message["type"] == "http.response.start":
            # ASGI requires header names in lower case; Django's are not.
            headers = {name.lower(): value for name, value in message.get("headers", ())}
            media_type = headers.get(b"content-type", b"").partition(b";")[0].strip().lower()
            if media_type in self.middleware.media_types and b"content-length" not in headers:
                # A compressed body is cut off: only its compressor could write the end.
                self.owes_end = b"content-encoding" not in headers
                EndStreams._open.add(self)
                if EndStreams._stopping[self.loop]:
                    self.end()
        if not self.silent:
            await self._send(message)


# 5. The endpoints ---------------------------------------------------------------------------------
Steps = Annotated[int, Query(ge=1, le=100_000, description="How many events there are.")]
# 10 seconds are below the idle timeouts of the usual proxies (30 to 60): no keep-alive is needed.
Interval = Annotated[float, Query(ge=0, le=10, allow_inf_nan=False, description="In seconds.")]
LastID = Annotated[str, Header(pattern="^[0-9]{0,4300}$", description="Resume after this event.")]
NOTHING_LEFT: Any = {204: {"description": "No event is left after `Last-Event-ID`."}}
EACH_AN_OBJECT = {200: {"content": {SSEStream.media_type: {"schema": {"type": "object"}}}}}

app = FastAPI(title="Streaming over HTTP")
MEDIA_TYPES = tuple(each.media_type for each in (TextStream, NDJSONStream, SSEStream))
app.add_middleware(EndStreams, media_types=MEDIA_TYPES)


def stream_after(last_event_id: str, steps: int, interval: float, form: type[Stream]) -> Response:
    """Answer with the events after `last_event_id`, or with 204 if none is left."""
    first = int(last_event_id) + 1 if last_event_id else 0  # int() reads up to 4300 digits
    if first >= steps:
        # An `EventSource` reconnects after every end of a stream, until it gets a 204. Without the
        # headers, a cache could send this 204 to a new reader (RFC 9110, section 15.3.5).
        return Response(status_code=204, headers=HEADERS)
    return form(generate_events(first, steps, interval))


@app.get("/text", response_class=TextStream)
async def text(steps: Steps = 10, interval: Interval = 1) -> Response:
    """The text of each event, one per line. It cannot be resumed, because it has no event ids."""
    return stream_after("", steps, interval, TextStream)


@app.get("/ndjson", response_class=NDJSONStream, responses=NOTHING_LEFT)
async def ndjson(steps: Steps = 10, interval: Interval = 1, last_event_id: LastID = "") -> Response:
    """The events as lines of JSON, for programs."""
    return stream_after(last_event_id, steps, interval, NDJSONStream)


@app.get("/sse", response_class=SSEStream, responses=NOTHING_LEFT | EACH_AN_OBJECT)
async def sse(steps: Steps = 10, interval: Interval = 1, last_event_id: LastID = "") -> Response:
    """The events as server-sent events, for a browser's `EventSource`."""
    return stream_after(last_event_id, steps, interval, SSEStream)


# 6. The page --------------------------------------------------------------------------------------
class PageFiles(StaticFiles):
    def file_response(self, *args: Any, **options: Any) -> Response:
        response = super().file_response(*args, **options)
        policy = "default-src 'self'; base-uri 'none'; frame-ancestors 'none'"
        safe = {"Content-Security-Policy": policy, "X-Content-Type-Options": "nosniff"}
        response.headers.update(safe | {"Cache-Control": "no-cache", "Vary": "Accept"})
        return response


PAGE = Path(__file__).resolve().parent / "page"
page = PageFiles(directory=PAGE, check_dir=False)
if PAGE.is_dir():
    app.mount("/page", page)


@app.get("/", include_in_schema=False)
async def index(request: Request, response: Response) -> Any:
    if "text/html" in request.headers.get("accept", "") and PAGE.is_dir():
        return await page.get_response("index.html", request.scope)
    response.headers["Vary"] = "Accept"
    return {"message": "The same events in three formats.", "streams": ["/text", "/ndjson", "/sse"]}


if __name__ == "__main__":
    uvicorn.run(app)
