"""A TCP proxy that damages connections on purpose, between a client and a real server.

Toxiproxy does this too, but PyPI and npm have only clients for its prebuilt binary.

`python -m tests.support.fault_proxy` prints how many events the line readers lose and double: none.
"""

import asyncio
import logging
import random
import socket
import struct
import sys
import tempfile
import threading
from collections.abc import Coroutine, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

from tests.support.processes import UVICORN, Process, free_port
from tests.support.wrong_servers import load, read_all, read_async

T = TypeVar("T")


@dataclass(frozen=True)
class Fault:
    """What happens to one connection, once so many bytes of the answer have come through."""

    kind: Literal["cut", "reset", "stall", "trickle", "502", "503"]
    after: int = 0


@dataclass
class Route:
    """One address of the proxy. Each connection to it meets the next fault, then there are none."""

    faults: list[Fault]
    for_ever: bool = False  # the last fault stays
    url: str = ""
    connections: int = 0
    tasks: set[asyncio.Task[None]] = field(default_factory=set)

    def next_fault(self) -> Fault | None:
        self.connections += 1
        if self.for_ever and self.connections >= len(self.faults):
            return self.faults[-1]
        return self.faults[self.connections - 1] if self.connections <= len(self.faults) else None


class FaultProxy:
    """Listens in a thread of its own, with a port for each route."""

    def __init__(self, port: int) -> None:
        self.upstream = port
        self.loop = asyncio.new_event_loop()
        threading.Thread(target=self.loop.run_forever, daemon=True).start()

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(work, self.loop).result()

    @contextmanager
    def route(self, faults: Iterable[Fault], for_ever: bool = False) -> Iterator[Route]:
        route = Route(list(faults), for_ever)
        server = self.run(asyncio.start_server(self.handler(route), "127.0.0.1", 0))
        port = server.sockets[0].getsockname()[1]
        route.url = f"http://127.0.0.1:{port}/ndjson?interval=0"
        yield route
        self.run(self.close(server, route))

    async def close(self, server: asyncio.Server, route: Route) -> None:
        server.close()
        for task in route.tasks:
            task.cancel()
        await asyncio.gather(*route.tasks, return_exceptions=True)

    def handler(self, route: Route) -> Any:
        async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            task = asyncio.current_task()
            assert task
            route.tasks.add(task)
            try:
                with suppress(OSError, asyncio.CancelledError, asyncio.IncompleteReadError):
                    await self.answer(route.next_fault(), reader, writer)
            finally:
                writer.transport.abort()
                route.tasks.discard(task)

        return handle

    async def answer(
        self, fault: Fault | None, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        request = await reader.readuntil(b"\r\n\r\n")
        if fault and fault.kind in ("502", "503"):
            writer.write(b"HTTP/1.1 %s Broken\r\nContent-Length: 0\r\n\r\n" % fault.kind.encode())
            await self.end(writer)
            return
        upstream, requests = await asyncio.open_connection("127.0.0.1", self.upstream)
        client_gone = asyncio.create_task(reader.read(1))
        client_gone.add_done_callback(lambda _: requests.transport.abort())
        try:
            requests.write(request)
            left = fault.after if fault else sys.maxsize
            while left and (data := await upstream.read(min(left, 65536))):
                left -= len(data)
                writer.write(data)
                await writer.drain()
            if left or not fault or fault.kind == "cut":
                await self.end(writer)
            elif fault.kind == "reset":
                # The socket is closed by abort(), and with this that sends RST.
                linger = struct.pack("ii", 1, 0)
                client = writer.get_extra_info("socket")
                client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
            elif fault.kind == "stall":
                await client_gone
            else:
                while data := await upstream.read(1):
                    writer.write(data)
                    await writer.drain()
                    await asyncio.sleep(0)
        finally:
            client_gone.cancel()
            requests.transport.abort()

    async def end(self, writer: asyncio.StreamWriter) -> None:
        """Close with FIN, after all that was written."""
        writer.close()
        await writer.wait_closed()


QUICK = {"FIRST_DELAY": 0.001, "STALL_TIMEOUT": 0.2, "GIVE_UP_AFTER": 60.0}


@dataclass
class Tally:
    """How often a fault was tried, and what became of the ten events of each stream."""

    tried: int = 0
    connections: int = 0
    lost: int = 0
    doubled: int = 0
    disordered: int = 0
    errors: list[str] = field(default_factory=list)

    def add(self, route: Route, events: list[Any], error: str | None) -> None:
        ids = [event["event_id"] for event in events]
        self.tried += 1
        self.connections += route.connections
        self.lost += 10 - len(set(ids))
        self.doubled += len(ids) - len(set(ids))
        self.disordered += ids != sorted(ids)
        if error:
            self.errors.append(error)


def try_all(client: str, proxy: FaultProxy, plans: Iterable[list[Fault]], at_once: int) -> Tally:
    """Read a stream of ten events through each of these plans, several at once; count."""
    tally = Tally()
    module = load(client, **QUICK)

    def try_sync(plan: list[Fault]) -> None:
        with proxy.route(plan) as route:
            tally.add(route, *read_all(module, route.url))

    async def try_async(plan: list[Fault], limit: asyncio.Semaphore) -> None:
        async with limit:
            with proxy.route(plan) as route:
                tally.add(route, *await read_async(module, route.url))

    async def try_all_async() -> None:
        limit = asyncio.Semaphore(at_once)
        await asyncio.gather(*(try_async(plan, limit) for plan in plans))

    if client == "client_async":
        asyncio.run(try_all_async())
    else:
        with ThreadPoolExecutor(at_once) as pool:
            list(pool.map(try_sync, plans))
    return tally


def whole_answer(port: int) -> bytes:
    """Return the answer with ten events as it is on the wire, its headers included."""
    with socket.create_connection(("127.0.0.1", port)) as connection:
        connection.sendall(b"GET /ndjson?interval=0 HTTP/1.1\r\nHost: localhost\r\n\r\n")
        answer = b""
        while not answer.endswith(b"\r\n0\r\n\r\n"):
            answer += connection.recv(65536)
    return answer


def main() -> None:
    """Print the table: each fault, how often it was tried, events lost and events doubled."""
    logging.disable()
    with tempfile.TemporaryDirectory() as folder:
        port = free_port()
        command = [word.replace("{port}", str(port)) for word in UVICORN]
        server = Process(command, Path(folder, "server.log"), port)
        try:
            print_table(port)
        finally:
            server.kill()


def plans(length: int) -> dict[str, list[list[Fault]]]:
    """Return what is tried on an answer of so many bytes: the rows of the table."""
    every = range(length + 1)
    anything = random.Random(1)
    kinds: list[Any] = ["cut", "reset", "stall", "trickle", "502", "503"]
    return {
        "cut (FIN) after each byte of the answer, headers included": [
            [Fault("cut", n)] for n in every
        ],
        "cut (RST) after each byte": [[Fault("reset", n)] for n in every],
        "open but silent, after each tenth byte": [[Fault("stall", n)] for n in every[::10]],
        "a byte at a time": [[Fault("trickle")]] * 20,
        "cut, then 502 three times": [[Fault("cut", 700)] + [Fault("502")] * 3] * 100,
        "cut, then 503 three times": [[Fault("cut", 700)] + [Fault("503")] * 3] * 100,
        "one to six of these, one after the other": [
            [
                Fault(anything.choice(kinds), anything.randrange(length))
                for _ in range(anything.randint(1, 6))
            ]
            for _ in range(200)
        ],
    }


def print_table(port: int) -> None:
    proxy = FaultProxy(port)
    print("| fault | times tried, with each reader | lost | doubled |\n| --- | --- | --- | --- |")
    for name, tries in plans(len(whole_answer(port))).items():
        tallies = [
            try_all(client, proxy, tries, at_once=8) for client in ("client_sync", "client_async")
        ]
        lost = sum(tally.lost for tally in tallies)
        doubled = sum(tally.doubled for tally in tallies)
        print(f"| {name} | {len(tries)} | {lost} | {doubled} |", flush=True)


if __name__ == "__main__":
    main()
