"""What a feed costs: one event for every reader, recipes/feed.py beside the alternatives, in one run.

Run it with `python bench/fanout.py` (about ten minutes, on a machine that does nothing else), or
with `--quick` to see in a few seconds that it works. It prints the tables, and writes fanout.json
and fanout.md. It needs Debian's nginx, libnginx-mod-nchan and redis-server.

Each server gets one core; the load generator, which publishes and reads, gets another, together
with Redis. The rounds are interleaved, because the speed of a machine drifts; the tables show
medians of the rounds.
"""

# ruff: noqa: ASYNC110
# Looking now and then whether all readers are there costs less than telling at each one.

import argparse
import asyncio
import json
import math
import os
import re
import resource
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import psutil
import uvloop
from load import CONNECTING, Server
from run import HERE, LOAD_CORE, SERVER_CORE, heading, marked, middle, script, table, tell, uvicorn

EVENT = re.compile(rb"#([0-9]+)\.")
PUBLISHERS = 5  # connections; an event of a burst leaves on each
TEXT = "Aston Villa 2, Newcastle United 1 (Watkins, 67th minute), seen by 41,288 people #{number}."


@dataclass(frozen=True)
class Candidate:
    """A server to be measured: how it is started, and how an event is published on it."""

    name: str
    command: tuple[str, ...]
    raw: bool = False  # the POST's body is the event's text, and not JSON
    redis: bool = False

    def post(self, number: int) -> bytes:
        """The request that publishes event `number`."""
        text = TEXT.format(number=number)
        body = text if self.raw else json.dumps({"data": text})
        return (
            "POST /feed HTTP/1.1\r\nHost: bench\r\nContent-Type: application/json\r\n"
            f"Content-Length: {len(body)}\r\n\r\n{body}"
        ).encode()


OURS = uvicorn("recipes.feed:app", HERE.parent)
NGINX = shutil.which("nginx", path="/usr/sbin:/usr/bin:/sbin:/bin") or "nginx"
CANDIDATES = (
    Candidate("recipes/feed.py", OURS),
    Candidate("recipes/feed.py on Redis", OURS, redis=True),
    Candidate("bare ASGI on uvicorn, a future for each reader", uvicorn("feed_bare_asgi:app")),
    Candidate(
        "nginx with nchan", (NGINX, "-c", "{tmp}/feed_nchan.conf", "-g", "daemon off;"), True
    ),
    Candidate("FastAPI StreamingResponse, a queue for each reader", uvicorn("feed_fastapi:app")),
    Candidate("sse-starlette, a queue for each reader", uvicorn("feed_starlette_sse:app")),
    Candidate("aiohttp-sse on uvloop, a queue for each reader", script("feed_aiohttp.py")),
)


@dataclass(frozen=True)
class Plan:
    """How much of everything; seconds where nothing else is said."""

    rounds: int
    readers: int
    rate: int  # events a second
    window: float
    crowd: int  # readers of our own two, at an event a second
    crowd_window: float
    catch_up: float  # for a server that is behind


FULL = Plan(5, 2000, 20, 5.0, 10_000, 20.0, 20.0)
QUICK = Plan(1, 40, 20, 0.5, 100, 1.0, 20.0)


# Measuring ----------------------------------------------------------------------------------------


@contextmanager
def listening(
    name: str, command: list[str], port: int, core: int, **options: Any
) -> Iterator[subprocess.Popen[str]]:
    """Run a server on a core of its own, from when it listens to the end of the block."""
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(
            command,
            stdout=log,
            stderr=log,
            text=True,
            preexec_fn=partial(os.sched_setaffinity, 0, [core]),
            **options,
        )
        try:
            deadline = time.monotonic() + 60
            while socket.socket().connect_ex(("127.0.0.1", port)):
                if process.poll() is not None or time.monotonic() > deadline:
                    log.seek(0)
                    raise SystemExit(f"{name} does not start:\n{log.read()}")
                time.sleep(0.05)
            yield process
        finally:
            process.terminate()
            try:
                process.wait(5)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


@contextmanager
def running(candidate: Candidate) -> Iterator[Server]:
    """Start a server, and a Redis for it if it wants one; end them with the block."""
    port = free_port()
    environment = {name: value for name, value in os.environ.items() if name != "REDIS_URL"}
    with tempfile.TemporaryDirectory() as tmp:
        config = (HERE / "servers/feed_nchan.conf").read_text()
        config = config.replace("{tmp}", tmp).replace("{port}", str(port))
        Path(tmp, "feed_nchan.conf").write_text(config)
        words = [word.replace("{port}", str(port)) for word in candidate.command]
        words = [word.replace("{tmp}", tmp) for word in words]
        if candidate.redis:
            redis_port = free_port()
            environment["REDIS_URL"] = f"redis://127.0.0.1:{redis_port}"
            redis = ["redis-server", "--port", str(redis_port), "--save", "", "--dir", tmp]
            with (
                listening("redis-server", redis, redis_port, LOAD_CORE),
                listening(candidate.name, words, port, SERVER_CORE, env=environment) as process,
            ):
                yield Server(port, process.pid)
        else:
            with listening(candidate.name, words, port, SERVER_CORE, env=environment) as process:
                workers = psutil.Process(process.pid).children()  # nginx has one, the others none
                yield Server(port, workers[0].pid if workers else process.pid)


@dataclass
class Counters:
    """What all readers have in common."""

    published: list[float] = field(default_factory=list)  # when, by number
    late: list[float] = field(default_factory=list)  # from publishing to delivery
    delivered: int = 0
    doubled: int = 0
    closed: int = 0


