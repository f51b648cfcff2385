"""What an event to all readers costs: recipes/feed.py beside the alternatives, in one run.

Run it with `python bench/fanout.py` (fifteen minutes, on a machine that does nothing else), or with
`--quick` to see in half a minute that it works. It prints the tables, and writes fanout.json and
fanout.md. It needs Debian's nginx, libnginx-mod-nchan and redis-server. `--python PATH` adds the
recipe on another Python, which has recipes/requirements.txt. The feed as it was before it had
channels is taken from git and measured too, but not with `--quick`.

Each server gets one core. The load generator, which publishes and reads, gets another, together
with Redis. The rounds are interleaved, because the speed of a machine drifts. The tables show
medians of the rounds.
"""

# ruff: noqa: ASYNC110
# Looking now and then whether all readers are there costs less than telling at each one.

import argparse
import asyncio
import importlib.metadata
import json
import math
import os
import random
import re
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import psutil
import uvloop
from load import CONNECTING, Server, allow_open_files, free_port, listening
from run import (
    CORES,
    HERE,
    LOAD_CORE,
    SERVER_CORE,
    heading,
    marked,
    middle,
    script,
    table,
    tell,
    uvicorn,
)

EVENT = re.compile(rb"#([0-9]+)\.")
TEXT = "Aston Villa 2, Newcastle United 1 (Watkins, 67th minute), seen by 41,288 people #{number}."
BURST = 5  # events at a time, each on a connection of its own


@dataclass(frozen=True)
class Candidate:
    """A server to be measured: how it is started, and how an event is published on it."""

    name: str
    command: tuple[str, ...]
    raw: bool = False  # the POST's body is the event's text, and not JSON
    redis: bool = False
    path: str = "/feed"

    def post(self, number: int, path: str = "") -> bytes:
        """The request that publishes event `number`."""
        text = TEXT.format(number=number)
        body = text if self.raw else json.dumps({"data": text})
        return (
            f"POST {path or self.path} HTTP/1.1\r\nHost: bench\r\n"
            "Content-Type: application/json\r\n"
            f"Content-Length: {len(body)}\r\n\r\n{body}"
        ).encode()


BEFORE = "6579ab4"  # the commit before the feed had channels
OURS = uvicorn("recipes.feed:app", HERE.parent)
NGINX = shutil.which("nginx") or "/usr/sbin/nginx"
CANDIDATES = (
    Candidate("recipes/feed.py", OURS, path="/feed/goals"),
    Candidate("recipes/feed.py on Redis", OURS, redis=True, path="/feed/goals"),
    Candidate(
        "nginx with nchan", (NGINX, "-c", "{tmp}/feed_nchan.conf", "-g", "daemon off;"), True
    ),
    Candidate("bare ASGI, a future for each reader", uvicorn("feed_bare_asgi:app")),
    Candidate("FastAPI StreamingResponse, a queue for each reader", uvicorn("feed_fastapi:app")),
    Candidate("aiohttp-sse on uvloop, a queue for each reader", script("feed_aiohttp.py")),
    Candidate("sse-starlette, a queue for each reader", uvicorn("feed_starlette_sse:app")),
)


@dataclass(frozen=True)
class Plan:
    """How much of everything; seconds where nothing else is said."""

    rounds: int
    readers: int
    rate: int  # events a second
    window: float
    catch_up: float  # for a server that is behind
    crowd: int  # readers of our own, at an event a second
    crowd_window: float
    channels: int  # with a reader on each of two servers
    channels_rate: int  # events a second, over all channels


FULL = Plan(5, 2000, 20, 5.0, 20.0, 10_000, 30.0, 1000, 200)
QUICK = Plan(1, 20, 20, 0.5, 20.0, 20, 1.0, 10, 20)


# Measuring ----------------------------------------------------------------------------------------


@contextmanager
def running(candidate: Candidate) -> Iterator[Server]:
    """Start a server, and a Redis for it if it wants one; end them with the block."""
    port = free_port()
    environment = {name: value for name, value in os.environ.items() if name != "REDIS_URL"}
    with ExitStack() as stack:
        tmp = stack.enter_context(tempfile.TemporaryDirectory())
        config = (HERE / "servers/feed_nchan.conf").read_text()
        config = config.replace("{tmp}", tmp).replace("{port}", str(port))
        Path(tmp, "feed_nchan.conf").write_text(config)
        if candidate.redis:
            redis_port = free_port()
            words = ["redis-server", "--port", str(redis_port), "--save", "", "--dir", tmp]
            stack.enter_context(listening("redis-server", words, redis_port, LOAD_CORE))
            environment["REDIS_URL"] = f"redis://127.0.0.1:{redis_port}"
        words = [
            word.replace("{port}", str(port)).replace("{tmp}", tmp) for word in candidate.command
        ]
        server = listening(candidate.name, words, port, SERVER_CORE, env=environment)
        process = stack.enter_context(server)
        pid = process.pid
        if candidate.command[0] == NGINX:  # two processes, and the second does the work
            while not (workers := psutil.Process(pid).children()):
                time.sleep(0.05)
            pid = workers[0].pid
        yield Server(port, pid)


