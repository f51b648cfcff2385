"""Apps of people who use recipes/feed.py for more: `uvicorn --factory tests.support.feed_apps:…`.

Each process calls one function, so each may change `recipes.feed.app`.
"""

import asyncio
import contextvars
from collections.abc import Awaitable, Callable
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.middleware.cors import CORSMiddleware
from fastapi.middleware.gzip import GZipMiddleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from recipes import feed
from recipes.feed import app


def cors() -> ASGIApp:
    app.add_middleware(CORSMiddleware, allow_origins=["*"])
    return app


def gzip() -> ASGIApp:
    app.add_middleware(GZipMiddleware, minimum_size=1)
    return app


async def mark(request: Request, call_next: Callable[..., Awaitable[Response]]) -> Response:
    response = await call_next(request)
    response.headers["X-Mark"] = "seen"
    return response


def http() -> ASGIApp:
    app.middleware("http")(mark)
    return app


def mounted() -> ASGIApp:
    outer = FastAPI()
    outer.mount("/sub", app)
    outer.middleware("http")(mark)
    return outer


def router() -> ASGIApp:
    """None of the recipe's middlewares is there."""
    outer = FastAPI()
    outer.include_router(app.router)
    return outer


reader: contextvars.ContextVar[int] = contextvars.ContextVar("reader")


class Limits:
    """Gives each `send` a time limit, and looks whether it is called where its reader is.

    The second message to a reader whose address has `?last=1` raises instead.
    """

    def __init__(self, inner: ASGIApp) -> None:
        self.inner = inner

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        sent = 0
        reader.set(id(scope))

        async def send_in_time(message: Message) -> None:
            nonlocal sent
            sent += 1
            assert asyncio.current_task()
            assert reader.get() == id(scope)
            if sent == 2 and scope.get("query_string") == b"last=1":
                raise RuntimeError("the middleware failed")
            async with asyncio.timeout(30):
                await send(message)

        await self.inner(scope, receive, send_in_time)


def limits() -> ASGIApp:
    app.add_middleware(Limits)
    return app


def impatient() -> ASGIApp:
    """A channel is forgotten after a tenth of a second."""
    feed.FORGET = 0.1  # type: ignore[assignment]
    return app


APPS: dict[str, Any] = {
    "cors": "",
    "gzip": "",
    "http": "",
    "mounted": "/sub",
    "router": "",
    "limits": "",
}
