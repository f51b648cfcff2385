"""A protocol on uvloop with one timer an event, and next to no HTTP: what the event loop costs.

https://docs.python.org/3/library/asyncio-protocol.html
"""

import asyncio
import sys
from urllib.parse import parse_qs, urlsplit

import uvloop
from events import event_sse

HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"


class Streams(asyncio.Protocol):
    """One connection; a request is expected to arrive in one piece."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        self.transport = transport
        self.loop = asyncio.get_running_loop()
        self.timer: asyncio.Handle | None = None
        self.paused = False

    def data_received(self, data: bytes) -> None:
        query = parse_qs(urlsplit(data.split(b" ", 2)[1].decode()).query)
        self.steps, self.interval = int(query["steps"][0]), float(query["interval"][0])
        self.event_id = 0
        self.transport.write(HEAD)
        self.send_event()

    def send_event(self) -> None:
        event = event_sse(self.event_id, self.steps)
        self.transport.write(b"%x\r\n%b\r\n" % (len(event), event))
        self.event_id += 1
        if self.event_id == self.steps:
            self.transport.write(b"0\r\n\r\n")
        elif not self.paused:
            self.timer = self.loop.call_later(self.interval, self.send_event)

    def pause_writing(self) -> None:
        self.paused = True

    def resume_writing(self) -> None:
        self.paused = False
        if self.event_id < self.steps:
            self.timer = self.loop.call_later(self.interval, self.send_event)

    def connection_lost(self, error: Exception | None) -> None:
        if self.timer:
            self.timer.cancel()


async def main() -> None:
    loop = asyncio.get_running_loop()
    server = await loop.create_server(Streams, "127.0.0.1", int(sys.argv[1]), backlog=2048)
    await server.serve_forever()


if __name__ == "__main__":
    uvloop.run(main())
