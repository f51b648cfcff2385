"""What recipes/long_task.py needs for a hundred tasks with a reader each, and when idle.

Run it with `python bench/long_task.py` (three minutes, on a machine that does nothing else), or
with `--quick` to see that it works. It prints a table, writes long_task.json and long_task.md, and
puts the table into README.md. PostgreSQL must be installed.
"""

import argparse
import asyncio
import json
import os
import re
import sqlite3
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterable
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import psycopg
from load import Server, free_port, listening
from run import heading, table

HERE = Path(__file__).parent
sys.path.append(str(HERE.parent))
from tests.support.postgres import running_postgres  # noqa: E402

STEPS = "SELECT workflow_uuid, function_id, completed_at_epoch_ms FROM {}operation_outputs"
CONNECTIONS = "SELECT count(*) FROM pg_stat_activity WHERE backend_type = 'client backend'"


def start_task(port: int, parts: int) -> str:
    body = json.dumps({"parts": parts, "seconds": 1}).encode()
    request = urllib.request.Request(f"http://127.0.0.1:{port}/tasks", body)
    request.add_header("Content-Type", "application/json")
    with urllib.request.urlopen(request) as answer:
        return str(json.load(answer)["task_id"])


async def read(port: int, task_id: str, seen: dict[tuple[str, int], float]) -> None:
    """Note when each part of a task was seen, until its end."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(b"GET /tasks/%s/events HTTP/1.1\r\nHost: bench\r\n\r\n" % task_id.encode())
    async for line in reader:
        if line.startswith(b"event: end"):
            break
        if found := re.match(rb'data: {"done": (\d+)', line):
            seen[task_id, int(found[1])] = time.time()
    writer.close()


async def look(server: Server, tasks: int, parts: int, quiet: float) -> dict[str, Any]:
    """Leave it alone for `quiet` seconds, then run so many tasks of one-second parts."""
    await asyncio.sleep(quiet / 10)  # what comes with the start
    before, cpu = time.perf_counter(), server.cpu()
    await asyncio.sleep(quiet)
    idle = (server.cpu() - cpu) / (time.perf_counter() - before)
    seen: dict[tuple[str, int], float] = {}
    task_ids = [await asyncio.to_thread(start_task, server.port, parts) for _ in range(tasks)]
    before, cpu = time.perf_counter(), server.cpu()
    await asyncio.gather(*(read(server.port, task_id, seen) for task_id in task_ids))
    busy = (server.cpu() - cpu) / (time.perf_counter() - before)
    return {"idle": idle, "busy": busy, "seen": seen}


def measure_one(database: str, url: str, tasks: int, parts: int, quiet: float) -> dict[str, Any]:
    port = free_port()
    command = [sys.executable, "-m", "uvicorn", "recipes.long_task:app", "--port", str(port)]
    command += ["--no-access-log", "--log-level", "warning"]
    environment = {**os.environ, "DATABASE_URL": url}
    with listening("The recipe", command, port, cwd=HERE.parent, env=environment) as process:
        looked = asyncio.run(look(Server(port, process.pid), tasks, parts, quiet))
        if database == "SQLite":
            connections = None
            file = url.removeprefix("sqlite:///")
            steps: Iterable[Any] = sqlite3.connect(file).execute(STEPS.format(""))
        else:
            connection = psycopg.connect(url)
            (row,) = connection.execute(CONNECTIONS)
            connections = row[0] - 1
            steps = connection.execute(STEPS.format("dbos."))
        done = {(task_id, number): stamp / 1000 for task_id, number, stamp in steps}
    seen = looked.pop("seen")
    late = [seen[part] - done[part] for part in done if part in seen]
    cuts = quantiles(late, n=100, method="inclusive")
    lost = tasks * parts - len(late)
    late = [median(late), cuts[98], max(late)]
    return {"database": database, **looked, "late": late, "lost": lost, "connections": connections}


def measure(tasks: int, parts: int, quiet: float) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as directory, running_postgres() as postgres:
        urls = {"SQLite": f"sqlite:///{directory}/tasks", "PostgreSQL": postgres.database_url}
        seen = [measure_one(name, url, tasks, parts, quiet) for name, url in urls.items()]
    return {
        "heading": heading("dbos", "sqlalchemy", "psycopg"),
        "tasks": tasks,
        "parts": parts,
        "seen": seen,
    }


def render(results: dict[str, Any]) -> str:
    """The table of long_task.md, from what is in long_task.json."""
    about = results["heading"]
    rows = []
    for seen in results["seen"]:
        late = [f"{value * 1000:.0f}" for value in seen["late"]]
        connections = "–" if seen["connections"] is None else str(seen["connections"])
        cpu = [f"{seen[name] * 100:.1f}" for name in ("idle", "busy")]
        rows.append([seen["database"], *cpu, *late, str(seen["lost"]), connections])
    head = ["database", "idle CPU %", "busy CPU %", "late p50 ms", "p99 ms", "max ms", "lost"]
    return (
        f"Measured on {about['date']}: {about['machine']}. {about['versions']}.\n\n"
        f"{results['tasks']} tasks of {results['parts']} parts of one second, a reader each:\n\n"
        f"{table([*head, 'connections'], rows)}\n"
    )


def main() -> None:
    """Measure, print the table, and write it down."""
    parser = argparse.ArgumentParser(description="Measure what a hundred long tasks cost.")
    parser.add_argument("--quick", action="store_true", help="small numbers, which say nothing")
    arguments = parser.parse_args()
    results = measure(*((2, 2, 0.2) if arguments.quick else (100, 40, 30.0)))
    print(render(results))
    if not arguments.quick:
        (HERE / "long_task.json").write_text(json.dumps(results, indent=1) + "\n")
        (HERE / "long_task.md").write_text(render(results))
        readme = (HERE / "README.md").read_text()
        before, start, rest = readme.partition("<!-- bench/long_task.md -->\n")
        _, end, after = rest.partition("<!-- end of bench/long_task.md -->\n")
        (HERE / "README.md").write_text(before + start + render(results) + end + after)


if __name__ == "__main__":
    main()