class Reader(asyncio.Protocol):
    """Reads the feed."""

    def __init__(self, counters: Counters) -> None:
        self.counters = counters
        self.seen: set[int] = set()
        self.rest = b""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        self.transport = transport
        transport.write(b"GET /feed HTTP/1.1\r\nHost: bench\r\nAccept: text/event-stream\r\n\r\n")

    def data_received(self, data: bytes) -> None:
        now = time.perf_counter()
        counters = self.counters
        data = self.rest + data
        end = 0
        for match in EVENT.finditer(data):
            end = match.end()
            number = int(match[1])
            if number in self.seen:
                counters.doubled += 1
            else:
                self.seen.add(number)
                counters.delivered += 1
                counters.late.append(now - counters.published[number])
        self.rest = data[end:] if end else data[-16:]

    def connection_lost(self, error: Exception | None) -> None:
        self.counters.closed += 1


class Publisher(asyncio.Protocol):
    """Publishes on one connection, without waiting for the answers."""

    answers = 0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        self.answers += data.count(b"HTTP/1.1 2")


class Load:
    """Readers of one server, and who publishes what they read."""

    def __init__(self, server: Server, candidate: Candidate) -> None:
        self.server = server
        self.candidate = candidate
        self.counters = Counters()
        self.readers: list[Reader] = []
        self.publishers: list[Publisher] = []

    async def open(self, count: int) -> None:
        """Connect so many readers, and wait until all of them get what is published."""
        loop = asyncio.get_running_loop()
        address = "127.0.0.1", self.server.port
        gate = asyncio.Semaphore(CONNECTING)
        for _ in range(PUBLISHERS):
            _, publisher = await loop.create_connection(Publisher, *address)
            self.publishers.append(publisher)

        async def connect() -> None:
            async with gate:
                _, reader = await loop.create_connection(partial(Reader, self.counters), *address)
                self.readers.append(reader)

        # Whatever the server imports or caches with its first reader is none of the readers' cost.
        await connect()
        await self.until_all_read()
        self.memory_before = self.server.memory()
        await asyncio.gather(*(connect() for _ in range(count - 1)))
        await self.until_all_read()

    async def until_all_read(self) -> None:
        """Publish an event now and then, until one has come to all readers."""
        for _ in range(300):
            self.publish()
            await asyncio.sleep(0.2)
            if all(reader.seen for reader in self.readers):
                last = len(self.counters.published) - 1
                while not all(last in reader.seen for reader in self.readers):
                    await asyncio.sleep(0.05)
                return
        raise SystemExit(f"{self.candidate.name}: not all readers get what is published")

    def publish(self) -> None:
        number = len(self.counters.published)
        publisher = self.publishers[number % PUBLISHERS]
        self.counters.published.append(time.perf_counter())
        publisher.transport.write(self.candidate.post(number))

    async def watch(self, rate: int, burst: int, seconds: float, catch_up: float) -> dict[str, Any]:
        """Publish `rate` events a second, `burst` of them at a time, and look at what comes."""
        counters, server = self.counters, self.server
        counters.late, counters.delivered, counters.doubled = [], 0, 0
        events = int(rate * seconds)
        loop = asyncio.get_running_loop()
        start, began = loop.time(), time.perf_counter()
        cpu, own_cpu = server.cpu(), time.process_time()
        for number in range(0, events, burst):
            await asyncio.sleep(start + number / rate - loop.time())
            for _ in range(burst):
                self.publish()
        due = events * len(self.readers)
        limit = loop.time() + catch_up
        while counters.delivered < due and loop.time() < limit:
            await asyncio.sleep(0.01)
        took = time.perf_counter() - began
        cpu, own_cpu = server.cpu() - cpu, time.process_time() - own_cpu
        late = sorted(counters.late) or [math.nan]
        return {
            "readers": len(self.readers),
            "due": due,
            "delivered": counters.delivered,
            "doubled": counters.doubled,
            "closed": counters.closed,
            "answers": sum(publisher.answers for publisher in self.publishers),
            "cpu": cpu / max(counters.delivered, 1) * 1e6,  # µs of the server's for a delivery
            "memory": (server.memory() - self.memory_before) / len(self.readers) / 1024,  # KB
            "late": [1e3 * late[int(q * (len(late) - 1))] for q in (0.5, 0.99, 1)],  # ms
            "server_share": cpu / took,
            "load_share": own_cpu / took,
        }

    async def close(self) -> None:
        for reader in self.readers:
            reader.transport.abort()
        while self.counters.closed < len(self.readers):
            await asyncio.sleep(0.01)


async def watch(server: Server, candidate: Candidate, plan: Plan) -> list[dict[str, Any]]:
    """Watch a server with single events, and with bursts of five."""
    load = Load(server, candidate)
    await load.open(plan.readers)
    seen = []
    for burst in (1, PUBLISHERS):
        seen.append(await load.watch(plan.rate, burst, plan.window, plan.catch_up))
        if seen[-1]["delivered"] < seen[-1]["due"]:
            break  # what is late would be counted with the next
    await load.close()
    return seen


async def watch_crowd(server: Server, candidate: Candidate, plan: Plan) -> dict[str, Any]:
    """Watch a server with many readers and an event a second."""
    load = Load(server, candidate)
    await load.open(plan.crowd)
    seen = await load.watch(1, 1, plan.crowd_window, plan.catch_up)
    await load.close()
    return seen
