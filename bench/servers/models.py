"""Apps of bench/answers.py, whose model says what time it is, 30 times a second.

`uvicorn --app-dir bench/servers models:answers`, with the project's root in PYTHONPATH.
"""

import asyncio
import os
import time
from collections.abc import AsyncGenerator
from typing import Any

import httpx2
from fastapi import FastAPI
from fastapi.responses import StreamingResponse
from starlette.types import ASGIApp

INTERVAL = 1 / 30  # seconds
client = httpx2.AsyncClient(limits=httpx2.Limits(max_connections=None), timeout=60)


async def clock(_: Any) -> AsyncGenerator[str]:
    """Yield the time when it is yielded, as `time.perf_counter` has it in all processes."""
    due = time.perf_counter()
    while True:
        due += INTERVAL
        await asyncio.sleep(due - time.perf_counter())
        yield f"{time.perf_counter():.6f} "


def answers() -> ASGIApp:
    from recipes import answers

    setattr(answers, "parrot", clock)  # noqa: B010
    return answers.app


def tokens() -> ASGIApp:
    from recipes import tokens

    setattr(tokens, "parrot", clock)  # noqa: B010
    return tokens.app


def pipe() -> ASGIApp:
    """What is usually written: a StreamingResponse passes on what an upstream sends."""
    app = FastAPI()

    async def passed_on() -> AsyncGenerator[bytes]:
        async with client.stream("POST", os.environ["UPSTREAM"], json={}) as answer:
            async for piece in answer.aiter_raw():
                yield piece

    @app.post("/")
    async def ask() -> StreamingResponse:
        return StreamingResponse(passed_on(), media_type="text/event-stream")

    return app


def upstream() -> ASGIApp:
    app = FastAPI()

    async def events() -> AsyncGenerator[str]:
        async for token in clock(None):
            yield f'data: {{"choices": [{{"delta": {{"content": "{token}"}}}}]}}\n\n'

    @app.post("/")
    async def ask() -> StreamingResponse:
        return StreamingResponse(events(), media_type="text/event-stream")

    return app
