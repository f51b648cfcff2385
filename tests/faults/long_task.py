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
import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import psycopg
import requests

from tests.support.postgres import Postgres, running_postgres
from tests.support.processes import ENVIRONMENT, LIMIT, ROOT, Process, free_port, wait_for

RECORDED = (sys.executable, "-m", "uvicorn", "tests.support.recorded_work:app", "--port", "{port}")
FAILING = 0.125  # seconds for each part of a task that fails in its third
SLOW = 0.25  # seconds for each part of a task whose third takes four seconds longer


# The servers and the readers ----------------------------------------------------------------------


class Entry(NamedTuple):
    """That a part of a task was begun, or ended: when, in time.time(), and in which process."""

    task_id: str
    what: str
    part: int
    time: float
    pid: int


class Place:
    """A directory and a database, and the servers that work there, their work on record."""

    def __init__(self, tmp: Path, database_url: str = "", look: str = "1") -> None:
        self.tmp = tmp
        self.look = look
        self.database_url = database_url or f"sqlite:///{tmp / 'tasks.sqlite'}"
        self.work_log = tmp / "work.log"
        self.work_log.touch()
        self.servers: list[Process] = []

    def serve(self, *options: str, cwd: Path = ROOT, **environment: str) -> Process:
        """Start a server, on a port of its own."""
        port = free_port()
        words = [word.replace("{port}", str(port)) for word in (*RECORDED, *options)]
        own = {"DATABASE_URL": self.database_url, "WORK_LOG": str(self.work_log)}
        own |= {"FAILING": str(FAILING), "SLOW": str(SLOW), "LOOK": self.look}
        log = self.tmp / f"server-{len(self.servers)}.log"
        server = Process(words, log, port, cwd=cwd, env=ENVIRONMENT | own | environment)
        self.servers.append(server)
        return server

    def worked(self, what: str) -> list["Entry"]:
        """What is on record."""
        lines = [line.split() for line in self.work_log.read_text().splitlines()]
        entries = [
            Entry(task, what, int(part), float(t), int(pid)) for task, what, part, t, pid in lines
        ]
        return [entry for entry in entries if entry.what == what]

    def begun(self, task_id: str) -> Counter[int]:
        """How often each part of a task was begun."""
        return Counter(entry.part for entry in self.worked("begin") if entry.task_id == task_id)

    def workers(self, task_id: str) -> list[int]:
        """The processes that began its parts, in order."""
        return [entry.pid for entry in self.worked("begin") if entry.task_id == task_id]

    def has_begun(self, task_id: str, part: int, times: int = 1) -> bool:
        return self.begun(task_id)[part] >= times

    def close(self) -> None:
        for server in self.servers:
            server.kill()


@contextmanager
def place(database_url: str = "", look: str = "1") -> Iterator[Place]:
    """A place in a directory of its own; its servers are killed in the end.

    They look for dead servers every `look` seconds.
    """
    with tempfile.TemporaryDirectory() as tmp:
        here = Place(Path(tmp), database_url, look)
        try:
            yield here
        finally:
            here.close()


class Patient(httpx.HTTPTransport):
    """Asks again when the answer is 503: on a busy machine SQLite, too, may need four seconds."""

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        end = time.monotonic() + LIMIT
        while (response := super().handle_request(request)).status_code == 503:
            assert time.monotonic() < end, response.read()
            response.close()
        return response


def connect(server: Process) -> httpx.Client:
    return httpx.Client(base_url=server.url, timeout=LIMIT, transport=Patient())


def start_task(server: Process, parts: int, seconds: float) -> str:
    """Start a task; return its id."""
    with connect(server) as client:
        headers = {"Idempotency-Key": uuid.uuid4().hex}
        answer = client.post("/tasks", json={"parts": parts, "seconds": seconds}, headers=headers)
    assert answer.status_code == 202, answer.text
    return str(answer.json()["task_id"])


