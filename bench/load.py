"""The load generator: opens streams, and takes the time of every event that arrives.

It knows an event by its text, which is the same in all formats, and checks that none is missing.
"""

# ruff: noqa: ASYNC110
# Looking now and then whether all streams are open costs less than telling at each one.

import asyncio
import ctypes
import math
import os
import random
import re
import resource
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import psutil

EVENT = re.compile("Step ([0-9]+) of [0-9]+: ☕".encode())
CONNECTING = 200  # connections that are being opened at a time; listen() queues a few thousand
OPENERS = 16  # connections that open one stream after another


def request(path: str, steps: int, interval: float) -> bytes:
    """A GET for a stream, as bytes."""
    return f"GET {path}?steps={steps}&interval={interval} HTTP/1.1\r\nHost: bench\r\n\r\n".encode()


def free_port() -> int:
    """Return a port of 127.0.0.1 that nobody listens on.

    Below those that the kernel hands out to connections (32768 and up), or one might get it first.
    """
    while True:
        port = random.randrange(10_000, 32_000)
        with suppress(OSError), socket.create_server(("127.0.0.1", port)):
            return port


@contextmanager
def listening(
    name: str, command: Iterable[str], port: int, core: int | None = None, **options: Any
) -> Iterator[subprocess.Popen[bytes]]:
    """Run a server, on this core if one is given, from when it listens to the end of the block."""
    pin = None if core is None else partial(os.sched_setaffinity, 0, [core])
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(list(command), stdout=log, stderr=log, preexec_fn=pin, **options)
        try:
            deadline = time.monotonic() + 60
            while socket.socket().connect_ex(("127.0.0.1", port)):
                if process.poll() is not None or time.monotonic() > deadline:
                    log.seek(0)
                    raise SystemExit(f"{name} does not start:\n{log.read()}")
                time.sleep(0.05)
            yield process
        finally:
            if process.poll() is None:
                for child in psutil.Process(process.pid).children():  # nginx has one
                    child.kill()
            process.kill()
            process.wait()


def allow_open_files(need: int) -> None:
    """Let this process and its servers have so many files open, or exit and say what is missing."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < need:
        if hard < need:
            raise SystemExit(f"The benchmark needs {need} open files, `ulimit -n` allows {hard}.")
        resource.setrlimit(resource.RLIMIT_NOFILE, (need, hard))


class Server:
    """A server's process, as the operating system sees it: where it listens, what it uses."""

    def __init__(self, port: int, pid: int) -> None:
        self.port = port
        self._process = psutil.Process(pid)
        clock = ctypes.c_int()
        if ctypes.CDLL(None).clock_getcpuclockid(pid, ctypes.byref(clock)):
            raise ProcessLookupError(pid)
        self._clock = clock.value

    def cpu(self) -> float:
        """Seconds of CPU used so far, to the microsecond; /proc counts in hundredths."""
        return time.clock_gettime(self._clock)

    def memory(self) -> int:
        """Bytes of resident memory."""
        return int(self._process.memory_info().rss)


@dataclass
class Window:
    """What was seen in a few seconds in which all streams were open."""

    streams: int  # that had their first event
    events: int  # that came
    due: float  # events that should have come
    lost: int  # events that were skipped, since the start
    broken: int  # streams that ended early, since the start
    cpu: float  # µs of the server's CPU for an event
    memory: float  # KB of the server's resident memory for a stream
    late: list[float]  # p50, p99 and maximum, in ms
    server_share: float  # of a core
    load_share: float  # of a core, by the load generator itself


@dataclass
class Counters:
    """What all streams of a load have in common."""

    opened: int = 0
    closed: int = 0
    lost: int = 0
    recording: bool = False
    lateness: list[float] = field(default_factory=list)


class Reader(asyncio.Protocol):
    """Reads one stream. Its schedule: event k is due k × interval after the first one came."""

    def __init__(self, asks: bytes, interval: float, counters: Counters) -> None:
        self.asks = asks
        self.interval = interval
        self.counters = counters
        self.expected = 0
        self.first = 0.0
        self.rest = b""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        self.transport = transport
        transport.write(self.asks)

    def data_received(self, data: bytes) -> None:
        now = time.perf_counter()
        data = self.rest + data
        end = 0
        for match in EVENT.finditer(data):
            end = match.end()
            event_id = int(match[1]) - 1
            if event_id == 0:
                self.first = now
                self.counters.opened += 1
            elif self.counters.recording:
                self.counters.lateness.append(now - self.first - event_id * self.interval)
            self.counters.lost += abs(event_id - self.expected)
            self.expected = event_id + 1
        self.rest = data[end:]

    def connection_lost(self, error: Exception | None) -> None:
        self.counters.closed += 1


