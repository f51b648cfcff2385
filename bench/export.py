"""What recipes/export.py needs for a table, beside `sqlite3 -csv`, in one run.

Run it with `python bench/export.py` (two minutes, on a machine that does nothing else), or with
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
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from statistics import median, quantiles
from typing import Any

from load import Server, free_port, listening
from run import heading, table

HERE = Path(__file__).parent
SQL = (HERE.parent / "recipes" / "orders.sql").read_text()
SELECT = "SELECT id, customer, note, quantity, cents FROM orders ORDER BY id"
WAYS = {
    "csv": ("many", "/orders.csv"),
    "ndjson": ("many", "/orders.ndjson"),
    "large csv": ("large", "/orders.csv"),
    "large ndjson": ("large", "/orders.ndjson"),
}


@contextmanager
def running(file: Path) -> Iterator[Server]:
    """The recipe, on this database."""
    port = free_port()
    command = [sys.executable, "-m", "uvicorn", "recipes.export:app", "--port", str(port)]
    command += ["--log-level", "warning"]
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


def fill(file: Path, rows: int, note: str = "") -> None:
    """Make the table, with this in the place of each note."""
    with closing(sqlite3.connect(file)) as connection:
        connection.executescript(SQL.replace("1000000", str(rows)))
        if note:
            connection.execute("UPDATE orders SET note = ?", (note,))
            connection.commit()


def measure(rows: int, rounds: int) -> dict[str, Any]:
    seen: dict[str, list[dict[str, float]]] = {}
    with tempfile.TemporaryDirectory() as directory:
        many, large = Path(directory) / "many.db", Path(directory) / "large.db"
        fill(many, rows)
        fill(large, rows // 500, "x" * 100_000)
        with running(many) as of_many, running(large) as of_large:
            servers = {"many": of_many, "large": of_large}
            idle = {name: server.memory() for name, server in servers.items()}
            for _ in range(rounds):
                for name, file in (("cli", many), ("large cli", large)):
                    took = seconds("sqlite3", "-csv", str(file), SELECT)
                    seen.setdefault(name, []).append({"seconds": took})
                for way, (name, path) in WAYS.items():
                    seen.setdefault(way, []).append(download(servers[name], path, idle[name]))
    return {"heading": heading("psycopg"), "rows": rows, "seen": seen}


def render(results: dict[str, Any]) -> str:
    """The tables of export.md, from what is in export.json."""
    seen, about, rows = results["seen"], results["heading"], results["rows"]

    def middle(name: str, key: str = "seconds") -> float:
        return float(median(round_[key] for round_ in seen[name]))

    def worst(name: str, key: str) -> float:
        return float(max(round_[key] for round_ in seen[name]))

    def line(title: str, name: str, cli: str) -> list[str]:
        return [
            title,
            f"{middle(name):.2f}",
            f"{middle(name) / middle(cli):.1f}",
            f"{worst(name, 'first') * 1000:.0f}",
            f"{worst(name, 'memory') / 1e6:.1f}",
            f"{middle(name, 'others_p99') * 1000:.0f}",
            f"{worst(name, 'others_max') * 1000:.0f}",
        ]

    names = ["s", "× sqlite3", "first byte ms", "MB above idle", "others p99 ms", "max ms"]
    text = f"Measured on {about['date']}: {about['machine']}. {about['versions']}.\n"
    for title, before in (
        (f"{rows:,} rows", ""),
        (f"{rows // 500:,} rows of 100 KB", "large "),
    ):
        cli = f"{before}cli"
        lines = [
            ["`sqlite3 -csv`, no HTTP", f"{middle(cli):.2f}", "1.0", "", "", "", ""],
            line("`/orders.csv`", f"{before}csv", cli),
            line("`/orders.ndjson`", f"{before}ndjson", cli),
        ]
        text += f"\n{table([title, *names], lines)}\n"
    return text


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
