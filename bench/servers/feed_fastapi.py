"""A feed with FastAPI's StreamingResponse, and a queue for each reader."""

import asyncio
from collections.abc import AsyncIterator
from itertools import count

from fastapi import FastAPI
from fastapi.responses import StreamingResponse
from pydantic import BaseModel

queues: set[asyncio.Queue[bytes]] = set()
ids = count(1)


class Event(BaseModel):
    data: str


app = FastAPI()


@app.post("/feed", status_code=201)
async def publish(event: Event) -> dict[str, int]:
    event_id = next(ids)
    frame = f"id: {event_id}\ndata: {event.data}\n\n".encode()
    for queue in queues:
        queue.put_nowait(frame)
    return {"id": event_id}


async def generate_events() -> AsyncIterator[bytes]:
    queue: asyncio.Queue[bytes] = asyncio.Queue()
    queues.add(queue)
    try:
        while True:
            yield await queue.get()
    finally:
        queues.discard(queue)


@app.get("/feed")
async def feed() -> StreamingResponse:
    return StreamingResponse(generate_events(), media_type="text/event-stream")
