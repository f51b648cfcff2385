"""Streams of all kinds in `main.Stream`, as apps of other people build them.

`uvicorn tests.support.stream_apps:app`. Each generator prints `closed NAME` when its `finally` has
awaited something and gone on.
"""

import asyncio
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine, Generator
from contextlib import suppress
from typing import Any

import anyio
from fastapi import FastAPI, Request, Response, WebSocket
from fastapi.routing import APIRoute
from starlette.background import BackgroundTask
from starlette.middleware import Middleware
from starlette.middleware.base import BaseHTTPMiddleware
from starlette.routing import Mount, Route
from starlette.types import ASGIApp, Receive, Scope, Send

from main import EndStreams, Stream


async def generate(name: str) -> AsyncGenerator[str]:
    """One chunk, and then what the name says."""
    try:
        yield f"{name}\n"
        if name == "raises":
            raise ZeroDivisionError
        if name == "never_awaits":
            while True:
                yield "x" * 10_000
        while name == "swallows":  # as asyncio.wait_for() of Python 3.11 does now and then
            with suppress(asyncio.CancelledError):
                await asyncio.sleep(0.01)
            yield "x"
        if name != "ends":
            await asyncio.sleep(600)
    finally:
        for _ in range(3):  # as `await connection.close()`, which may need several turns
            await asyncio.sleep(0.01)
        print(f"closed {name}", flush=True)


def generate_in_a_thread(name: str) -> Generator[str]:
    try:
        while True:
            yield f"{name}\n"
            time.sleep(0.5)
    finally:
        time.sleep(0.1)  # a cleanup that blocks must not stop the event loop
        print(f"closed {name}", flush=True)


class LoggingRoute(APIRoute):
    """FastAPI's documented way to do something with each response: a custom `route_class`."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handler = super().get_route_handler()

        async def logged(request: Request) -> Response:
            response = await handler(request)
            assert isinstance(response, Stream)
            iterator = response.body_iterator

            async def counted() -> AsyncGenerator[Any]:
                size = 0
                try:
                    async for chunk in iterator:
                        size += len(chunk)
                        yield chunk if isinstance(chunk, str) else bytes(chunk).decode()
                finally:
                    print(f"sent {response.status_code} {size}", flush=True)

            response.body_iterator = counted()
            return response

        return logged


class TimeLimit:
    """A middleware that gives the app some time, with AnyIO, as many do."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope.get("path") != "/stream/time_limit":
            await self.app(scope, receive, send)
            return
        with anyio.move_on_after(0.5):
            await self.app(scope, receive, send)
        print("time is up", flush=True)


class RepeatBody:
    """A middleware that has read the body, and answers with it whenever the app asks."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def repeat() -> Any:
            return {"type": "http.request", "body": b"", "more_body": False}

        await self.app(scope, repeat if scope.get("path") == "/repeated" else receive, send)


app = FastAPI()
app.add_middleware(EndStreams, media_types=("Text/Plain; charset=utf-8",))
app.add_middleware(TimeLimit)
app.add_middleware(RepeatBody)


@app.get("/stream/{name}", response_class=Stream)
async def stream(name: str) -> Stream:
    return Stream(generate(name), media_type="text/plain")


@app.get("/sync/{name}", response_class=Stream)
def sync_stream(name: str) -> Stream:
    return Stream(generate_in_a_thread(name), media_type="text/plain")


@app.get("/begun/{name}", response_class=Stream)
async def begun(name: str, request: Request) -> Stream:
    """Look at the first chunk, to choose the status; meanwhile the reader leaves."""
    chunks = generate(name)
    print("first", await anext(chunks), end="", flush=True)
    while not await request.is_disconnected():  # noqa: ASYNC110
        await asyncio.sleep(0.01)
    return Stream(chunks, media_type="text/plain")


@app.get("/options", response_class=Stream)
async def options() -> Stream:
    background = BackgroundTask(print, "background", flush=True)
    headers = {"X-Own": "1", "cache-control": "private"}
    return Stream(generate("ends"), 203, headers, "text/plain", background)


@app.get("/repeated", response_class=Stream)
async def repeated() -> Stream:
    return Stream(generate("ends"), media_type="text/plain")


class Cursor:
    """Two rows, and then the end."""

    def __init__(self) -> None:
        self.rows = 2

    def __aiter__(self) -> "Cursor":
        return self

    async def __anext__(self) -> str:
        self.rows -= 1
        if self.rows < 0:
            raise StopAsyncIteration
        return "row\n"

    async def close(self) -> None:
        pass


@app.get("/cursor", response_class=Stream)
async def cursor() -> Stream:
    return Stream(Cursor(), media_type="text/plain")


@app.websocket("/refused")
async def refused(websocket: WebSocket) -> None:
    await websocket.send_denial_response(Stream(generate("ends"), 403, media_type="text/plain"))


app.router.route_class = LoggingRoute


@app.get("/logged/{name}", response_class=Stream)
async def logged(name: str) -> Stream:
    return Stream(generate(name), media_type="text/plain")


# Below a mount with a middleware, and as a plain route of Starlette's -----------------------------


async def mark(request: Request, call_next: Callable[..., Awaitable[Response]]) -> Response:
    response = await call_next(request)
    response.headers["X-Mark"] = "seen"
    return response


async def plain(request: Request) -> Response:
    return Stream(generate(request.path_params["name"]), media_type="text/plain")


routes = [Route("/{name}", plain)]
app.add_route("/plain/{name}", plain)
marked = [Middleware(BaseHTTPMiddleware, dispatch=mark)]
app.router.routes.append(Mount("/mount", routes=routes, middleware=marked))
