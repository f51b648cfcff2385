"""sse-starlette, as its README shows it: https://github.com/sysid/sse-starlette"""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

from events import event_json
from sse_starlette import EventSourceResponse
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.routing import Route


async def generate_events(steps: int, interval: float) -> AsyncIterator[dict[str, Any]]:
    for event_id in range(steps):
        yield {"id": str(event_id), "retry": 1000, "data": event_json(event_id, steps)}
        await asyncio.sleep(interval)


async def sse(request: Request) -> EventSourceResponse:
    query = request.query_params
    return EventSourceResponse(generate_events(int(query["steps"]), float(query["interval"])))


app = Starlette(routes=[Route("/sse", sse)])
