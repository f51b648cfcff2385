"""FastAPI's own EventSourceResponse: https://fastapi.tiangolo.com/tutorial/server-sent-events/"""

import asyncio
from collections.abc import AsyncIterable

from fastapi import FastAPI
from fastapi.sse import EventSourceResponse, ServerSentEvent
from pydantic import BaseModel

app = FastAPI()


class Event(BaseModel):
    event_id: int
    data: str
    is_last_event: bool


@app.get("/sse", response_class=EventSourceResponse)
async def sse(steps: int = 10, interval: float = 1.0) -> AsyncIterable[ServerSentEvent]:
    for event_id in range(steps):
        event = Event(
            event_id=event_id,
            data=f"Step {event_id + 1} of {steps}: ☕",
            is_last_event=event_id == steps - 1,
        )
        yield ServerSentEvent(data=event, id=str(event_id), retry=1000)
        await asyncio.sleep(interval)