def read_task(server: Process, task_id: str) -> dict[str, Any]:
    """Return a task as the server shows it."""
    with connect(server) as client:
        return dict(client.get(f"/tasks/{task_id}").raise_for_status().json())


@dataclass(frozen=True)
class Event:
    event_id: int
    name: str
    data: dict[str, Any]
    arrived: float  # in time.time()


@dataclass
class Reader:
    """Reads a task's stream in a thread, as an `EventSource` does, until the task's end."""

    url: str
    task_id: str
    last_event_id: int | None = None
    events: list[Event] = field(default_factory=list)
    comments: int = 0
    connections: int = 0
    status: int = 0

    def __post_init__(self) -> None:
        threading.Thread(target=self.run, daemon=True).start()

    def run(self) -> None:
        while not self.ended:
            with suppress(requests.RequestException):
                self.connect()
            time.sleep(0.1)

    def connect(self) -> None:
        headers = {} if self.last_event_id is None else {"Last-Event-ID": str(self.last_event_id)}
        url = f"{self.url}/tasks/{self.task_id}/events"
        with requests.get(url, headers=headers, stream=True, timeout=LIMIT) as response:
            self.connections += response.ok
            self.status = response.status_code
            fields: dict[str, str] = {}
            for line in response.iter_lines(chunk_size=1, decode_unicode=True):
                name, _, value = line.partition(": ")
                if name:
                    fields[name] = value
                elif line:
                    self.comments += 1
                elif "data" in fields:
                    self.last_event_id = int(fields["id"])
                    name, data = fields.get("event", "message"), json.loads(fields["data"])
                    self.events.append(Event(self.last_event_id, name, data, time.time()))
                    fields = {}

    @property
    def ended(self) -> bool:
        return self.status == 204 or (bool(self.events) and self.events[-1].name == "end")

    def wait(self, limit: float = LIMIT) -> list[Event]:
        """Wait for the end; return all events."""
        wait_for(lambda: self.ended, "the task's end", limit)
        return self.events

    def wait_for_event(self, event_id: int, limit: float = LIMIT) -> None:
        def has_come() -> bool:
            return self.last_event_id is not None and self.last_event_id >= event_id

        wait_for(has_come, f"event {event_id}", limit)


def assert_exact(events: list[Event], parts: int, status: str = "done", first: int = 0) -> None:
    """Each part once, in order, and then the end."""
    assert [event.event_id for event in events] == list(range(first, parts + 1))
    *messages, end = events
    for event in messages:
        assert (event.name, event.data["done"]) == ("message", event.event_id + 1)
    assert (end.name, end.data["status"], end.data["done"]) == ("end", status, parts)


# The faults ---------------------------------------------------------------------------------------


def kill_after_each_part(here: Place, parts: int) -> str:
    """Kill the server when a part's event has come, start it again, and so on.

    The first time in the next part, the last time between the last part and the end.
    """
    server = here.serve(PAUSE_AFTER=str(parts))
    task_id = start_task(server, parts, 0.3)
    reader = Reader(server.url, task_id)
    for part in range(parts):
        reader.wait_for_event(part)
        if part == 0:
            wait_for(partial(here.has_begun, task_id, 1), "the next part to begin")
        server.kill()
        if part == 0:
            interrupted = all(entry.part != 1 for entry in here.worked("end"))
        if part == parts - 1:
            assert not reader.ended
            server.options["env"].pop("PAUSE_AFTER")
        server.start()
    assert_exact(reader.wait(), parts)
    begun = here.begun(task_id)
    assert set(begun) == set(range(parts))
    assert begun[1] >= 1 + interrupted
    return f"{parts} times; {begun.total() - parts} parts were done again"


def kill_at_random(here: Place, parts: int, kills: int) -> str:
    """Kill the server at random moments of a task of many short parts."""
    server = here.serve()
    task_id = start_task(server, parts, 0.02)
    reader = Reader(server.url, task_id)
    for part in sorted(random.sample(range(parts), kills)):
        wait_for(partial(here.has_begun, task_id, part), f"part {part} to begin")
        time.sleep(random.uniform(0, 0.05))  # anywhere in the part and in its two writes
        server.kill()
        server.start()
    assert_exact(reader.wait(), parts)
    return f"{kills} times; {here.begun(task_id).total() - parts} parts were done again"


