"""Apps that show what recipes/README.md says of FastAPI and Starlette.

Nothing is collected as garbage here until somebody asks for it: what is closed was closed.
"""

import asyncio
import gc
import os
import time
from collections.abc import AsyncGenerator, AsyncIterable, Generator, Iterable, Iterator
from pathlib import Path
from typing import Annotated

import anyio.to_thread
from fastapi import APIRouter, Depends, FastAPI, Header, HTTPException
from fastapi.responses import StreamingResponse
from fastapi.sse import EventSourceResponse, ServerSentEvent
from pydantic import BaseModel
from starlette.background import BackgroundTask

from recipes import basics, fastapi_sse

gc.disable()
router = APIRouter()


def note(text: str) -> None:
    print(text, flush=True)


@router.get("/collect")
async def collect() -> int:
    return gc.collect()


# Sync and async -----------------------------------------------------------------------------------

# Streams that wait until this file is there.
RELEASE = Path(os.environ.get("RELEASE", "/nonexistent"))


def wait(_: float) -> None:
    """In place of `time.sleep`."""
    while not RELEASE.exists():
        time.sleep(0.02)


def sync_chunks() -> Generator[str]:
    wait(1)
    yield "released\n"


running = 0


async def async_chunks() -> AsyncGenerator[str]:
    global running
    running += 1
    while not await anyio.Path(RELEASE).exists():  # noqa: ASYNC110 (another process)
        await asyncio.sleep(0.05)
    yield "released\n"


@router.get("/wait/sync")
async def wait_sync() -> StreamingResponse:
    return StreamingResponse(sync_chunks())


@router.get("/wait/async")
async def wait_async() -> StreamingResponse:
    return StreamingResponse(async_chunks())


@router.get("/wait")
async def waiting() -> dict[str, int]:
    """How many steps of sync generators run, how many wait for a thread; how many async run."""
    threads = anyio.to_thread.current_default_thread_limiter().statistics()
    return {"run": threads.borrowed_tokens, "wait": threads.tasks_waiting, "run_async": running}


# What is closed when the reader goes away -----------------------------------------------------


def endless() -> Generator[str]:
    try:
        while True:
            yield "chunk\n"
            time.sleep(0.1)
    finally:
        note("generator closed")


@router.get("/left-alone")
async def left_alone() -> StreamingResponse:
    return StreamingResponse(endless(), background=BackgroundTask(note, "resource closed"))


def resource() -> Iterator[None]:
    try:
        yield
    finally:
        note("resource closed")


@router.get("/sync", response_class=EventSourceResponse)
def sync_events(_: Annotated[None, Depends(resource)]) -> Iterable[str]:
    yield from endless()


@router.get("/async", response_class=EventSourceResponse)
async def async_events(_: Annotated[None, Depends(resource)]) -> AsyncIterable[str]:
    """More than any buffer holds, so that the generator waits for a slow reader."""
    try:
        while True:
            yield "x" * 100_000
    finally:
        note("generator closed")


# What FastAPI makes of errors ---------------------------------------------------------------------


@router.get("/raises", response_class=EventSourceResponse)
async def raises() -> AsyncIterable[ServerSentEvent]:
    raise HTTPException(403)
    yield


@router.get("/wrong-type", response_class=EventSourceResponse)
async def wrong_type() -> AsyncIterable[int]:
    yield 1
    yield "two"  # type: ignore[misc]


@router.get("/int")
async def int_header(last_event_id: Annotated[int, Header()]) -> int:
    return last_event_id


class Body(BaseModel):
    names: list[str]


@router.post("/body")
async def body(body: Body) -> Body:
    return body


app = FastAPI()
app.include_router(router)


# The recipes, with a note when something is closed --------------------------------------------

chunks, percentages = basics.chunks, basics.percentages


def noted_chunks() -> Generator[str]:
    try:
        yield from chunks()
    finally:
        note("chunks closed")


async def noted_percentages() -> AsyncGenerator[str]:
    try:
        async for percentage in percentages():
            yield percentage
    finally:
        note("percentages closed")


def noted_catalogue() -> Iterator[list[fastapi_sse.Item]]:
    yield fastapi_sse.ITEMS
    note("catalogue closed")


basics.chunks, basics.percentages = noted_chunks, noted_percentages
basics_app = basics.app
fastapi_sse.app.dependency_overrides[fastapi_sse.catalogue] = noted_catalogue
fastapi_sse_app = fastapi_sse.app
