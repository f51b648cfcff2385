"""Pull the plug on recipes/long_task again and again, and see what its readers lose or get twice.

Run `python -m tests.faults.long_task`: ten minutes. It prints a Markdown table, of SQLite and of
PostgreSQL. The tests run each of these faults in short.
"""

import itertools
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import psycopg
import requests
from urllib3 import Retry

from tests.support.event_sources import EventSource, EventSources, event_sources
from tests.support.postgres import Postgres, running_postgres
from tests.support.processes import ENVIRONMENT, LIMIT, ROOT, Process, free_port, wait_for

RECORDED = (sys.executable, "-m", "uvicorn", "tests.support.recorded_work:app", "--port", "{port}")
FAILING = 0.125  # seconds for each part of a task that fails in its third
LOSING = 0.25  # seconds for each part of a task whose first result is hard to keep

# Sends a request again when the answer is 503: on a busy machine SQLite, too, may need 4 seconds.
PATIENT = requests.Session()
again = Retry(12, connect=0, read=0, allowed_methods=None, status_forcelist=[503])
PATIENT.mount("http://", requests.adapters.HTTPAdapter(max_retries=again))


# The servers and the readers ----------------------------------------------------------------------


class Part(NamedTuple):
    """That a part of a task was begun, and in which process."""

    task_id: str
    part: int
    pid: int


class Reader(EventSource):
    """Reads a task's stream."""

    def __init__(self, server: Process, task_id: str) -> None:
        super().__init__(server.port, f"/tasks/{task_id}/events")
        self.task_id = task_id

    def wait_for_part(self, part: int) -> None:
        wait_for(lambda: len(self.events) > part, f"part {part}")

    def wait(self, status: str = "done") -> dict[str, Any]:
        """Wait for the end; return the task. Each part must have come before it, once, in order."""
        wait_for(lambda: self.events and self.events[-1].name == "end", "the task's end")
        *parts, end = self.events
        task: dict[str, Any] = json.loads(end.data)
        assert (task["status"], task["done"]) == (status, len(parts))
        assert status != "done" or task["done"] == task["parts"]
        assert [event.id for event in self.events] == [str(n) for n in range(len(self.events))]
        assert [json.loads(event.data)["done"] for event in parts] == [*range(1, len(parts) + 1)]
        return task


class Place:
    """A directory and a database, and the servers that work there, their work on record."""

    def __init__(
        self, tmp: Path, sources: EventSources, database_url: str, environment: dict[str, str]
    ) -> None:
        self.tmp = tmp
        self.sources = sources
        self.database_url = database_url or f"sqlite:///{tmp / 'tasks.sqlite'}"
        self.work_log = tmp / "work.log"
        self.work_log.touch()
        self.environment = {
            **{"DATABASE_URL": self.database_url, "WORK_LOG": str(self.work_log)},
            **{"FAILING": str(FAILING), "LOSING": str(LOSING)},
            **environment,
        }
        self.all: list[Process] = []

    def serve(self, *options: str, cwd: Path = ROOT) -> Process:
        """Start a server, on a port of its own."""
        port = free_port()
        words = [word.replace("{port}", str(port)) for word in (*RECORDED, *options)]
        log = self.tmp / f"server-{len(self.all)}.log"
        server = Process(words, log, port, cwd=cwd, env=ENVIRONMENT | self.environment)
        self.all.append(server)
        return server

    def servers(self, count: int) -> list[Process]:
        """Let exactly so many servers run, and return them."""
        for server in self.all[count:]:
            server.kill()
        for server in self.all[:count]:
            if server.popen.poll() is not None:
                server.start()
        while len(self.all) < count:
            self.serve()
        return self.all[:count]

    def server(self) -> Process:
        """Let exactly one server run, and return it."""
        return self.servers(1)[0]

    def start(self, server: Process, parts: int, seconds: float, key: str = "") -> Reader:
        """Start a task, and read it."""
        headers = {"Idempotency-Key": key or uuid.uuid4().hex}
        body = {"parts": parts, "seconds": seconds}
        answer = PATIENT.post(f"{server.url}/tasks", json=body, headers=headers, timeout=LIMIT)
        assert answer.status_code == 202, answer.text
        return self.read(server, answer.json()["task_id"])

    def read(self, server: Process, task_id: str) -> Reader:
        reader = Reader(server, task_id)
        self.sources.loop.call_soon_threadsafe(reader.open)
        return reader

    def work(self) -> list[Part]:
        """Return the parts that were begun, in order."""
        lines = [line.split() for line in self.work_log.read_text().splitlines()]
        return [Part(task_id, int(part), int(pid)) for task_id, part, pid in lines]

    def begun(self, task_id: str) -> Counter[int]:
        """Return how often each part of a task was begun."""
        return Counter(part.part for part in self.work() if part.task_id == task_id)

    def wait_until_begun(self, task_id: str, part: int, times: int = 1) -> None:
        wait_for(lambda: self.begun(task_id)[part] >= times, f"part {part} to begin")

    def workers(self, task_id: str) -> list[int]:
        """Return the processes that began its parts, in order."""
        return [part.pid for part in self.work() if part.task_id == task_id]


