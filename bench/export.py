"""What recipes/export.py needs for a table, beside `sqlite3 -csv`, in one run.

Run it with `python bench/export.py` (three minutes, on a machine that does nothing else), or with
`--quick` to see that it works. It prints a table, and writes export.json and export.md. The rounds
are interleaved, because the speed of a machine drifts; the table shows medians.
"""

import argparse
import http.client
import json
import os
import shutil
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median, quantiles
from typing import Any

from load import Server, free_port, listening
from run import heading, table

sys.path.append(str(Path(__file__).parents[1]))
from recipes.export import PAGE, fill, select

HERE = Path(__file__).parent

# More, and Python's garbage collection makes a full collection every hundred batches: 40 ms.
# https://docs.python.org/3/library/gc.html#gc.set_threshold
BATCH = 500
LIBRARIES = "polars", "adbc-driver-sqlite"
ONE_ROW = 50  # one row at a time is tried on a part of the table only: rows / 50


@contextmanager
def running(file: Path) -> Iterator[Server]:
    """The recipe, on this database."""
    port = free_port()
    command = [sys.executable, "-m", "uvicorn", "rows:app", "--port", str(port)]
    command += ["--log-level", "warning", "--app-dir", str(HERE / "servers")]
    environment = {"DATABASE_URL": f"sqlite:///{file}", "PYTHONPATH": str(HERE.parent)}
    with listening("The recipe", command, port, env={**os.environ, **environment}) as process:
        yield Server(port, process.pid)


def seconds(*command: str) -> float:
    start = time.perf_counter()
    subprocess.run(command, stdout=subprocess.DEVNULL, check=True)
    return time.perf_counter() - start


def download(server: Server, target: str, idle: int = 0) -> dict[str, float]:
    """Read it with curl, and meanwhile ask the same worker for something else, again and again.

    `idle` is its memory without a download, in bytes. Times are in seconds.
    """
    most, others = 0, [0.0, 0.0]
    over = threading.Event()

    def look() -> None:
        nonlocal most
        connection = http.client.HTTPConnection("127.0.0.1", server.port)
        while not over.wait(0.01):
            start = time.perf_counter()
            connection.request("GET", "/nothing")
            connection.getresponse().read()
            others.append(time.perf_counter() - start)
            most = max(most, server.memory())
        connection.close()

    thread = threading.Thread(target=look)
    thread.start()
    curl = subprocess.run(
        [
            *("curl", "--silent", "--fail", "--output", os.devnull),
            *("--write-out", "%{time_total} %{time_starttransfer}"),
            f"http://127.0.0.1:{server.port}{target}",
        ],
        capture_output=True,
        text=True,
        check=True,
    )
    over.set()
    thread.join()
    total, first = map(float, curl.stdout.split())
    return {
        "seconds": total,
        "first": first,
        "memory": most - idle,
        "others_p99": quantiles(others, n=100, method="inclusive")[98],
        "others_max": max(others),
    }


def measure(rows: int, rounds: int) -> dict[str, Any]:
    seen: dict[str, list[dict[str, float]]] = {}
    with tempfile.TemporaryDirectory() as directory:
        file = Path(directory) / "orders.db"
        with sqlite3.connect(file) as connection:
            fill(connection.execute, rows)
        with running(file) as server, running(file) as peer:
            after = rows - rows // ONE_ROW
            idle, peers_idle = server.memory(), peer.memory()
            ways: dict[str, Callable[[], dict[str, float]]] = {
                "cli": lambda: {"seconds": seconds("sqlite3", "-csv", str(file), select(None))},
                "modules": lambda: download(peer, f"/rows.csv?batch={BATCH}", peers_idle),
                "csv": lambda: download(server, "/orders.csv", idle),
                "ndjson": lambda: download(server, "/orders.ndjson", idle),
                "page": lambda: download(server, f"/orders.csv?after={after}"),
                "batches": lambda: download(peer, f"/rows.csv?batch={BATCH}&after={after}"),
                "one_row": lambda: download(peer, f"/rows.csv?batch=1&after={after}"),
            }
            for _ in range(rounds):
                for name, way in ways.items():
                    seen.setdefault(name, []).append(way())
    return {"heading": heading(*LIBRARIES), "rows": rows, "part": rows // ONE_ROW, "seen": seen}


def render(results: dict[str, Any]) -> str:
    """The tables of export.md, from what is in export.json."""
    seen, about = results["seen"], results["heading"]

    def middle(name: str, key: str = "seconds") -> float:
        return float(median(round_[key] for round_ in seen[name]))

    def worst(name: str, key: str) -> float:
        return float(max(round_[key] for round_ in seen[name]))

    def line(title: str, name: str) -> list[str]:
        return [
            title,
            f"{middle(name):.2f}",
            f"{middle(name) / middle('cli'):.1f}",
            f"{worst(name, 'first') * 1000:.0f}",
            f"{worst(name, 'memory') / 1e6:.1f}",
            f"{middle(name, 'others_p99') * 1000:.0f}",
            f"{worst(name, 'others_max') * 1000:.0f}",
        ]

    whole = table(
        ["all rows", "s", "× sqlite3", "first byte ms", "MB above idle", "others p99 ms", "max ms"],
        [
            ["`sqlite3 -csv`, no HTTP", f"{middle('cli'):.2f}", "1.0", "", "", "", ""],
            line("`/orders.csv`", "csv"),
            line("`/orders.ndjson`", "ndjson"),
            line(f"`sqlite3` and `csv` of Python, {BATCH} rows at a time", "modules"),
        ],
    )
    part = results["part"]
    batches = table(
        ["CSV", "rows a second", "µs for a row"],
        [
            [title, f"{part / middle(name):,.0f}", f"{middle(name) / part * 1e6:.1f}"]
            for title, name in (
                (f"`/orders.csv`, {PAGE:,} rows at a time", "page"),
                (f"`sqlite3` and `csv` of Python, {BATCH} rows at a time", "batches"),
                ("the same, one row at a time", "one_row"),
            )
        ],
    )
    return (
        f"Measured on {about['date']}: {about['machine']}. {about['versions']}.\n\n"
        f"{results['rows']:,} rows:\n\n{whole}\n\n"
        f"The last {part:,} rows:\n\n{batches}\n"
    )


def main() -> None:
    """Measure, print the tables, and write them down."""
    parser = argparse.ArgumentParser(description="Measure what the downloads of a table cost.")
    parser.add_argument("--quick", action="store_true", help="small numbers, which say nothing")
    arguments = parser.parse_args()
    if not shutil.which("sqlite3"):
        raise SystemExit("sqlite3 is not installed: apt-get install sqlite3")
    results = measure(10_000, 1) if arguments.quick else measure(1_000_000, 7)
    print(render(results))
    if not arguments.quick:
        (HERE / "export.json").write_text(json.dumps(results, indent=1) + "\n")
        (HERE / "export.md").write_text(render(results))


if __name__ == "__main__":
    main()
