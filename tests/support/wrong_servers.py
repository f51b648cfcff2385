"""Servers that answer wrongly on purpose, and the clients to try on them.

A server sends exactly the bytes that a test gives it. A test writes the answer as a function that
is called in a thread for each connection, with the `Connection` to answer on. What it sends is on
the wire at once, and when it returns the connection is closed.
"""

import asyncio
import importlib.util
import json
import socket
import threading
import time
from collections.abc import Callable
from contextlib import aclosing
from typing import Any, Self

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

    def wait_until_closed(self) -> None:
        """Stay open and silent until the client goes away."""
        self.socket.settimeout(LIMIT)
        try:
            self.closed = self.socket.recv(1) == b""
        except ConnectionResetError:
            self.closed = True


Answer = Callable[[Connection], None]


def stall(head: bytes) -> Answer:
    """An answer that begins so, and then stays open and silent."""

    def answer(connection: Connection) -> None:
        connection.send(head)
        connection.wait_until_closed()

    return answer


def in_turn(*answers: bytes | Answer) -> Answer:
    """The first connection gets the first answer; the last answer is also for all later ones."""

    def answer(connection: Connection) -> None:
        chosen = answers[min(connection.number, len(answers)) - 1]
        connection.send(chosen) if isinstance(chosen, bytes) else chosen(connection)

    return answer


def go_on(connection: Connection) -> None:
    """Send the events that the client has not had."""
    connection.send(CHUNKED + chunk(events(connection.first, 10)) + END)


class WrongServer:
    """Listens on a port of its own; `connections` holds every request that it got, in order."""

    def __init__(self, answer: Answer) -> None:
        self.answer = answer
        self.connections: list[Connection] = []
        self.listener = socket.create_server(("127.0.0.1", 0), backlog=100)
        self.url = f"http://127.0.0.1:{self.listener.getsockname()[1]}/ndjson"

    def __enter__(self) -> Self:
        threading.Thread(target=self.listen, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.listener.shutdown(socket.SHUT_RDWR)
        self.listener.close()

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


def wrong_server(answer: Answer | bytes) -> WrongServer:
    """A server that gives this answer, on each connection, in a `with` block."""
    return WrongServer(in_turn(answer))


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


def for_each(module: Any, url: str, act: Callable[[Any], object], pause: float = 0) -> None:
    """Do something with each event, in a loop as a program has it, with a pause after each."""

    async def loop() -> None:
        async with aclosing(module.read_events(url)) as stream:
            async for item in stream:
                act(item)
                await asyncio.sleep(pause)

    if module.__name__ == "client_async":
        asyncio.run(loop())
    else:
        for item in module.read_events(url):
            act(item)
            time.sleep(pause)


def read(module: Any, url: str, pause: float = 0) -> tuple[list[int], str | None]:
    """Return the ids of the events that a line reader gives, and its error, if it ends with one."""
    ids: list[int] = []
    try:
        for_each(module, url, lambda item: ids.append(item["event_id"]), pause)
    except module.StreamError as error:
        return ids, str(error)
    return ids, None
