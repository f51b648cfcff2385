"""Streams and other responses of every kind behind `EndStreams`, to be stopped in mid-stream.

Each request names its reader, `?reader=`. The log then says `closed READER` when the generator has
run its `finally`, and `ended READER` when the end of the body is sent.
"""

import asyncio
import itertools
import logging
import time
from collections.abc import AsyncGenerator, AsyncIterable, AsyncIterator, Iterator
from contextlib import asynccontextmanager
from typing import Any
from urllib.parse import parse_qs

import anyio
from fastapi import APIRouter, FastAPI, Request, Response, WebSocket
from fastapi.responses import StreamingResponse
from fastapi.sse import EventSourceResponse, ServerSentEvent
from sse_starlette import EventSourceResponse as SSEStarletteResponse
from starlette.middleware.base import BaseHTTPMiddleware
from starlette.middleware.gzip import GZipMiddleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

import main
from main import EndStreams

logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s")
logger = logging.getLogger(__name__)

SSE, NDJSON, DOWNLOAD = "text/event-stream", "application/x-ndjson", "application/octet-stream"


class LogEnds:
    """Outside of everything else, where the server is."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def log_and_send(message: Message) -> None:
            if message["type"] == "http.response.body" and not message.get("more_body"):
                reader = parse_qs(scope["query_string"].decode()).get("reader", ["-"])[0]
                logger.info("ended %s", reader)
            await send(message)

        await self.app(scope, receive, log_and_send)


router = APIRouter()

# Endless streams, of the four kinds ---------------------------------------------------------------


async def events(reader: str, interval: float) -> AsyncGenerator[bytes]:
    try:
        for number in itertools.count():
            yield b"data: %d\n\n" % number
            await asyncio.sleep(interval)
    finally:
        logger.info("closed %s", reader)


def sync_events(interval: float) -> Iterator[bytes]:
    for number in itertools.count():
        yield b"data: %d\n\n" % number
        time.sleep(interval)


@router.get("/streaming")
async def streaming(reader: str, interval: float) -> Response:
    return StreamingResponse(events(reader, interval), media_type=SSE)


@router.get("/sync_streaming")
async def sync_streaming(interval: float) -> Response:
    return StreamingResponse(sync_events(interval), media_type=SSE)


@router.get("/event_source", response_class=EventSourceResponse)
async def event_source(reader: str, interval: float) -> AsyncIterable[ServerSentEvent]:
    async for event in events(reader, interval):
        yield ServerSentEvent(raw_data=event.decode())


@router.get("/sse_starlette")
async def sse_starlette(reader: str, interval: float) -> Response:
    return SSEStarletteResponse(events(reader, interval))


# Streams in special situations --------------------------------------------------------------------


@router.get("/fast")
async def fast() -> Response:
    """More than any reader can take."""

    async def events() -> AsyncGenerator[str]:
        while True:
            yield f"data: {'x' * 10_000}\n\n"

    return StreamingResponse(events(), media_type=SSE)


@router.get("/raises")
async def raises() -> Response:
    async def events() -> AsyncGenerator[str]:
        yield "data: 0\n\n"
        raise RuntimeError("in mid-stream")

    return StreamingResponse(events(), media_type=SSE)


@router.get("/raises_at_last")
async def raises_at_last() -> Response:
    async def events() -> AsyncGenerator[str]:
        try:
            yield "data: 0\n\n"
            await asyncio.sleep(60)
        finally:
            raise RuntimeError("at last")

    return StreamingResponse(events(), media_type=SSE)


@router.get("/slow_to_close")
async def slow_to_close(reader: str) -> Response:
    async def events() -> AsyncGenerator[str]:
        try:
            yield "data: 0\n\n"
            await asyncio.sleep(60)
        finally:
            with anyio.CancelScope(shield=True):  # Starlette cancels each `await` in here
                await asyncio.sleep(1)
            logger.info("closed %s", reader)

    return StreamingResponse(events(), media_type=SSE)


# What is not to be ended --------------------------------------------------------------------------


@router.get("/download")
async def download(media_type: str = DOWNLOAD, interval: float = 0.1) -> Response:
    """30 lines, without a Content-Length."""

    async def lines() -> AsyncGenerator[str]:
        for number in range(30):
            yield f"{number}\n"
            await asyncio.sleep(interval)

    return StreamingResponse(lines(), media_type=media_type)


@router.api_route("/upload", methods=["GET", "POST"])
async def upload(reader: str, request: Request, stream: bool = False) -> Response:
    """Answers when the whole body is there, with its size or with a stream."""
    size = 0
    async for part in request.stream():
        size += len(part)
        logger.info("upload %d", size)
    if stream:
        return StreamingResponse(events(reader, 60), media_type=SSE)
    return Response(f"{size} bytes")


@router.websocket("/echo")
async def echo(websocket: WebSocket) -> None:
    await websocket.accept()
    async for text in websocket.iter_text():
        await websocket.send_text(text)


# The apps -----------------------------------------------------------------------------------------


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    logger.info("lifespan begins")
    yield
    logger.info("lifespan ends")


async def pass_on(request: Request, call_next: Any) -> Any:
    return await call_next(request)


Layer = tuple[Any, dict[str, Any]]  # a middleware and its options


def build(*layers: Layer) -> FastAPI:
    """The app with all of these; the first is the innermost."""
    app = FastAPI(lifespan=lifespan)
    app.include_router(router)
    for middleware, options in layers:
        app.add_middleware(middleware, **options)
    return app


END: Layer = (EndStreams, {})
END_NDJSON: Layer = (EndStreams, {"media_types": (SSE, NDJSON)})
HTTP: Layer = (BaseHTTPMiddleware, {"dispatch": pass_on})
GZIP: Layer = (GZipMiddleware, {})
LOG: Layer = (LogEnds, {})

app = build(END, LOG)
app.mount("/mounted", build())
app.mount("/nested", build(END))
app.mount("/main", main.app)

# Outside of these there is no EndStreams that would help them, and none gets a lifespan.
stacks = build(LOG)
stacks.mount("/end_http", build(END, HTTP))
stacks.mount("/http_end", build(HTTP, END))
stacks.mount("/http_end_http", build(HTTP, END, HTTP))
stacks.mount("/end_end", build(END, END_NDJSON))
stacks.mount("/end_gzip", build(END_NDJSON, GZIP))
stacks.mount("/gzip_end", build(GZIP, END_NDJSON))