@contextmanager
def place(database_url: str = "", **environment: str) -> Iterator[Place]:
    """Make a place in a directory of its own; its servers are killed in the end."""
    with tempfile.TemporaryDirectory() as tmp, event_sources() as sources:
        here = Place(Path(tmp), sources, database_url, environment)
        try:
            yield here
        finally:
            here.servers(0)


# The faults ---------------------------------------------------------------------------------------


def kill_at_random(here: Place, parts: int, kills: int) -> str:
    """Kill the server at random moments of a task, and between its last part and its end."""
    server = here.server()
    server.options["env"]["PAUSE_AFTER"] = str(parts)  # or it may end before the last kill
    server.kill()
    server.start()
    reader = here.start(server, parts, 0.02)
    for part in sorted(random.sample(range(parts - 1), kills)):
        here.wait_until_begun(reader.task_id, part)
        time.sleep(random.uniform(0, 0.05))  # anywhere in the part and in its two writes
        server.kill()
        server.start()
    reader.wait_for_part(parts - 1)
    server.kill()
    assert len(reader.events) == parts, "it has not ended"
    del server.options["env"]["PAUSE_AFTER"]
    server.start()
    reader.wait()
    begun = here.begun(reader.task_id)
    assert set(begun) == set(range(parts))
    return f"{kills + 1} times; {begun.total() - parts} parts were done again"


def die_in_a_part(here: Place) -> str:
    """Stop a server in a part with SIGTERM, which is no death; then kill it there three times."""
    server = here.server()
    reader = here.start(server, 2, 50)
    for times in range(1, 5):
        here.wait_until_begun(reader.task_id, 0, times)
        asked = time.monotonic()
        if times == 1:
            server.signal(signal.SIGTERM)
            assert server.wait() == -signal.SIGTERM
            assert "never retrieved" not in server.log  # a traceback of asyncio
            took = time.monotonic() - asked
        else:
            server.kill()
        server.start()
    error = reader.wait("failed")["error"]
    assert here.begun(reader.task_id) == {0: 4}
    return f"down after {took:.1f} s; {error}"


