"""Many readers at once over bare sockets, which record what came, when, and how it ended."""

import re
import resource
import selectors
import socket
import struct
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import h11
import psutil

from tests.support.processes import LIMIT, Process, wait_for

FORMATS = ("/text", "/ndjson", "/sse")
TCP_REPAIR = 19  # linux/tcp.h; Python has no name for it


class RawReader:
    """One request over one connection. Reads nothing before `read_until` is called."""

    def __init__(
        self,
        port: int,
        target: str,
        headers: str = "",
        receive_buffer: int = 0,
        method: str = "GET",
    ) -> None:
        self.path = target.partition("?")[0]
        self.body = bytearray()
        self.status = 0
        self.arrivals: list[float] = []  # when some of the body came, in time.time()
        self.ended_at = 0.0
        self.ended_properly = False  # with the terminating chunk, not cut off
        self._http = h11.Connection(h11.CLIENT)
        # h11 reads an answer only to a request that it knows of.
        self._http.send(h11.Request(method=method, target=target, headers=[("Host", "test")]))
        self._http.send(h11.EndOfMessage())
        self.socket = socket.socket()
        if receive_buffer:
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        self.socket.connect(("127.0.0.1", port))
        self.socket.sendall(f"{method} {target} HTTP/1.1\r\nHost: test\r\n{headers}\r\n".encode())

    def receive(self) -> None:
        """Take what has arrived; at the end of the answer close the connection."""
        try:
            data = self.socket.recv(1 << 20)
            self._http.receive_data(data)
            while True:
                event = self._http.next_event()
                if isinstance(event, h11.Response):
                    self.status = event.status_code
                elif isinstance(event, h11.Data):
                    self.body += event.data
                    self.arrivals.append(time.time())
                elif isinstance(event, h11.EndOfMessage):
                    self.ended_properly = True
                    return self.close()
                else:  # NEED_DATA, or ConnectionClosed before any answer
                    break
        except (OSError, h11.RemoteProtocolError):
            return self.close()
        if not data:
            self.close()
        return None

    def close(self) -> None:
        """Go away as a process does that ends: the kernel tells the server."""
        self.ended_at = self.ended_at or time.time()
        self.socket.close()

    def reset(self) -> None:
        """Go away with a reset instead of a goodbye (FIN)."""
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.close()

    def vanish(self) -> None:
        """Go away without a packet, as a machine that loses power; the next send is answered RST.

        A socket under TCP_REPAIR is closed silently. Needs CAP_NET_ADMIN.
        """
        self.socket.setsockopt(socket.IPPROTO_TCP, TCP_REPAIR, 1)
        self.close()

    @property
    def event_ids(self) -> list[int]:
        """The ids of the whole events that came. Of /text: from the number in the text."""
        return event_ids(self.path, bytes(self.body))

    @property
    def ended_after_an_event(self) -> bool:
        return self.body.endswith(b"\n\n" if self.path == "/sse" else b"\n")


def event_ids(path: str, body: bytes) -> list[int]:
    if path == "/text":
        return [int(number) - 1 for number in re.findall(rb"^Step (\d+) of .*\n", body, re.M)]
    # An event that was cut off is behind the last end of an event, and does not count.
    *whole, _ = re.split(rb"\n" if path == "/ndjson" else rb"\r?\n\r?\n", body)
    return [int(number) for event in whole for number in re.findall(rb'"event_id": ?(\d+)', event)]


def read_until(
    readers: Iterable[RawReader], condition: Callable[[], object], limit: float = LIMIT
) -> bool:
    """Let the readers read until `condition()` holds; tell whether it did within the limit."""
    with selectors.DefaultSelector() as selector:
        for reader in readers:
            if not reader.ended_at:
                selector.register(reader.socket, selectors.EVENT_READ, reader)
        end = time.monotonic() + limit
        while not condition():
            if time.monotonic() > end:
                return False
            for key, _ in selector.select(0.01):
                # Before it is closed: a closed socket has no descriptor to unregister it by.
                reader = key.data
                descriptor = reader.socket.fileno()
                reader.receive()
                if reader.ended_at:
                    selector.unregister(descriptor)
    return True


def wait_until_idle(server: Process) -> None:
    """Wait until the server has nothing to do."""
    process = psutil.Process(server.pid)

    def idle() -> bool:
        """For a quarter of a second: not running, nor waiting for a CPU, nor using one."""
        before = process.cpu_times()
        for _ in range(5):
            time.sleep(0.05)
            if process.status() == psutil.STATUS_RUNNING:
                return False
        after = process.cpu_times()
        return after.user + after.system - before.user - before.system < 0.015

    wait_for(idle, "the server to be idle")


@contextmanager
def many_descriptors(count: int) -> Iterator[bool]:
    """Let this process, and what it starts, open `count` files; give whether it may."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    allowed = hard == resource.RLIM_INFINITY or hard >= count
    if allowed and soft < count:
        resource.setrlimit(resource.RLIMIT_NOFILE, (count, hard))
    yield allowed
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