@dataclass
class Counters:
    """What all readers have in common."""

    published: list[float] = field(default_factory=list)  # when, by number
    late: list[float] = field(default_factory=list)  # from publishing to delivery
    delivered: int = 0
    doubled: int = 0


class Reader(asyncio.Protocol):
    """Reads the feed."""

    def __init__(self, counters: Counters, path: str) -> None:
        self.counters, self.path = counters, path
        self.seen: set[int] = set()
        self.placed = False  # it gets what is published from now on
        self.rest = b""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        self.transport = transport
        head = f"GET {self.path} HTTP/1.1\r\nHost: bench\r\nAccept: text/event-stream\r\n\r\n"
        transport.write(head.encode())

    def data_received(self, data: bytes) -> None:
        now = time.perf_counter()
        counters = self.counters
        self.placed = self.placed or b"\nid: " in data
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
        self.rest = data[end:][-16:]  # as long as what is looked for may be


class Publisher(asyncio.Protocol):
    """Publishes on one connection, without waiting for the answers."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        self.transport = transport


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
        make = partial(Reader, self.counters, self.candidate.path)

        async def connect() -> None:
            async with gate:
                _, reader = await loop.create_connection(make, *address)
                self.readers.append(reader)

        # Whatever the server imports or caches with its first reader is none of a reader's cost.
        await connect()
        await self.until_all_read()
        self.memory_before = self.server.memory()
        await asyncio.gather(*(connect() for _ in range(count - 1)))
        await self.until_all_read()

    async def until_all_read(self) -> None:
        """Publish an event now and then, until one has come to all readers."""
        await self.open_publishers(1)
        for _ in range(300):
            self.publish(0)
            await asyncio.sleep(0.2)
            if all(reader.seen for reader in self.readers):
                last = len(self.counters.published) - 1
                while not all(last in reader.seen for reader in self.readers):
                    await asyncio.sleep(0.05)
                return
        raise SystemExit(f"{self.candidate.name}: not all readers get what is published")

    async def open_publishers(self, count: int) -> None:
        """Open new connections to publish on: uvicorn closes one that was idle for 5 seconds."""
        self.close_publishers()
        loop = asyncio.get_running_loop()
        for _ in range(count):
            _, publisher = await loop.create_connection(Publisher, "127.0.0.1", self.server.port)
            self.publishers.append(publisher)

    def publish(self, connection: int) -> None:
        number = len(self.counters.published)
        self.counters.published.append(time.perf_counter())
        self.publishers[connection].transport.write(self.candidate.post(number))

    async def watch(self, rate: int, burst: int, seconds: float, catch_up: float) -> dict[str, Any]:
        """Publish `rate` events a second, `burst` of them at a time, and look at what comes."""
        await self.open_publishers(burst)
        counters, server = self.counters, self.server
        counters.late, counters.delivered, counters.doubled = [], 0, 0
        events = int(rate * seconds)
        due = events * len(self.readers)
        loop = asyncio.get_running_loop()
        start, began = loop.time(), time.perf_counter()
        cpu, own_cpu = server.cpu(), time.process_time()
        for number in range(0, events, burst):
            await asyncio.sleep(start + number / rate - loop.time())
            for connection in range(burst):
                self.publish(connection)
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
            "cpu": cpu / max(counters.delivered, 1) * 1e6,  # µs of the server's for a delivery
            "memory": (server.memory() - self.memory_before) / len(self.readers) / 1024,  # KB
            "late": [1e3 * late[int(q * (len(late) - 1))] for q in (0.5, 0.99, 1)],  # ms
            "server_share": cpu / took,
            "load_share": own_cpu / took,
        }

    def close_publishers(self) -> None:
        for publisher in self.publishers:
            publisher.transport.abort()
        self.publishers.clear()

    def close(self) -> None:
        self.close_publishers()
        for reader in self.readers:
            reader.transport.abort()


async def watch(server: Server, candidate: Candidate, plan: Plan) -> list[dict[str, Any]]:
    """Watch a server with single events, then with bursts."""
    load = Load(server, candidate)
    await load.open(plan.readers)
    seen = []
    for burst in (1, BURST):
        seen.append(await load.watch(plan.rate, burst, plan.window, plan.catch_up))
        if seen[-1]["delivered"] < seen[-1]["due"]:
            break  # what is late would be counted with the next
    load.close()
    return seen


async def watch_crowd(server: Server, candidate: Candidate, plan: Plan) -> dict[str, Any]:
    """Watch a server with very many readers, and an event a second."""
    load = Load(server, candidate)
    await load.open(plan.crowd)
    seen = await load.watch(1, 1, plan.crowd_window, plan.catch_up)
    load.close()
    return seen


async def watch_channels(ports: list[int], plan: Plan) -> dict[str, Any]:
    """Watch two servers with many channels, each with a reader on either server."""
    loop, counters = asyncio.get_running_loop(), Counters()
    readers: list[Reader] = []
    publishers: list[Publisher] = []
    for number in range(plan.channels):
        for port in ports:
            make = partial(Reader, counters, f"/feed/channel:{number}")
            readers.append((await loop.create_connection(make, "127.0.0.1", port))[1])
    while not all(reader.placed for reader in readers):
        await asyncio.sleep(0.1)
    for port in ports:
        publishers.append((await loop.create_connection(Publisher, "127.0.0.1", port))[1])
    events = int(plan.channels_rate * plan.crowd_window)
    dice, start = random.Random(1), loop.time()
    for number in range(events):
        await asyncio.sleep(start + number / plan.channels_rate - loop.time())
        counters.published.append(time.perf_counter())
        path = f"/feed/channel:{dice.randrange(plan.channels)}"
        publishers[number % 2].transport.write(CANDIDATES[0].post(number, path))
    limit = loop.time() + plan.catch_up
    while counters.delivered < 2 * events and loop.time() < limit:
        await asyncio.sleep(0.01)
    for reader in readers:
        reader.transport.abort()
    for publisher in publishers:
        publisher.transport.abort()
    late = sorted(counters.late) or [math.nan]
    return {
        "due": 2 * events,
        "delivered": counters.delivered,
        "doubled": counters.doubled,
        "late": [1e3 * late[int(q * (len(late) - 1))] for q in (0.5, 0.99, 1)],
    }


def measure_channels(plan: Plan) -> dict[str, Any]:
    with ExitStack() as stack:
        tmp, redis_port = stack.enter_context(tempfile.TemporaryDirectory()), free_port()
        words = ["redis-server", "--port", str(redis_port), "--save", "", "--dir", tmp]
        stack.enter_context(listening("redis-server", words, redis_port, LOAD_CORE))
        environment = {**os.environ, "REDIS_URL": f"redis://127.0.0.1:{redis_port}"}
        ports = [free_port(), free_port()]
        servers = []
        for port in ports:
            words = [word.replace("{port}", str(port)) for word in OURS]
            server = listening("recipes/feed.py", words, port, SERVER_CORE, env=environment)
            servers.append(Server(port, stack.enter_context(server).pid))
        cpu, began = sum(server.cpu() for server in servers), time.perf_counter()
        seen = uvloop.run(watch_channels(ports, plan))
        seen["share"] = sum(server.cpu() for server in servers) - cpu
        seen["share"] /= time.perf_counter() - began
        clients = subprocess.run(
            ["redis-cli", "-p", str(redis_port), "client", "list"], capture_output=True, text=True
        )
        seen["connections"] = len(clients.stdout.strip().splitlines()) - 1  # and redis-cli's own
    return seen


@contextmanager
def more_candidates(interpreter: str | None, quick: bool) -> Iterator[tuple[Candidate, ...]]:
    """Those of the table, the recipe on another Python, and the feed as it was."""
    more = []
    if interpreter:
        version = subprocess.run([interpreter, "-V"], capture_output=True, text=True, check=True)
        name = f"recipes/feed.py on {version.stdout.strip()}"
        more.append(Candidate(name, (interpreter, *OURS[1:]), path="/feed/goals"))
    with tempfile.TemporaryDirectory() as tmp:
        git = ["git", "-C", str(HERE.parent), "worktree"]
        if not quick:
            subprocess.run([*git, "add", "--detach", "--quiet", tmp, BEFORE], check=True)
            name = f"the feed without channels ({BEFORE})"
            more.append(Candidate(name, uvicorn("recipes.feed:app", Path(tmp))))
        try:
            yield (*CANDIDATES, *more)
        finally:
            if not quick:
                subprocess.run([*git, "remove", "--force", tmp], check=True)


def measure(plan: Plan, candidates: tuple[Candidate, ...]) -> dict[str, Any]:
    """Run it all; return what was seen in each round."""
    results: dict[str, Any] = {
        "heading": {**heading(), "others": others()},
        "plan": asdict(plan),
        "single": {candidate.name: [] for candidate in candidates},
        "bursts": {candidate.name: [] for candidate in candidates},
        "crowd": {},
    }
    for number in range(plan.rounds):
        for candidate in candidates:
            tell(f"{plan.readers} readers, round {number + 1} of {plan.rounds}: {candidate.name}")
            with running(candidate) as server:
                windows = uvloop.run(watch(server, candidate, plan))
            for kind, window in zip(("single", "bursts"), windows, strict=False):
                results[kind][candidate.name].append(window)
    for candidate in (c for c in CANDIDATES if c.command == OURS):
        tell(f"{plan.crowd} readers: {candidate.name}")
        with running(candidate) as server:
            results["crowd"][candidate.name] = [uvloop.run(watch_crowd(server, candidate, plan))]
    tell(f"{plan.channels} channels")
    results["channels"] = measure_channels(plan)
    return results


def others() -> str:
    """The versions of what is no Python."""
    nginx = subprocess.run([NGINX, "-v"], capture_output=True, text=True, check=True).stderr
    redis = subprocess.run(["redis-server", "-v"], capture_output=True, text=True, check=True)
    nchan = subprocess.run(
        ["dpkg-query", "-W", "-f", "${Version}", "libnginx-mod-nchan"],
        capture_output=True,
        text=True,
        check=False,
    )
    versions = {
        "redis-py": importlib.metadata.version("redis"),
        "nginx": nginx.strip().rpartition("/")[2],
        "nchan": nchan.stdout.rpartition(":")[2].partition("+")[0] or "?",
        "Redis": redis.stdout.partition("v=")[2].partition(" ")[0],
    }
    return ", ".join(f"{name} {version}" for name, version in versions.items())


# Showing ------------------------------------------------------------------------------------------


def rows(seen: dict[str, list[dict[str, Any]]]) -> list[list[str]]:
    """A row of medians for each server. One that was too far behind for the window has none."""
    shown = []
    for name, rounds in seen.items():
        if rounds:
            late = [median(window["late"][i] for window in rounds) for i in (0, 1)]
            missing = sum(window["due"] - window["delivered"] for window in rounds)
            shown.append(
                [
                    name,
                    marked(f"{middle(rounds, 'cpu'):.1f}", rounds),
                    f"{middle(rounds, 'memory'):.1f}",
                    *[marked(f"{value:,.0f}", rounds) for value in late],
                    f"{middle(rounds, 'server_share'):.0%}",
                    f"{missing:,}",
                    str(sum(window["doubled"] for window in rounds)),
                ]
            )
    return shown


def render(results: dict[str, Any]) -> str:
    """The tables of fanout.md, from what is in fanout.json."""
    plan, about = results["plan"], results["heading"]
    head = ["server", "CPU µs a delivery", "KB a reader", "p50 ms", "p99 ms", "of its core"]
    head += ["missing", "doubled"]
    each = f"{plan['readers']:,} readers, {plan['rate']} events a second"
    parts = [
        f"Measured on {about['date']}: {about['machine']}. {about['versions']}, {about['others']}.",
        f"{each}, one at a time:",
        table(head, rows(results["single"])),
        f"{each}, in bursts of {BURST}:",
        table(head, rows(results["bursts"])),
        f"{plan['crowd']:,} readers, an event a second:",
        table(head, rows(results["crowd"])),
    ]
    if seen := results.get("channels"):
        parts.append(
            f"{plan['channels']:,} channels with a reader on each of two servers on Redis, "
            f"{plan['channels_rate']} events a second over all of them, both servers on one core: "
            f"from publishing to delivery p50 {seen['late'][0]:.0f} ms, p99 {seen['late'][1]:.0f} "
            f"ms. {seen['due'] - seen['delivered']} missing, {seen['doubled']} doubled, "
            f"{seen['share']:.0%} of the core, {seen['connections']} connections to Redis."
        )
    return "\n\n".join(parts) + "\n"


def main() -> None:
    """Measure, print the tables, and write them down."""
    parser = argparse.ArgumentParser(description="Measure what an event to all readers costs.")
    parser.add_argument("--quick", action="store_true", help="small numbers, which say nothing")
    parser.add_argument("--python", help="another interpreter, to measure the recipe with too")
    arguments = parser.parse_args()
    if len(CORES) < 2:
        raise SystemExit("The benchmark needs two cores: one for the server, one for the load.")
    plan = QUICK if arguments.quick else FULL
    allow_open_files(max(plan.readers, plan.crowd, 2 * plan.channels) + 200)
    os.sched_setaffinity(0, [LOAD_CORE])
    with more_candidates(arguments.python, arguments.quick) as candidates:
        results = measure(plan, candidates)
    print(render(results))
    if not arguments.quick:
        text = json.dumps(results, indent=1, ensure_ascii=False)
        (HERE / "fanout.json").write_text(f"{text}\n")
        (HERE / "fanout.md").write_text(render(results))


if __name__ == "__main__":
    main()