def save_the_code(here: Place, tasks: int, readers: int) -> str:
    """Edit the workflow of a server that is busy and runs with `--reload`."""
    code = here.tmp / "code"
    # Other tests' servers put bytecode there meanwhile, by way of files that are soon gone.
    for name in ("recipes", "page"):
        shutil.copytree(ROOT / name, code / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("main.py", "tests/__init__.py", "tests/support/__init__.py"):
        (code / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, code / name)
    shutil.copy(ROOT / "tests/support/recorded_work.py", code / "tests/support")
    server = here.serve("--reload", cwd=code)
    firsts = [here.start(server, 10, 0.4) for _ in range(tasks)]
    others = [here.read(server, reader.task_id) for reader in firsts * (readers - 1)]
    for reader in firsts + others:
        reader.wait_for_part(0)
    recipe = code / "recipes/long_task.py"
    old, new = 'return {"seconds": worked}', 'return {"seconds": worked, "edited": True}'
    assert old in recipe.read_text()
    saved = time.monotonic()
    recipe.write_text(recipe.read_text().replace(old, new))
    server.wait_for_log("Application startup complete", count=2)
    took = time.monotonic() - saved
    results = [reader.wait()["result"] for reader in firsts + others]
    assert any("edited" in result for result in results), "the new code goes on"
    return f"{len(results)} readers; up again after {took:.1f} s"


def hang(here: Place, seconds: float) -> str:
    """Let a server hang in a part: it keeps its task."""
    servers = here.servers(2)
    reader = here.start(servers[0], 4, 0.5)
    reader.wait_for_part(0)
    (pid,) = set(here.workers(reader.task_id))
    os.kill(pid, signal.SIGSTOP)
    time.sleep(seconds)  # nothing that could be waited for should happen
    os.kill(pid, signal.SIGCONT)
    reader.wait()
    assert set(here.begun(reader.task_id).values()) == {1}
    return f"each part was done once, also after it hung for {seconds:.0f} s"


def lose_one_of_two(here: Place) -> str:
    """Kill one of two servers for good."""
    lost, other = here.servers(2)
    readers: list[Reader] = []
    # Whichever asks first gets a task: start some until the one that will be lost has just got one.
    while not any(here.workers(reader.task_id)[-1] == lost.pid for reader in readers[-1:]):
        task_id = here.start(lost, 8, 0.3).task_id
        readers.append(here.read(other, task_id))
        readers[-1].wait_for_part(0)
    lost.kill()
    for reader in readers:
        reader.wait()
    assert set(here.workers(readers[-1].task_id)) == {lost.pid, other.pid}
    silence = max(b - a for reader in readers for a, b in itertools.pairwise(reader.times))
    return f"the other went on after {silence:.0f} s"


def use_two_servers(here: Place, parts: int) -> str:
    """Start a task on one server; on the other start it again, with its key, and cancel it."""
    servers = here.servers(2)
    key = uuid.uuid4().hex
    readers = [here.start(server, 900, 0.2, key) for server in servers]
    (task_id,) = {reader.task_id for reader in readers}
    for reader in readers:
        reader.wait_for_part(parts - 1)
    (pid,) = set(here.workers(task_id))
    (other,) = (server for server in servers if server.pid != pid)
    asked = time.monotonic()
    answer = PATIENT.delete(f"{other.url}/tasks/{task_id}", timeout=LIMIT)
    assert answer.status_code == 202
    for reader in readers:
        reader.wait("cancelled")
    took = max(reader.times[-1] for reader in readers) - asked
    return f"cancelled on the other, it ended for all readers after {took * 1000:.0f} ms"


@contextmanager
def killed(postgres: Postgres) -> Iterator[None]:
    postgres.kill()
    yield
    postgres.start()


@contextmanager
def hanging(postgres: Postgres) -> Iterator[None]:
    """It takes connections, but says nothing."""
    postgres.signal(signal.SIGSTOP, everyone=True)
    yield
    postgres.signal(signal.SIGCONT, everyone=True)


@contextmanager
def read_only(postgres: Postgres) -> Iterator[None]:
    """As after a failover."""
    with psycopg.connect(postgres.database_url, autocommit=True) as connection:
        connection.execute("SET default_transaction_read_only = off")
        connection.execute("ALTER SYSTEM SET default_transaction_read_only = on")
        connection.execute("SELECT pg_reload_conf()")
        yield
        connection.execute("ALTER SYSTEM RESET default_transaction_read_only")
        connection.execute("SELECT pg_reload_conf()")


@contextmanager
def without_a_table(postgres: Postgres) -> Iterator[None]:
    """As while somebody restores it."""
    with psycopg.connect(postgres.database_url, autocommit=True) as connection:
        connection.execute("ALTER TABLE dbos.workflow_status RENAME TO elsewhere")
        yield
        connection.execute("ALTER TABLE dbos.elsewhere RENAME TO workflow_status")


Away = Callable[[Postgres], AbstractContextManager[None]]


def take_the_database_away(here: Place, postgres: Postgres, away: Away, seconds: float) -> str:
    """Take the database from a task and its reader for so many seconds."""
    server = here.server()
    url, body = f"{server.url}/tasks", {"parts": 1, "seconds": 0}
    reader = here.start(server, 6, 0.5)
    task = f"{url}/{reader.task_id}"
    reader.wait_for_part(1)
    key = uuid.uuid4().hex
    with away(postgres):
        back = time.monotonic() + seconds
        # The connections that are open are told by and by.
        wait_for(lambda: requests.get(task, timeout=LIMIT).status_code == 503, "503")
        with ThreadPoolExecutor() as pool:
            asked = [
                pool.submit(requests.get, task, timeout=LIMIT),
                pool.submit(requests.get, f"{task}/events", timeout=LIMIT),
                pool.submit(
                    requests.post, url, json=body, headers={"Idempotency-Key": key}, timeout=LIMIT
                ),
                pool.submit(requests.delete, task, timeout=LIMIT),
            ]
        answers = [each.result() for each in asked]
        for answer in answers:
            assert (answer.status_code, answer.headers.get("Retry-After")) == (503, "5")
        slowest = max(answer.elapsed.total_seconds() for answer in answers)
        assert slowest < 5
        comments = reader.comments
        wait_for(lambda: reader.comments > comments, "a keep-alive comment")
        time.sleep(max(0, back - time.monotonic()))
        seen = len(reader.events)
    started = time.monotonic()
    wait_for(lambda: len(reader.events) > seen, "the task to go on")
    took = time.monotonic() - started
    reader.wait()
    assert reader.opened == 1
    # Whether the POST was carried out, nobody knows. Sent again, with its key, it is done once.
    again = here.start(server, 1, 0, key)
    again.wait()
    assert here.begun(again.task_id) == {0: 1}
    assert "Traceback" not in server.log
    return f"{seconds:.0f} s; 503 within {slowest:.1f} s; it went on {took:.1f} s after its return"


# The table ----------------------------------------------------------------------------------------


AWAY = (killed, hanging, read_only, without_a_table)
BOTH: dict[str, Callable[[Place], str]] = {
    "`kill -9` at random moments, and before the end": partial(kill_at_random, parts=300, kills=8),
    "SIGTERM, then `kill -9` three times, in a part": die_in_a_part,
    "`--reload`: the workflow is edited": partial(save_the_code, tasks=10, readers=10),
    "a server hangs": partial(hang, seconds=60),
}
ALONE: dict[str, Callable[[Place, Postgres], str]] = {
    "two servers": lambda here, _: use_two_servers(here, 20),
    "one of two servers killed": lambda here, _: lose_one_of_two(here),
    **{
        f"PostgreSQL: {away.__name__.replace('_', ' ')}": partial(
            take_the_database_away, away=away, seconds=35
        )
        for away in AWAY
    },
}


def main() -> None:
    print("| fault | SQLite | PostgreSQL |\n| --- | --- | --- |")
    with running_postgres() as postgres:
        for name, fault in BOTH.items():
            with (
                place() as here,
                place(postgres.database_url) as there,
                ThreadPoolExecutor() as pool,
            ):
                print(f"| {name} | {' | '.join(pool.map(fault, (here, there)))} |", flush=True)
        for name, fault_alone in ALONE.items():
            with place(postgres.database_url, KEEP_ALIVE="1") as there:
                print(f"| {name} | – | {fault_alone(there, postgres)} |", flush=True)


if __name__ == "__main__":
    main()