def start_tasks(server: Process, tasks: int, parts: int, readers: int) -> list[Reader]:
    """Start so many tasks, and as many readers of each; wait until each has seen a part."""
    ids = [start_task(server, parts, 0.4) for _ in range(tasks)]
    all_readers = [Reader(server.url, task_id) for task_id in ids * readers]
    for reader in all_readers:
        reader.wait_for_event(0)
    return all_readers


def terminate(here: Place, tasks: int, parts: int, readers: int) -> str:
    """Stop a server that is busy, with SIGTERM, and start it again."""
    server = here.serve()
    all_readers = start_tasks(server, tasks, parts, readers)
    asked = time.monotonic()
    server.signal(signal.SIGTERM)
    assert server.wait() == -signal.SIGTERM
    took = time.monotonic() - asked
    server.start()
    for reader in all_readers:
        assert_exact(reader.wait(), parts)
    assert any(len(set(here.workers(reader.task_id))) > 1 for reader in all_readers)
    return f"{len(all_readers)} readers; down after {took:.1f} s"


def save_the_code(here: Place, tasks: int, parts: int, readers: int) -> str:
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
    all_readers = start_tasks(server, tasks, parts, readers)
    recipe = code / "recipes/long_task.py"
    old, new = 'return {"seconds": worked}', 'return {"seconds": worked, "edited": True}'
    assert old in recipe.read_text()
    saved = time.monotonic()
    recipe.write_text(recipe.read_text().replace(old, new))
    server.wait_for_log("Application startup complete", count=2)
    took = time.monotonic() - saved
    results = []
    for reader in all_readers:
        events = reader.wait()
        assert_exact(events, parts)
        results.append(events[-1].data["result"])
    assert any("edited" in result for result in results), "the new code goes on"
    return f"{len(all_readers)} readers; up again after {took:.1f} s"


def lose_one_of_two(here: Place) -> str:
    """Kill one of two servers for good."""
    lost, other = (here.serve() for _ in range(2))
    parts = 10
    readers: list[Reader] = []
    # Whichever asks first gets a task: start some until the one that will be lost has just got one.
    while not any(here.workers(reader.task_id)[-1] == lost.pid for reader in readers[-1:]):
        readers.append(Reader(other.url, start_task(lost, parts, 0.4)))
        readers[-1].wait_for_event(1)
    lost.signal(signal.SIGKILL)
    arrivals = []
    for reader in readers:
        events = reader.wait(3 * LIMIT)
        assert_exact(events, parts)
        arrivals.append([event.arrived for event in events])
    assert set(here.workers(readers[-1].task_id)) == {lost.pid, other.pid}
    silence = max(b - a for stamps in arrivals for a, b in itertools.pairwise(stamps))
    return f"the other went on after {silence:.0f} s"


def slow_is_not_dead(here: Place, seconds: float) -> str:
    """Let a part take much longer than it was said to, and a server hang: both keep their task."""
    first, other = (here.serve() for _ in range(2))
    slow = Reader(first.url, start_task(first, 4, SLOW))
    hung = Reader(other.url, start_task(first, 6, 0.5))
    hung.wait_for_event(1)
    (pid,) = set(here.workers(hung.task_id))
    os.kill(pid, signal.SIGSTOP)
    time.sleep(seconds)  # nothing that could be waited for should happen
    os.kill(pid, signal.SIGCONT)
    assert_exact(slow.wait(), 4)
    assert_exact(hung.wait(), 6)
    for reader in (slow, hung):
        assert set(here.begun(reader.task_id).values()) == {1}, "each part once"
    return f"each part was done once, also that of a server that hung for {seconds:.0f} s"


