"""The events that all servers of the benchmark send: byte for byte the JSON that main.py sends."""

import asyncio
import json
from collections.abc import AsyncIterator

# One encoder for all: json.dumps would make a new one for each event, because of the arguments.
encode = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode


def event_json(event_id: int, steps: int) -> str:
    """Event `event_id` of `steps`, as JSON."""
    data = f"Step {event_id + 1} of {steps}: ☕"
    return encode({"event_id": event_id, "data": data, "is_last_event": event_id == steps - 1})


def event_sse(event_id: int, steps: int) -> bytes:
    """The same event, as the bytes of a server-sent event."""
    return f"id: {event_id}\nretry: 1000\ndata: {event_json(event_id, steps)}\n\n".encode()


async def generate_sse(steps: int, interval: float) -> AsyncIterator[bytes]:
    """The usual generator: an event, then sleep for the interval."""
    for event_id in range(steps):
        yield event_sse(event_id, steps)
        await asyncio.sleep(interval)
