"""How soon recipes/tail.py notices a line, and what it needs while nothing is written.

Run it with `python bench/tail.py` (four minutes, on a machine that does nothing else), or with
`--quick` to see that it works. It prints a table, and writes tail.json and tail.md.
"""

import argparse
import asyncio
import itertools
import json
import os
import re
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median, quantiles
from typing import Any

from load import Server, free_port, listening
from run import heading, table

HERE = Path(__file__).parent
BURST = 100_000  # lines


@contextmanager
def running(log: Path) -> Iterator[Server]:
    """The recipe, on this log."""
    port = free_port()
    command = [sys.executable, "-m", "uvicorn", "recipes.tail:app", "--port", str(port)]
    command += ["--no-access-log", "--log-level", "warning"]
    environment = {**os.environ, "LOG": str(log)}
    with listening("The recipe", command, port, cwd=HERE.parent, env=environment) as process:
        yield Server(port, process.pid)


class Reader(asyncio.Protocol):
    """Reads from now on. A line that is a time (of `time.perf_counter`) was written then."""

    def __init__(self, late: list[float]) -> None:
        self.late = late
        self.rest = b""
        self.begun = asyncio.get_running_loop().create_future()
        self.burst = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: Any) -> None:
        transport.write(b"GET /log?lines=0 HTTP/1.1\r\nHost: bench\r\n\r\n")

    def data_received(self, data: bytes) -> None:
        now = time.perf_counter()
        if b"retry:" in data and not self.begun.done():
            self.begun.set_result(None)
        *lines, self.rest = (self.rest + data).split(b"\n")
        for line in lines:
            if line == b"data: the end of the burst":
                self.burst.set_result(None)
            elif found := re.match(rb"data: (\d+\.\d+)", line):
                self.late.append(now - float(found[1]))


def append(log: Path, text: str) -> None:
    with log.open("a") as file:
        file.write(text)


async def write_beside(log: Path) -> None:
    """Write 200 lines a second to ten other files in the log's folder."""
    for number in itertools.count():
        append(log.with_name(f"other-{number % 10}.log"), "a line of another log\n" * 2)
        await asyncio.sleep(0.01)


async def look(
    server: Server, log: Path, readers: int, lines: int, quiet: float, busy: bool = False
) -> dict[str, Any]:
    """With so many readers: `quiet` seconds of silence, then single lines, then a burst.

    `busy`: meanwhile, other files in the same folder are written to.
    """
    writing = asyncio.create_task(write_beside(log)) if busy else None
    late: list[float] = []
    before = server.memory()
    loop = asyncio.get_running_loop()
    connections = []
    for _ in range(readers):
        transport, reader = await loop.create_connection(
            lambda: Reader(late), "127.0.0.1", server.port
        )
        await reader.begun
        connections.append((transport, reader))
    memory = server.memory() - before
    cpu = server.cpu()
    await asyncio.sleep(quiet)
    idle = (server.cpu() - cpu) / quiet
    for number in range(lines):
        append(log, f"{time.perf_counter():.6f}\n")
        await asyncio.sleep(0.2 + number % 7 * 0.01)
    for _ in range(100):  # the last line may still be on its way
        if len(late) < readers * lines:
            await asyncio.sleep(0.1)
    if writing:
        writing.cancel()
    seen: dict[str, Any] = {"readers": readers, "busy": busy, "idle": idle, "memory": memory}
    if readers:
        cuts = quantiles(late, n=100, method="inclusive")
        seen |= {"lost": readers * lines - len(late), "late": [median(late), cuts[98], max(late)]}
    if readers == 1 and not busy:
        start = time.perf_counter()
        append(log, "a line of the burst, and some text\n" * (BURST - 1) + "the end of the burst\n")
        await connections[0][1].burst
        seen["burst"] = time.perf_counter() - start
    for transport, _ in connections:
        transport.close()
    return seen


def measure(readers: tuple[int, ...], lines: int, quiet: float) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as directory:
        log = Path(directory) / "app.log"
        log.touch()
        with running(log) as server:
            # Whatever is imported or cached with the first reader.
            asyncio.run(look(server, log, 1, 2, 0.1))
            seen = [asyncio.run(look(server, log, count, lines, quiet)) for count in readers]
            seen.append(asyncio.run(look(server, log, readers[-2], lines, quiet, busy=True)))
    return {"heading": heading(), "lines": lines, "seen": seen}


def render(results: dict[str, Any]) -> str:
    """The table of tail.md, from what is in tail.json."""
    about = results["heading"]
    rows = []
    for seen in results["seen"]:
        late = [f"{value * 1000:.0f}" for value in seen.get("late", ())] or ["", "", ""]
        memory = f"{seen['memory'] / seen['readers'] / 1000:.0f}" if seen["readers"] > 1 else ""
        lost = str(seen.get("lost", ""))
        folder = "200 lines a second" if seen["busy"] else ""
        rows.append(
            [f"{seen['readers']:,}", folder, f"{seen['idle'] * 100:.2f}", *late, lost, memory]
        )
    head = [
        "readers",
        "other files",
        "idle CPU %",
        "late p50 ms",
        "p99 ms",
        "max ms",
        "lost",
        "KB for a reader",
    ]
    (burst,) = (seen["burst"] for seen in results["seen"] if "burst" in seen)
    return (
        f"Measured on {about['date']}: {about['machine']}. {about['versions']}.\n\n"
        f"{table(head, rows)}\n\n"
        f"A burst of {BURST:,} lines was with its reader in {burst:.2f} s.\n"
    )


def main() -> None:
    """Measure, print the table, and write it down."""
    parser = argparse.ArgumentParser(description="Measure how soon a log's lines are noticed.")
    parser.add_argument("--quick", action="store_true", help="small numbers, which say nothing")
    arguments = parser.parse_args()
    quick, full = ((0, 1, 10), 3, 1.0), ((0, 1, 100, 900), 100, 20.0)
    results = measure(*(quick if arguments.quick else full))
    print(render(results))
    if not arguments.quick:
        (HERE / "tail.json").write_text(json.dumps(results, indent=1) + "\n")
        (HERE / "tail.md").write_text(render(results))


if __name__ == "__main__":
    main()