def three_deaths(here: Place) -> str:
    """Kill the server three times in the same part."""
    server = here.serve()
    task_id = start_task(server, 3, 0)
    assert_exact(Reader(server.url, task_id).wait(), 3)
    task_id = start_task(server, 2, 50)
    for death in range(3):
        wait_for(partial(here.has_begun, task_id, 0, death + 1), "the part to begin")
        server.kill()
        server.start()
    events = Reader(server.url, task_id).wait()
    assert_exact(events, 0, "failed")
    assert here.begun(task_id) == {0: 3}
    return str(events[-1].data["error"])


def two_servers(here: Place, parts: int) -> str:
    """Watch a task on the server that has it and on the other one, and cancel it on the other."""
    servers = [here.serve() for _ in range(2)]
    task_id = start_task(servers[0], 900, 0.2)
    readers = {server.pid: Reader(server.url, task_id) for server in servers}
    for reader in readers.values():
        reader.wait_for_event(parts - 1)
    (pid,) = {entry.pid for entry in here.worked("begin")}
    (other,) = (server for server in servers if server.pid != pid)
    asked = time.time()
    with connect(other) as client:
        assert client.delete(f"/tasks/{task_id}").status_code == 202
    ends = []
    for reader in readers.values():
        events = reader.wait()
        assert_exact(events, len(events) - 1, "cancelled")
        ends.append(events[-1].arrived - asked)
    return f"cancelled on the other, it ended for all readers after {max(ends) * 1000:.0f} ms"


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
    server = here.serve(KEEP_ALIVE="1")
    url, body = f"{server.url}/tasks", {"parts": 1, "seconds": 0}
    task_id = start_task(server, 9, 0.5)
    reader = Reader(server.url, task_id)
    reader.wait_for_event(1)
    key = {"Idempotency-Key": uuid.uuid4().hex}
    with away(postgres):
        back = time.monotonic() + seconds
        # The connections that are open are told by and by.
        wait_for(lambda: requests.get(f"{url}/{task_id}", timeout=LIMIT).status_code == 503, "503")
        with ThreadPoolExecutor() as pool:
            asked = [
                pool.submit(requests.get, f"{url}/{task_id}", timeout=LIMIT),
                pool.submit(requests.get, f"{url}/{task_id}/events", timeout=LIMIT),
                pool.submit(requests.post, url, json=body, headers=key, timeout=LIMIT),
                pool.submit(requests.delete, f"{url}/{task_id}", timeout=LIMIT),
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
    assert_exact(reader.wait(), 9)
    assert reader.connections == 1
    # Whether the POST was carried out, nobody knows. Sent again, with its key, it is done once.
    with connect(server) as client:
        again = client.post("/tasks", json=body, headers=key).json()["task_id"]
    assert_exact(Reader(server.url, again).wait(), 1)
    assert {entry.task_id for entry in here.worked("begin")} == {task_id, again}
    assert here.begun(again) == {0: 1}
    assert "Traceback" not in server.log
    return f"{seconds:.0f} s; 503 within {slowest:.1f} s; it went on {took:.1f} s after its return"


# The table ----------------------------------------------------------------------------------------


AWAY = (killed, hanging, read_only, without_a_table)
BOTH: dict[str, Callable[[Place], str]] = {
    "`kill -9` after each part, and before the end": partial(kill_after_each_part, parts=6),
    "`kill -9` at a random moment": partial(kill_at_random, parts=300, kills=8),
    "SIGTERM": partial(terminate, tasks=10, parts=20, readers=10),
    "`--reload`: the workflow is edited": partial(save_the_code, tasks=10, parts=20, readers=10),
    "`kill -9` three times in a part": three_deaths,
    "a part takes longer, a server hangs": partial(slow_is_not_dead, seconds=60),
}
ALONE: dict[str, Callable[[Place, Postgres], str]] = {
    "two servers": lambda here, _: two_servers(here, 20),
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
            with place(postgres.database_url) as there:
                print(f"| {name} | – | {fault_alone(there, postgres)} |", flush=True)


if __name__ == "__main__":
    main()
