"""Apps of people who use main.py's streams for more: `uvicorn --factory tests.support.apps:cors`.

Each process calls one function, so each may change `main.app`. With `INSIDE=1` in the environment
its middleware stands inside of main.py's own, as if it had been added before them.
"""

import asyncio
import os
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator
from typing import Annotated, Any

from fastapi import BackgroundTasks, Depends, FastAPI, Request, Response
from fastapi.middleware.cors import CORSMiddleware
from fastapi.middleware.gzip import GZipMiddleware
from starlette.middleware import Middleware
from starlette.middleware.base import BaseHTTPMiddleware
from starlette.middleware.sessions import SessionMiddleware
from starlette.types import ASGIApp

import main


def add(middleware: Any, **options: Any) -> ASGIApp:
    """Give main.py's app with one more middleware."""
    if os.environ.get("INSIDE"):
        main.app.user_middleware.append(Middleware(middleware, **options))
    else:
        main.app.add_middleware(middleware, **options)
    return main.app


def cors() -> ASGIApp:
    return add(CORSMiddleware, allow_origins=["*"], allow_headers=["*"])


def gzip() -> ASGIApp:
    return add(GZipMiddleware, minimum_size=1)


async def mark(request: Request, call_next: Callable[..., Awaitable[Response]]) -> Response:
    response = await call_next(request)
    response.headers["X-Mark"] = "seen"
    return response


def http() -> ASGIApp:
    """What `@app.middleware("http")` adds."""
    return add(BaseHTTPMiddleware, dispatch=mark)


def count_visits(request: Request) -> None:
    request.session["visits"] = request.session.get("visits", 0) + 1


def sessions() -> ASGIApp:
    """A session, counted in a dependency of a router that carries main.py's streams."""
    app = FastAPI(dependencies=[Depends(count_visits)])
    app.include_router(main.app.router)
    app.add_middleware(SessionMiddleware, secret_key="test")

    @app.get("/visits")
    async def visits(request: Request) -> int:
        return int(request.session["visits"])

    return app


def mounted() -> ASGIApp:
    app = FastAPI()
    app.mount("/sub", main.app)
    app.middleware("http")(mark)
    return app


class Session:
    is_open = True


def open_session() -> Iterator[Session]:
    session = Session()
    yield session
    session.is_open = False
    print("session closed", flush=True)


async def generate(session: Session, steps: int) -> AsyncGenerator[int]:
    for number in range(steps):
        if number == 3:
            await asyncio.sleep(600)
        yield number
    # As of a database: a session that is closed has nothing to say.
    yield 100 if session.is_open else -1


class Numbers(main.Stream):
    media_type = "text/plain"

    def render(self, number: int) -> bytes:
        return f"{number}\n".encode()


class RaiseAt2(Numbers):
    def render(self, number: int) -> bytes:
        return super().render(1 // (2 - number))


def dependency() -> ASGIApp:
    """A dependency with `yield`, a background task, and a stream that raises."""
    app = FastAPI()

    @app.get("/{steps}")
    async def stream(
        steps: int, session: Annotated[Session, Depends(open_session)], tasks: BackgroundTasks
    ) -> Response:
        tasks.add_task(lambda: print("background", session.is_open, flush=True))
        return Numbers(generate(session, steps))

    @app.get("/raises/{steps}")
    async def raises(steps: int, session: Annotated[Session, Depends(open_session)]) -> Response:
        return RaiseAt2(generate(session, steps))

    return app
