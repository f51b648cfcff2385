"""What others offer for the same stream, each used as its documentation shows: for faults.py.

Each is an app of its own with one endpoint, `/stream?steps=10&interval=1.0`. With END_STREAMS in
the environment, those that can be resumed have `EndStreams` in front.
"""

import asyncio
import json
import logging
import os
from collections.abc import AsyncGenerator, AsyncIterable
from typing import Annotated

from fastapi import FastAPI, Header, Response
from fastapi.responses import StreamingResponse
from fastapi.sse import EventSourceResponse, ServerSentEvent
from sse_starlette import EventSourceResponse as SSEStarletteResponse

from main import EndStreams

logger = logging.getLogger(__name__)

LastEventID = Annotated[int | None, Header()]


async def generate_events(
    first: int, steps: int, interval: float
) -> AsyncGenerator[dict[str, str | int | bool]]:
    """The events of main.py, with a sleep after each, as all their examples have it."""
    event_id = first
    try:
        for event_id in range(first, steps):
            yield {
                "event_id": event_id,
                "data": f"Step {event_id + 1} of {steps}: ☕",
                "is_last_event": event_id == steps - 1,
            }
            await asyncio.sleep(interval)
    finally:
        logger.debug("generator closed at event %d of %d", event_id, steps)


def after(last_event_id: int | None) -> int:
    return 0 if last_event_id is None else last_event_id + 1


sse_starlette = FastAPI()


# Resumed as in its examples/demonstrations/advanced_patterns/error_recovery.py.
@sse_starlette.get("/stream")
async def with_sse_starlette(
    steps: int = 10, interval: float = 1.0, last_event_id: LastEventID = None
) -> Response:
    async def messages() -> AsyncGenerator[dict[str, str]]:
        async for event in generate_events(after(last_event_id), steps, interval):
            yield {"data": json.dumps(event), "id": str(event["event_id"])}

    return SSEStarletteResponse(messages())


event_source_response = FastAPI()


# https://fastapi.tiangolo.com/tutorial/server-sent-events/#resuming-with-last-event-id
@event_source_response.get("/stream", response_class=EventSourceResponse)
async def with_event_source_response(
    steps: int = 10, interval: float = 1.0, last_event_id: LastEventID = None
) -> AsyncIterable[ServerSentEvent]:
    async for event in generate_events(after(last_event_id), steps, interval):
        yield ServerSentEvent(data=event, id=str(event["event_id"]))


streaming_response = FastAPI()


# https://fastapi.tiangolo.com/advanced/custom-response/#streamingresponse shows no way to resume.
@streaming_response.get("/stream")
async def with_streaming_response(steps: int = 10, interval: float = 1.0) -> Response:
    async def lines() -> AsyncGenerator[str]:
        async for event in generate_events(0, steps, interval):
            yield json.dumps(event) + "\n"

    return StreamingResponse(lines(), media_type="application/x-ndjson")


# The same as server-sent events, which can be resumed, and so may be ended early.
sse_by_hand = FastAPI()


@sse_by_hand.get("/stream")
async def with_sse_by_hand(
    steps: int = 10, interval: float = 1.0, last_event_id: LastEventID = None
) -> Response:
    async def frames() -> AsyncGenerator[str]:
        async for event in generate_events(after(last_event_id), steps, interval):
            yield f"id: {event['event_id']}\ndata: {json.dumps(event)}\n\n"

    return StreamingResponse(frames(), media_type="text/event-stream")


if "END_STREAMS" in os.environ:
    for app in (sse_starlette, event_source_response, sse_by_hand):
        app.add_middleware(EndStreams)