class Load:
    """Opens streams on a server, holds them open, and looks at them for a few seconds."""

    def __init__(self, server: Server, path: str, interval: float) -> None:
        self.server = server
        self.interval = interval
        self.asks = request(path, 100_000, interval)
        self.counters = Counters()
        self.readers: list[Reader] = []
        self.memory_before = server.memory()

    async def open(self, count: int, limit: float) -> None:
        """Open so many more streams, and wait until they have all sent something.

        They are spread evenly over whole intervals, or all events would be due at the same moment.
        After `limit` seconds it goes on with those that there are.
        """
        loop = asyncio.get_running_loop()
        gate = asyncio.Semaphore(CONNECTING)
        start = loop.time()
        spread = self.interval * math.ceil(count / 2500 / self.interval)

        async def connect() -> None:
            async with gate:
                _, reader = await loop.create_connection(
                    lambda: Reader(self.asks, self.interval, self.counters),
                    "127.0.0.1",
                    self.server.port,
                )
                self.readers.append(reader)

        async with asyncio.TaskGroup() as group:
            for number in range(count):
                await asyncio.sleep(start + number * spread / count - loop.time())
                group.create_task(connect())
        while self.counters.opened < len(self.readers) and loop.time() < start + spread + limit:
            await asyncio.sleep(0.05)
        if not self.counters.opened:
            raise ValueError("no stream has sent an event")

    async def wait_for(self, count: int) -> None:
        """Wait until each stream is past its first `count` events."""
        while min(reader.expected for reader in self.readers) < count:
            await asyncio.sleep(0.05)

    async def watch(self, seconds: float) -> Window:
        """Watch all streams for so many seconds."""
        counters = self.counters
        counters.lateness = []
        counters.recording = True
        start, cpu, own_cpu = time.perf_counter(), self.server.cpu(), time.process_time()
        await asyncio.sleep(seconds)
        took = time.perf_counter() - start
        cpu, own_cpu = self.server.cpu() - cpu, time.process_time() - own_cpu
        counters.recording = False
        late = sorted(counters.lateness) or [math.nan]
        events, streams = len(counters.lateness), counters.opened
        return Window(
            streams=streams,
            events=events,
            due=took / self.interval * len(self.readers),
            lost=counters.lost,
            broken=counters.closed,
            cpu=cpu / events * 1e6 if events else math.nan,
            memory=(self.server.memory() - self.memory_before) / max(streams, 1) / 1024,
            late=[1e3 * late[int(q * (len(late) - 1))] for q in (0.5, 0.99, 1)],
            server_share=cpu / took,
            load_share=own_cpu / took,
        )

    async def close(self) -> None:
        """Close all streams."""
        for reader in self.readers:
            reader.transport.abort()
        while self.counters.closed < len(self.readers):
            await asyncio.sleep(0.01)


class Opener(asyncio.Protocol):
    """Opens a stream of one event when the one before has ended, on the same connection."""

    def __init__(self, asks: bytes, ended: Callable[[bytes], bool]) -> None:
        self.asks = asks
        self.ended = ended
        self.answer = b""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        self.transport = transport
        transport.write(self.asks)

    def data_received(self, data: bytes) -> None:
        self.answer += data
        if self.answer.endswith(b"\r\n0\r\n\r\n"):
            if self.ended(self.answer):
                self.answer = b""
                self.transport.write(self.asks)
            else:
                self.transport.close()


async def open_streams(server: Server, path: str, seconds: float) -> dict[str, float]:
    """Open streams of one event, 16 at a time, for so many seconds; return how many a second."""
    loop = asyncio.get_running_loop()
    count = 0
    wrong: list[bytes] = []
    openers: list[Opener] = []
    own_cpu = time.process_time()
    start = time.perf_counter()

    def ended(answer: bytes) -> bool:
        nonlocal count
        count += 1
        if len(EVENT.findall(answer)) != 1:
            wrong.append(answer)
        return time.perf_counter() < start + seconds

    for _ in range(OPENERS):
        _, opener = await loop.create_connection(
            lambda: Opener(request(path, 1, 0), ended), "127.0.0.1", server.port
        )
        openers.append(opener)
    cpu = server.cpu()
    counted, begin = count, time.perf_counter()
    await asyncio.sleep(seconds - (begin - start))
    while count == counted:
        await asyncio.sleep(0.01)
    counted, took = count - counted, time.perf_counter() - begin
    cpu = server.cpu() - cpu
    load_share = (time.process_time() - own_cpu) / (time.perf_counter() - start)
    async with asyncio.timeout(30):
        while not all(opener.transport.is_closing() for opener in openers):
            await asyncio.sleep(0.01)
    if wrong:
        raise ValueError(f"{path}: not a stream of one event: {wrong[0]!r}")
    return {"per_second": counted / took, "cpu": cpu / counted * 1e6, "load_share": load_share}


def read_one(server: Server, path: str, steps: int) -> dict[str, float]:
    """Read one stream without intervals, as fast as it comes; return its events per second."""
    pieces = [b""]
    with socket.create_connection(("127.0.0.1", server.port), timeout=60) as connection:
        connection.sendall(request(path, steps, 0))
        start, own_cpu = time.perf_counter(), time.process_time()
        while piece := connection.recv(1 << 18):
            pieces.append(piece)
            if (pieces[-2] + piece).endswith(b"\r\n0\r\n\r\n"):
                break
        took, own_cpu = time.perf_counter() - start, time.process_time() - own_cpu
    numbers = [int(number) for number in EVENT.findall(b"".join(pieces))]
    if numbers != list(range(1, steps + 1)):
        raise ValueError(f"{path}: {len(numbers)} events instead of {steps}, or not in order")
    return {"per_second": steps / took, "load_share": own_cpu / took}
