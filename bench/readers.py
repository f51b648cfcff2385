"""The readers that bench/run.py compares. Each yields the events of a stream as dictionaries.

`python bench/readers.py NAME URL` reads one stream to its end, and prints as JSON how many events
came, the seconds from the first to the last, and the seconds of CPU in that time.
"""

import asyncio
import json
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import aiohttp
import httpx
import requests
from httpx_sse import connect_sse

sys.path.append(str(Path(__file__).parent.parent))  # the clients
import client_async
import client_sync


def requests_iter_lines(url: str) -> Iterator[Any]:
    with requests.get(url, stream=True) as response:
        for line in response.iter_lines():
            yield json.loads(line)


async def aiohttp_readline(url: str) -> AsyncIterator[Any]:
    async with aiohttp.ClientSession() as session, session.get(url) as response:
        while line := await response.content.readline():
            yield json.loads(line)


def httpx_sse(url: str) -> Iterator[Any]:
    with httpx.Client() as client, connect_sse(client, "GET", url) as source:
        for event in source.iter_sse():
            yield event.json()


# The name of each, what it reads, and the function.
Reader = Callable[[str], Iterator[Any] | AsyncIterator[Any]]
READERS: dict[str, tuple[str, Reader]] = {
    "client_sync.read_events": ("ndjson", client_sync.read_events),
    "client_async.read_events": ("ndjson", client_async.read_events),
    "requests iter_lines": ("ndjson", requests_iter_lines),
    "aiohttp readline": ("ndjson", aiohttp_readline),
    "httpx-sse": ("sse", httpx_sse),
}


class Timer:
    """Counts the events, checks that none is missing, and takes the time."""

    def __init__(self) -> None:
        self.count = 0
        self.start = self.cpu_start = 0.0

    def event(self, event: Mapping[str, Any]) -> None:
        if not self.count:
            self.start, self.cpu_start = time.perf_counter(), time.process_time()
        if event["event_id"] != self.count:
            raise SystemExit(f"event {event['event_id']} where {self.count} was expected")
        self.count += 1

    def result(self) -> dict[str, float]:
        seconds = time.perf_counter() - self.start
        return {
            "events": self.count,
            "seconds": seconds,
            "cpu": time.process_time() - self.cpu_start,
        }


def main() -> None:
    _, name, url = sys.argv
    events = READERS[name][1](url)
    timer = Timer()

    async def read(events: AsyncIterator[Any]) -> None:
        async for event in events:
            timer.event(event)

    if isinstance(events, AsyncIterator):
        asyncio.run(read(events))
    else:
        for event in events:
            timer.event(event)
    print(json.dumps(timer.result()))


if __name__ == "__main__":
    main()
