"""What recipes/answers.py needs for a token: many answers at once, each with one reader.

Run it with `python bench/answers.py` (seven minutes, on a machine that does nothing else), or with
`--quick` to see that it works. It prints a table, and writes answers.json, answers.md and its place
in README.md. It needs redis-server.
"""

import argparse
import asyncio
import json
import os
import re
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from statistics import median
from typing import Any

from load import Server, allow_open_files, free_port, listening
from run import heading, table

HERE = Path(__file__).parent
sys.path.append(str(HERE.parent))
from tests.support.redis_server import running_redis  # noqa: E402

RATE = 30  # tokens a second, as in servers/models.py
TOKEN = re.compile(rb"[0-9]+\.[0-9]{6} ")
CHAT = {"model": "parrot", "messages": [{"role": "user", "content": "x"}], "stream": True}
ANSWER = {"model": "parrot", "input": "x", "stream": True}
# By the name of the row: the app, its path, what is asked.
ROWS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "answers, in memory": ("answers", "/v1/responses", ANSWER),
    "answers, on Redis": ("answers", "/v1/responses", ANSWER),
    "tokens": ("tokens", "/v1/chat/completions", CHAT),
    "StreamingResponse, piping an upstream": ("pipe", "/", {}),
}


class Reader(asyncio.Protocol):
    """Asks one question, and notes how late each token is."""

    def __init__(self, path: str, body: dict[str, Any], late: list[float]) -> None:
        data = json.dumps(body).encode()
        head = f"POST {path} HTTP/1.1\r\nHost: bench\r\nContent-Type: application/json\r\n"
        self.asks = f"{head}Content-Length: {len(data)}\r\n\r\n".encode() + data
        self.late = late
        self.rest = b""

    def connection_made(self, transport: Any) -> None:
        self.transport = transport
        transport.write(self.asks)

    def data_received(self, data: bytes) -> None:
        now, end = time.perf_counter(), 0
        data = self.rest + data
        for found in TOKEN.finditer(data):
            self.late.append(now - float(found[0]))
            end = found.end()
        self.rest = data[end:][-100:]


async def look(server: Server, row: str, answers: int, seconds: float) -> dict[str, Any]:
    """Watch so many answers for some seconds, once all of them have begun."""
    _, path, body = ROWS[row]
    late: list[float] = []
    memory, loop = server.memory(), asyncio.get_running_loop()
    readers = []
    for _ in range(answers):
        _, reader = await loop.create_connection(
            lambda: Reader(path, body, late), "127.0.0.1", server.port
        )
        readers.append(reader)
        await asyncio.sleep(1 / RATE)  # not all of them at the same moment
    await asyncio.sleep(seconds / 5)
    late.clear()
    start, cpu, own = time.perf_counter(), server.cpu(), time.process_time()
    await asyncio.sleep(seconds)
    took, cpu = time.perf_counter() - start, server.cpu() - cpu
    own = time.process_time() - own
    times = sorted(late)
    seen = {
        "cpu": cpu / len(times),
        "p50": times[len(times) // 2],
        "p99": times[int(len(times) * 0.99)],
        "came": len(times) / (answers * RATE * took),
        "memory": (server.memory() - memory) / answers,
        "server": cpu / took,
        "load": own / took,
    }
    for reader in readers:
        reader.transport.abort()
    return seen


@contextmanager
def running(app: str, core: int | None, **environment: str) -> Iterator[Server]:
    port = free_port()
    command = [sys.executable, "-m", "uvicorn", "--app-dir", "bench/servers", "--factory"]
    command += [f"models:{app}", "--port", str(port), "--no-access-log", "--log-level", "warning"]
    settings = {**os.environ, "PYTHONPATH": str(HERE.parent), **environment}
    with listening(app, command, port, core, cwd=HERE.parent, env=settings) as process:
        yield Server(port, process.pid)


def measure_one(row: str, answers: int, seconds: float) -> dict[str, Any]:
    app = ROWS[row][0]
    environment = {}
    with ExitStack() as stack:
        if app == "pipe":
            upstream = stack.enter_context(running("upstream", 1))
            environment["UPSTREAM"] = f"http://127.0.0.1:{upstream.port}/"
        if row == "answers, on Redis":
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            redis = stack.enter_context(running_redis(folder, "--appendfsync", "everysec"))
            environment["REDIS_URL"] = redis.redis_url
        server = stack.enter_context(running(app, 0, **environment))
        return asyncio.run(look(server, row, answers, seconds))


def measure(answers: int, seconds: float, rounds: int) -> dict[str, Any]:
    allow_open_files(2 * answers + 100)
    seen: dict[str, list[dict[str, Any]]] = {row: [] for row in ROWS}
    for _ in range(rounds):
        for row in ROWS:
            seen[row].append(measure_one(row, answers, seconds))
    return {"heading": heading("redis", "httpx2"), "answers": answers, "seen": seen}


def render(results: dict[str, Any]) -> str:
    """The table of answers.md, from what is in answers.json: medians of the rounds."""
    about, rows = results["heading"], []
    for row, rounds in results["seen"].items():
        of = {name: median(seen[name] for seen in rounds) for name in rounds[0]}
        times = [f"{of[name] * 1000:.1f}" for name in ("p50", "p99")]
        shares = [f"{of[name] * 100:.0f}%" for name in ("came", "server", "load")]
        rows.append([row, f"{of['cpu'] * 1e6:.0f}", *times, f"{of['memory'] / 1024:.0f}", *shares])
    head = ["server", "CPU µs per token", "p50 ms", "p99 ms", "KB per answer"]
    head += ["came", "of a core", "load generator"]
    return (
        f"Measured on {about['date']}: {about['machine']}. {about['versions']}.\n\n"
        f"{results['answers']} answers of {RATE} tokens a second, each with one reader; from the "
        f"model to the reader:\n\n{table(head, rows)}\n"
    )


def main() -> None:
    """Measure, print the table, and write it down."""
    parser = argparse.ArgumentParser(description="Measure what a token of an answer costs.")
    parser.add_argument("--quick", action="store_true", help="small numbers, which say nothing")
    parser.add_argument("--answers", type=int, default=500)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    if arguments.quick:
        print(render(measure(10, 1, 1)))
        return
    results = measure(arguments.answers, 10, arguments.rounds)
    print(render(results))
    (HERE / "answers.json").write_text(json.dumps(results, indent=1) + "\n")
    (HERE / "answers.md").write_text(render(results))
    readme = (HERE / "README.md").read_text()
    before, start, rest = readme.partition("<!-- bench/answers.md -->\n")
    _, end, after = rest.partition("<!-- end of bench/answers.md -->\n")
    (HERE / "README.md").write_text(before + start + render(results) + end + after)


if __name__ == "__main__":
    main()
