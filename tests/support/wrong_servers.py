"""Servers that answer wrongly on purpose, and the clients to try on them.

A server sends exactly the bytes that a test gives it. A test writes the answer as a function that
is called in a thread for each connection, with the `Connection` to answer on. What it sends is on
the wire at once, and when it returns the connection is closed.
"""

import asyncio
import importlib.util
import json
import socket
import struct
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from tests.support.processes import LIMIT, ROOT

STREAM = b"HTTP/1.1 200 OK\r\nContent-Type: application/x-ndjson\r\n"
CHUNKED = STREAM + b"Transfer-Encoding: chunked\r\n\r\n"
CLOSED = (
    b"HTTP/1.0 200 OK\r\nContent-Type: application/x-ndjson\r\n\r\n"  # ends with the connection
)
GZIPPED = STREAM + b"Content-Encoding: gzip\r\nTransfer-Encoding: chunked\r\n\r\n"
END = b"0\r\n\r\n"

LINE_READERS = ["client_sync", "client_async"]
CLIENTS = ["client", *LINE_READERS]
all_clients = pytest.mark.parametrize("client", CLIENTS)
both_line_readers = pytest.mark.parametrize("client", LINE_READERS)


def chunk(data: bytes) -> bytes:
    """`data` as one chunk of a chunked body."""
    return b"%x\r\n%s\r\n" % (len(data), data)


def event(event_id: int, steps: int = 10, data: str = "☕") -> bytes:
    """An event as /ndjson sends it."""
    fields = {"event_id": event_id, "data": data, "is_last_event": event_id == steps - 1}
    return json.dumps(fields, ensure_ascii=False).encode() + b"\n"


def events(first: int, stop: int, steps: int = 10) -> bytes:
    """The events from `first` up to, but without, `stop`, of a stream of `steps`."""
    return b"".join(event(i, steps) for i in range(first, stop))


ALL = list(range(10))  # the ids of the events in WHOLE
WHOLE = CHUNKED + chunk(events(0, 10)) + END


def error(status: str, body: bytes = b"it is broken", headers: bytes = b"") -> bytes:
    """A whole answer that is no stream."""
    return b"HTTP/1.1 %s\r\nContent-Length: %d\r\n%s\r\n%s" % (
        status.encode(),
        len(body),
        headers + b"Connection: close\r\n",
        body,
    )


class Gzip:
    """Compresses as a server does that keeps its stream live: each piece can be read at once."""

    def __init__(self) -> None:
        self.compressor = zlib.compressobj(wbits=31)

    def __call__(self, data: bytes) -> bytes:
        return self.compressor.compress(data) + self.compressor.flush(zlib.Z_SYNC_FLUSH)


class Connection:
    """One connection of a client, with its request already read."""

    def __init__(self, server: "WrongServer", connection: socket.socket) -> None:
        self.server = server
        self.socket = connection
        self.closed = False  # by the client, as `wait_until_closed` saw it
        head = b""
        while b"\r\n\r\n" not in head:
            data = connection.recv(65536)
            if not data:
                raise ConnectionError("the client sent no request")
            head += data
        self.time = time.monotonic()
        request, *lines = head.decode("latin-1").split("\r\n\r\n")[0].split("\r\n")
        self.path = request.split()[1]
        self.headers = dict(line.lower().split(": ", 1) for line in lines)
        server.connections.append(self)
        self.number = len(server.connections)  # from 1

    @property
    def first(self) -> int:
        """The event with which the client wants to begin."""
        return int(self.headers.get("last-event-id", -1)) + 1

    def send(self, data: bytes) -> None:
        self.socket.sendall(data)

    def reset(self) -> None:
        """Close with RST, as the kernel of a process that was killed does with unread data."""
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.socket.close()

    def wait_until_closed(self) -> None:
        """Stay open and silent until the client goes away."""
        self.socket.settimeout(LIMIT)
        try:
            self.closed = self.socket.recv(1) == b""
        except ConnectionResetError:
            self.closed = True


Answer = Callable[[Connection], None]


class WrongServer:
    """Listens on a port of its own; `connections` holds every request that it got, in order."""

    def __init__(self, answer: Answer) -> None:
        self.answer = answer
        self.connections: list[Connection] = []
        self.listener = socket.create_server(("127.0.0.1", 0), backlog=100)
        self.url = f"http://127.0.0.1:{self.listener.getsockname()[1]}/ndjson"

    def listen(self) -> None:
        while True:
            try:
                connection, _ = self.listener.accept()
            except OSError:  # the test is over
                return
            threading.Thread(target=self.serve, args=[connection], daemon=True).start()

    def serve(self, connection: socket.socket) -> None:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        with connection:
            try:
                self.answer(Connection(self, connection))
            except OSError:  # the client went away first
                return


@contextmanager
def wrong_server(answer: Answer | bytes) -> Iterator[WrongServer]:
    """Run a server that gives this answer, on each connection."""
    if isinstance(answer, bytes):
        data = answer
        server = WrongServer(lambda connection: connection.send(data))
    else:
        server = WrongServer(answer)
    with server.listener:
        threading.Thread(target=server.listen, daemon=True).start()
        yield server
        server.listener.shutdown(socket.SHUT_RDWR)


def load(name: str, **constants: float) -> Any:
    """Return a fresh copy of a client's module, with some of its constants changed."""
    spec = importlib.util.spec_from_file_location(name, ROOT / f"{name}.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    for constant, value in constants.items():
        assert hasattr(module, constant), constant
        setattr(module, constant, value)
    return module


async def read_async(module: Any, url: str, pause: float = 0) -> tuple[list[Any], str | None]:
    """`read_all`, for the asynchronous client alone."""
    found = []
    try:
        async for item in module.read_events(url):
            found.append(item)
            await asyncio.sleep(pause)
    except module.StreamError as error:
        return found, str(error)
    return found, None


def read_all(module: Any, url: str, pause: float = 0) -> tuple[list[Any], str | None]:
    """Return what a line reader gives, and its error, if it ends with one.

    The program that reads is busy for `pause` seconds after each event.
    """
    if module.__name__ == "client_async":
        return asyncio.run(read_async(module, url, pause))
    found = []
    try:
        for item in module.read_events(url):
            found.append(item)
            time.sleep(pause)
    except module.StreamError as error:
        return found, str(error)
    return found, None


def read(module: Any, url: str, pause: float = 0) -> tuple[list[int], str | None]:
    """The same, with the ids of the events."""
    found, sentence = read_all(module, url, pause)
    return [item["event_id"] for item in found], sentence
