"""A feed with sse-starlette, and a queue for each reader: https://github.com/sysid/sse-starlette"""

import asyncio
from collections.abc import AsyncIterator
from itertools import count
from typing import Any

from sse_starlette import EventSourceResponse
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

queues: set[asyncio.Queue[dict[str, Any]]] = set()
ids = count(1)


async def publish(request: Request) -> JSONResponse:
    event = {"id": str(next(ids)), "data": (await request.json())["data"]}
    for queue in queues:
        queue.put_nowait(event)
    return JSONResponse({"id": event["id"]}, status_code=201)


async def generate_events() -> AsyncIterator[dict[str, Any]]:
    queue: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
    queues.add(queue)
    try:
        while True:
            yield await queue.get()
    finally:
        queues.discard(queue)


async def feed(request: Request) -> EventSourceResponse:
    return EventSourceResponse(generate_events())


app = Starlette(
    routes=[Route("/feed", feed, methods=["GET"]), Route("/feed", publish, methods=["POST"])]
)
