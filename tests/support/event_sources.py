"""Many EventSources in one event loop, which write down all that they get.

https://html.spec.whatwg.org/multipage/server-sent-events.html
"""

import asyncio
import random
import socket
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, NamedTuple

import httptools

from tests.support.processes import wait_for

RETRY = 0.2  # seconds from the end of a connection to the next; some more at random


class Event(NamedTuple):
    id: str
    data: str
    name: str = "message"


class EventSource:
    """Reads one stream forever: when a connection ends, it comes back after its last event."""

    def __init__(self, port: int, path: str = "/feed/goals", last_event_id: str = "") -> None:
        self.port, self.path, self.last_event_id = port, path, last_event_id
        self.events: list[Event] = []  # with `gap`s among them
        self.times: list[float] = []  # when they came, in time.monotonic()
        self.comments = 0
        self.retry = 0  # milliseconds, as the server would have it
        self.status = 0  # of the last answer
        self.opened = 0  # answers with 200
        self.cut = 0  # streams without their proper end
        self.connection: Connection | None = None
        self.task: asyncio.Task[None] | None = None

    @property
    def data(self) -> list[str]:
        return [event.data for event in self.events if event.name == "message"]

    @property
    def gaps(self) -> list[str]:
        return [event.data for event in self.events if event.name == "gap"]

    def take(self, event: Event) -> None:
        self.events.append(event)

    def open(self) -> None:
        self.task = asyncio.create_task(self.run())

    async def run(self) -> None:
        loop = asyncio.get_running_loop()
        try:
            while self.status != 204:
                with suppress(OSError):  # nobody listens at the moment
                    _, self.connection = await loop.create_connection(
                        lambda: Connection(self), sock=await self.connect()
                    )
                    await self.connection.ended
                await asyncio.sleep(RETRY * (1 + random.random()))
        finally:  # go away as a process does that ends
            if self.connection:
                self.connection.transport.abort()

    async def connect(self) -> socket.socket:
        connection = socket.socket()
        connection.setblocking(False)
        try:
            await asyncio.get_running_loop().sock_connect(connection, ("127.0.0.1", self.port))
        except BaseException:
            connection.close()
            raise
        return connection


class EventSources:
    """EventSources that read in a thread of their own, while a test does other things."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop

    def open(self, port: int, count: int = 1, **options: Any) -> list[EventSource]:
        """Open so many, and wait until all have been answered."""
        sources = [EventSource(port, **options) for _ in range(count)]
        for source in sources:
            self.loop.call_soon_threadsafe(source.open)
        wait_for(lambda: all(source.status for source in sources), "the readers to be answered")
        return sources

    def close(self, sources: Iterable[EventSource]) -> None:
        tasks = [source.task for source in sources if source.task]
        for task in tasks:
            self.loop.call_soon_threadsafe(task.cancel)
        wait_for(lambda: all(task.done() for task in tasks), "the readers to leave")

    def pause(self, source: EventSource, paused: bool = True) -> None:
        """Let a reader read nothing, or go on."""

        def work() -> None:
            assert source.connection
            transport = source.connection.transport
            if not transport.is_closing():
                transport.pause_reading() if paused else transport.resume_reading()

        self.loop.call_soon_threadsafe(work)

    def reset(self, source: EventSource) -> None:
        """Break its connection, wherever it is; it comes back."""
        if source.connection:
            self.loop.call_soon_threadsafe(source.connection.transport.abort)


@contextmanager
def event_sources() -> Iterator[EventSources]:
    """Readers that have all left, and whose loop is closed, at the end of the block."""
    left = asyncio.Event()
    with asyncio.Runner() as runner:  # at its end it cancels all tasks, and awaits them
        sources = EventSources(runner.get_loop())
        thread = threading.Thread(target=runner.run, args=[left.wait()])
        thread.start()
        try:
            yield sources
        finally:
            sources.loop.call_soon_threadsafe(left.set)
            thread.join()


class Connection(asyncio.Protocol):
    """One request and its answer."""

    def __init__(self, source: EventSource) -> None:
        self.source = source
        self.ended = asyncio.get_running_loop().create_future()
        self.parser = httptools.HttpResponseParser(self)
        self.rest = b""
        self.complete = False

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        self.transport = transport
        request = f"GET {self.source.path} HTTP/1.1\r\nHost: test\r\nAccept-Encoding: gzip\r\n"
        if self.source.last_event_id:
            request += f"Last-Event-ID: {self.source.last_event_id}\r\n"
        transport.write(f"{request}\r\n".encode())

    def data_received(self, data: bytes) -> None:
        self.parser.feed_data(data)

    def on_headers_complete(self) -> None:
        self.source.status = self.parser.get_status_code()
        self.source.opened += self.source.status == 200

    def on_body(self, body: bytes) -> None:
        if self.source.status != 200:
            return
        # The streams that are read here have no other line breaks. A line of NDJSON is an event.
        self.rest = (self.rest + body).replace(b"\r\n", b"\n")
        end = b"\n" if self.rest.startswith(b"{") else b"\n\n"
        *frames, self.rest = self.rest.split(end)
        for frame in frames:
            self.dispatch(frame.decode() if end == b"\n\n" else f"data:{frame.decode()}")

    def dispatch(self, frame: str) -> None:
        name, data = "message", []
        for line in frame.split("\n"):
            field, _, value = line.partition(":")
            value = value.removeprefix(" ")
            if field == "id":
                self.source.last_event_id = value
            elif field == "event":
                name = value
            elif field == "data":
                data.append(value)
            elif field == "retry":
                self.source.retry = int(value)
            elif not field:
                self.source.comments += 1
        if data:
            # Interned: a thousand readers get the same.
            text = sys.intern("\n".join(data))
            self.source.times.append(time.monotonic())
            self.source.take(Event(self.source.last_event_id, text, name))

    def on_message_complete(self) -> None:
        self.complete = True
        self.transport.close()

    def connection_lost(self, error: Exception | None) -> None:
        self.source.cut += self.source.status == 200 and not self.complete
        if not self.ended.done():
            self.ended.set_result(None)
