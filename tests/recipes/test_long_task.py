"""recipes/long_task: what is on the wire, what is refused, and what the faults leave behind."""

import signal
import sqlite3
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from typing import Any

import httpx
import psycopg
import pytest

from main import HEADERS
from tests.faults import long_task as faults
from tests.faults.long_task import (
    FAILING,
    Place,
    Reader,
    assert_exact,
    connect,
    place,
    start_task,
)
from tests.support.postgres import Postgres, running_postgres
from tests.support.processes import ENVIRONMENT, LIMIT, ROOT, Process, free_port, wait_for


@pytest.fixture(scope="module")
def here() -> Iterator[Place]:
    with place() as here:
        yield here


@pytest.fixture(scope="module")
def server(here: Place) -> Process:
    return here.serve()


@pytest.fixture
def client(server: Process) -> Iterator[httpx.Client]:
    with connect(server) as client:
        yield client


@pytest.fixture(scope="module")
def postgres() -> Iterator[Postgres]:
    """One for all tests; each leaves it running."""
    with running_postgres() as postgres:
        yield postgres


def events_after(client: httpx.Client, task_id: str, last_event_id: int) -> httpx.Response:
    headers = {"Last-Event-ID": str(last_event_id)}
    return client.get(f"/tasks/{task_id}/events", headers=headers)


# What is on the wire ------------------------------------------------------------------------------


def test_a_task_from_its_start_to_its_end(client: httpx.Client) -> None:
    started = client.post("/tasks", json={"parts": 3, "seconds": 0.2})
    assert started.status_code == 202
    task_id = started.json()["task_id"]
    assert started.json() == {"task_id": task_id}
    assert started.headers["Location"] == f"/tasks/{task_id}"

    events = client.get(f"/tasks/{task_id}/events")
    assert events.headers["Content-Type"].partition(";")[0] == "text/event-stream"
    assert HEADERS.items() <= {name: events.headers.get(name) for name in HEADERS}.items()
    retry, *parts, end, nothing = events.text.split("\n\n")
    assert (retry, nothing) == ("retry: 1000", "")
    assert parts == [f'id: {n}\ndata: {{"done": {n + 1}, "parts": 3}}' for n in range(3)]

    task = client.get(f"/tasks/{task_id}")
    assert task.json() == {
        "task_id": task_id,
        "status": "done",
        "done": 3,
        "parts": 3,
        "result": {"seconds": pytest.approx(0.6)},
        "error": None,
    }
    assert end == f"event: end\nid: 3\ndata: {task.text}"


def test_a_task_that_runs(client: httpx.Client, server: Process) -> None:
    task_id = start_task(server, 900, 0.2)
    wait_for(lambda: client.get(f"/tasks/{task_id}").json()["done"], "the first part")
    task = client.get(f"/tasks/{task_id}").json()
    assert (task["status"], task["parts"], task["result"]) == ("running", 900, None)
    # Whoever comes later gets what there was, and then goes on.
    wait_for(lambda: client.get(f"/tasks/{task_id}").json()["done"] > 2, "more parts")
    reader = Reader(server.url, task_id)
    reader.wait_for_event(5)
    client.delete(f"/tasks/{task_id}")
    events = reader.wait()
    assert_exact(events, len(events) - 1, "cancelled")


def test_resuming_after_each_event(client: httpx.Client, server: Process) -> None:
    task_id = start_task(server, 3, 0)
    whole = client.get(f"/tasks/{task_id}/events").text
    events = whole.removeprefix("retry: 1000\n\n").split("\n\n")
    for last_event_id in range(3):  # the last of them: between the last part and the end
        rest = events_after(client, task_id, last_event_id)
        assert rest.status_code == 200
        assert rest.text.endswith("\n\n".join(events[last_event_id + 1 :]))
        assert rest.text.count("data: ") == 3 - last_event_id
    nothing = events_after(client, task_id, 3)
    assert nothing.status_code == 204
    assert HEADERS.items() <= {name: nothing.headers.get(name) for name in HEADERS}.items()


def test_cancelled_tasks_stop_before_their_next_part(
    here: Place, client: httpx.Client, server: Process
) -> None:
    task_id = start_task(server, 900, 0.3)
    reader = Reader(server.url, task_id)
    reader.wait_for_event(1)
    assert client.delete(f"/tasks/{task_id}").status_code == 202
    events = reader.wait()
    done = len(events) - 1
    assert_exact(events, done, "cancelled")
    assert client.get(f"/tasks/{task_id}").json() == events[-1].data
    assert events_after(client, task_id, done).status_code == 204
    # The one that was running then was the last, as is seen when another task has done more.
    Reader(server.url, start_task(server, 3, 0.3)).wait()
    assert set(here.begun(task_id)) <= set(range(done + 1))
    assert client.delete(f"/tasks/{task_id}").json()["status"] == "cancelled"
    assert "WorkflowCancelled" not in server.log


def test_a_task_that_is_done_is_not_cancelled(client: httpx.Client, server: Process) -> None:
    task_id = start_task(server, 1, 0)
    Reader(server.url, task_id).wait()
    assert client.delete(f"/tasks/{task_id}").status_code == 202
    assert client.get(f"/tasks/{task_id}").json()["status"] == "done"


def test_a_part_that_raises(client: httpx.Client, server: Process) -> None:
    task_id = start_task(server, 5, FAILING)
    events = Reader(server.url, task_id).wait()
    assert_exact(events, 2, "failed")
    assert events[-1].data["error"] == "no space left on the disk"
    assert client.get(f"/tasks/{task_id}").json() == events[-1].data
    assert events_after(client, task_id, 2).status_code == 204
    assert "ValueError: no space left" in server.log, "whoever runs the server sees where"


def test_the_same_key_gives_the_same_task(here: Place, client: httpx.Client) -> None:
    headers = {"Idempotency-Key": uuid.uuid4().hex}

    def start(body: dict[str, Any]) -> httpx.Response:
        return client.post("/tasks", json=body, headers=headers)

    with ThreadPoolExecutor(10) as pool:
        answers = list(pool.map(start, [{"parts": 2, "seconds": 0.1}] * 10))
    assert {answer.status_code for answer in answers} == {202}
    (task_id,) = {answer.json()["task_id"] for answer in answers}
    assert {answer.headers["Location"] for answer in answers} == {f"/tasks/{task_id}"}
    Reader(str(client.base_url), task_id).wait()
    assert start({"parts": 2, "seconds": 0.1}).json()["task_id"] == task_id, "when it is done, too"
    assert here.begun(task_id) == {0: 1, 1: 1}
    for other in ({"parts": 3, "seconds": 0.1}, {"parts": 2, "seconds": 0.2}):
        refused = start(other)
        assert refused.status_code == 422
        assert refused.json()["detail"][0]["loc"] == ["header", "idempotency-key"]


def test_a_key_is_the_same_on_each_server_and_its_id_is_a_secret(
    postgres: Postgres, client: httpx.Client
) -> None:
    """On one that starts later, too; servers with another database have another id for it."""
    key = {"Idempotency-Key": uuid.uuid4().hex}

    def start(client: httpx.Client) -> str:
        answer = client.post("/tasks", json={"parts": 3, "seconds": 0.1}, headers=key)
        return str(answer.raise_for_status().json()["task_id"])

    with place(postgres.database_url) as here:
        first = here.serve()
        with connect(first) as one:
            task_id = start(one)
        assert_exact(Reader(first.url, task_id).wait(), 3)
        with connect(here.serve()) as later:
            assert start(later) == task_id
        assert here.begun(task_id) == {0: 1, 1: 1, 2: 1}
    assert start(client) != task_id


# What is refused ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "body",
    [
        *('{"parts": 0, "seconds": 1}', '{"parts": 901, "seconds": 1}', '{"parts": 1}'),
        *('{"parts": 1, "seconds": -1}', '{"parts": 1, "seconds": 60.1}', '{"seconds": 1}'),
        *('{"parts": 1, "seconds": NaN}', '{"parts": 1, "seconds": 1e400}', "[]", "{", ""),
        *('{"parts": 1.5, "seconds": 1}', r'{"parts": "\ud800", "seconds": 1}'),
    ],
)
def test_bodies_that_are_refused(client: httpx.Client, body: str) -> None:
    answer = client.post("/tasks", content=body, headers={"Content-Type": "application/json"})
    assert answer.status_code == 422
    assert {"type", "loc", "msg", "input"} <= answer.json()["detail"][0].keys()


@pytest.mark.parametrize("last_event_id", ["4", "9" * 20, "-1", "+1", "1.5", "x"])
def test_ids_that_no_event_has(client: httpx.Client, server: Process, last_event_id: str) -> None:
    task_id = start_task(server, 3, 0)
    headers = {"Last-Event-ID": last_event_id}
    answer = client.get(f"/tasks/{task_id}/events", headers=headers)
    assert answer.status_code == 422
    assert answer.json()["detail"][0]["loc"] == ["header", "last-event-id"]


@pytest.mark.parametrize(
    "task_id",
    [str(uuid.UUID(int=1)), "x", "%00", pytest.param("x" * 5000, id="long"), "☕"],
)
def test_tasks_that_there_are_not(client: httpx.Client, task_id: str) -> None:
    for method, path in (("GET", ""), ("DELETE", ""), ("GET", "/events")):
        assert client.request(method, f"/tasks/{task_id}{path}").status_code == 404


SERVE = ["-m", "uvicorn", "recipes.long_task:app", "--port", "{port}"]
READ = ["-c", "from recipes.common import database_url; database_url('')"]  # what it does first


@pytest.mark.parametrize(
    ("command", "url", "told"),
    [
        (SERVE, "postgresql://u:secret@127.0.0.1:{port}/tasks", "Cannot use DATABASE_URL: "),
        (
            SERVE,
            "postgresql://u:secret@localhost:{port},localhost/tasks",
            "Cannot use DATABASE_URL: ",
        ),
        (SERVE, "sqlite:////nowhere/tasks.sqlite", "Cannot use DATABASE_URL: "),
        (READ, "postgresql+psycopg://u:a@secret@127.0.0.1:{port}/tasks", "DATABASE_URL should be "),
        (READ, "postgresql://u:secret@127.0.0.1:{port}", "DATABASE_URL should be "),
        (READ, "sqlite:///:memory:", "DATABASE_URL should be "),
        (READ, "tasks", "DATABASE_URL should be "),
    ],
)
def test_a_database_that_is_not_there(command: list[str], url: str, told: str) -> None:
    words = [sys.executable, *(word.format(port=free_port()) for word in command)]
    environment = ENVIRONMENT | {"DATABASE_URL": url.format(port=free_port())}
    done = subprocess.run(
        words, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=LIMIT
    )
    lines = [line for line in done.stderr.splitlines() if not line.startswith("INFO:")]
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith(told)
    assert "secret" not in lines[0]
    assert done.returncode in (1, 3)


# Many readers -------------------------------------------------------------------------------------


def test_one_look_for_all_readers_of_a_task(client: httpx.Client, server: Process) -> None:
    """As long as there are readers, and no longer."""
    task_id = start_task(server, 900, 0.2)
    with ExitStack() as stack:
        streams = [
            stack.enter_context(client.stream("GET", f"/tasks/{task_id}/events")).iter_lines()
            for _ in range(20)
        ]
        assert {next(lines) for lines in streams} == {"retry: 1000"}
        wait_for(lambda: client.get("/watches").json() == 1, "one task to be looked at")
    wait_for(lambda: client.get("/watches").json() == 0, "the task to be let go")
    client.delete(f"/tasks/{task_id}")


# The faults, in short: `python -m tests.faults.long_task` has them in full ----------------

LOOK = "0.3"


def test_the_table_is_of_these_faults() -> None:
    section = (ROOT / "tests/README.md").read_text().partition("<!-- faults of long_task -->\n")[2]
    _, _, *rows = section.partition("\n\n")[0].splitlines()
    names = [row.split(" | ")[0].removeprefix("| ") for row in rows]
    assert names == [*faults.BOTH, *faults.ALONE]


def test_kill_after_each_part() -> None:
    with place(look=LOOK) as here:
        faults.kill_after_each_part(here, 3)


def test_kill_at_random(postgres: Postgres) -> None:
    with place(postgres.database_url, LOOK) as here:
        faults.kill_at_random(here, 60, 2)


def test_sigterm(postgres: Postgres) -> None:
    with place(postgres.database_url, LOOK) as here:
        faults.terminate(here, 3, 8, 3)


def test_an_edit_under_reload() -> None:
    with place(look=LOOK) as here:
        faults.save_the_code(here, 3, 8, 3)


def test_a_server_is_lost_for_good(postgres: Postgres) -> None:
    with place(postgres.database_url, LOOK) as here:
        faults.lose_one_of_two(here)


@pytest.mark.parametrize("database", ["SQLite", "PostgreSQL"])
def test_slow_is_not_dead(database: str, postgres: Postgres) -> None:
    url = f"{postgres.database_url}?application_name=tasks"  # which people do set
    with place(url if database == "PostgreSQL" else "", LOOK) as here:
        faults.slow_is_not_dead(here, 4)


def test_a_part_that_its_server_does_not_survive() -> None:
    with place(look=LOOK) as here:
        error = faults.three_deaths(here)
    assert error == "3 servers in a row did not survive part 1"


def test_started_on_one_server_cancelled_on_another(postgres: Postgres) -> None:
    with place(postgres.database_url) as here:
        faults.two_servers(here, 3)


@pytest.mark.parametrize("away", faults.AWAY)
def test_the_database_is_away(postgres: Postgres, away: faults.Away) -> None:
    with place(postgres.database_url) as here:
        faults.take_the_database_away(here, postgres, away, 3)


def test_sqlite_is_locked_by_somebody_else() -> None:
    with place() as here:
        server = here.serve(KEEP_ALIVE="1")
        task_id = start_task(server, 10, 0.3)
        reader = Reader(server.url, task_id)
        reader.wait_for_event(1)
        file = here.database_url.removeprefix("sqlite:///")
        with closing(sqlite3.connect(file, LIMIT, isolation_level=None)) as other:
            other.execute("BEGIN EXCLUSIVE")
            answer = httpx.get(f"{server.url}/tasks/{task_id}", timeout=LIMIT)
            assert (answer.status_code, answer.headers["Retry-After"]) == (503, "5")
        assert_exact(reader.wait(), 10)
        assert reader.connections == 1


def test_the_database_comes_back_empty(postgres: Postgres) -> None:
    """Its tasks are gone: a 404 says so. New ones can be started."""
    with place(postgres.database_url) as here:
        server = here.serve()
        task_id = start_task(server, 60, 0.5)
        reader = Reader(server.url, task_id)
        reader.wait_for_event(1)
        with psycopg.connect(postgres.database_url) as connection:
            connection.execute("DROP SCHEMA dbos CASCADE")
        wait_for(lambda: reader.status == 404, "the reader to be told")
        new = Reader(server.url, start_task(server, 2, 0))
        assert_exact(new.wait(), 2)


def test_the_database_comes_back_older(postgres: Postgres) -> None:
    """From a backup: no reader gets an event twice, also when another server goes on."""
    with place(postgres.database_url, LOOK) as here:
        server = here.serve()
        task_id = start_task(server, 15, 0.3)
        reader = Reader(server.url, task_id)
        reader.wait_for_event(5)
        with psycopg.connect(postgres.database_url) as connection:
            connection.execute("DELETE FROM dbos.operation_outputs WHERE function_id > 3")
        reader.wait_for_event(7)
        assert reader.connections == 1
        server.kill()
        server.start()
        assert_exact(reader.wait(), 15)
        assert here.begun(task_id)[4] == 2


def test_servers_whose_sessions_are_lost_live_on(postgres: Postgres) -> None:
    """At any moment: nothing is lost, and nothing is sent twice."""
    end = (
        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
        " WHERE backend_type = 'client backend' AND pid != pg_backend_pid()"
    )
    with place(postgres.database_url) as here, psycopg.connect(postgres.database_url) as connection:
        servers = [here.serve() for _ in range(2)]
        readers = [
            Reader(servers[n % 2].url, start_task(servers[n % 2], 60, 0.05)) for n in range(10)
        ]
        for part in range(5, 50, 5):
            readers[0].wait_for_event(part)
            connection.execute(end)
        for reader in readers:
            assert_exact(reader.wait(), 60)
            assert reader.connections == 1


def test_a_session_is_lost_while_a_result_is_kept(postgres: Postgres) -> None:
    """Twice in a row: the database's error is not kept in place of the result."""
    with place(postgres.database_url) as here:
        server = here.serve(LOST_WRITES="2")
        task_id = start_task(server, 3, 0.1)
        assert_exact(Reader(server.url, task_id).wait(), 3)
        assert here.begun(task_id) == {0: 1, 1: 1, 2: 1}


@pytest.mark.parametrize(
    ("away", "signum"), [(faults.killed, signal.SIGINT), (faults.hanging, signal.SIGTERM)]
)
def test_one_signal_is_enough_while_the_database_is_away(
    postgres: Postgres, away: faults.Away, signum: int
) -> None:
    with place(postgres.database_url) as here:
        server = here.serve()
        task_id = start_task(server, 60, 0.3)
        Reader(server.url, task_id).wait_for_event(1)
        with away(postgres):
            asked = time.monotonic()
            server.signal(signum)
            server.wait()
            assert time.monotonic() - asked < 20


def test_the_loops_outlive_what_nobody_has_foreseen(postgres: Postgres) -> None:
    with place(postgres.database_url, LOOK) as here:
        lost, other = (here.serve() for _ in range(2))
        tasks = [start_task(lost, 15, 0.3) for _ in range(8)]
        readers = [Reader(other.url, task_id) for task_id in tasks]
        for reader in readers:
            reader.wait_for_event(1)
        httpx.post(f"{other.url}/broken/2")
        other.wait_for_log("Tasks cannot be watched: IndexError: list index out of range")
        other.wait_for_log("Tasks cannot be looked after: IndexError: list index out of range")
        lost.kill()
        for reader in readers:
            assert_exact(reader.wait(), 15)
            assert reader.connections == 1


OTHER = """
import time
from dbos import DBOS

@DBOS.workflow()
def another() -> None:
    print("running", flush=True)
    time.sleep(600)

DBOS(config={"name": "another", "system_database_url": %r, "executor_id": "another"})
DBOS.launch()
another()
"""


def test_other_workflows_in_the_same_database(postgres: Postgres) -> None:
    look = "SELECT status, executor_id FROM dbos.workflow_status WHERE name = 'another'"
    with place(postgres.database_url) as here:
        command = [sys.executable, "-c", OTHER % postgres.database_url]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as another:
            assert another.stdout
            assert another.stdout.readline() == "running\n"
            another.kill()
        server = here.serve()
        assert_exact(Reader(server.url, start_task(server, 6, 0.3)).wait(), 6)
        with psycopg.connect(postgres.database_url) as connection:
            assert connection.execute(look).fetchall() == [("PENDING", "another")]
        assert "IndexError" not in server.log


def test_tasks_are_deleted_in_the_end(here: Place, client: httpx.Client, server: Process) -> None:
    task_id, young = start_task(server, 1, 0), start_task(server, 1, 0)
    for reader in (Reader(server.url, task_id), Reader(server.url, young)):
        reader.wait()
    eight_days = 8 * 24 * 3600 * 1000
    with sqlite3.connect(here.database_url.removeprefix("sqlite:///")) as connection:
        old = "UPDATE workflow_status SET completed_at = completed_at - ? WHERE workflow_uuid = ?"
        connection.execute(old, [eight_days, task_id])
    server.kill()
    server.start()
    wait_for(lambda: client.get(f"/tasks/{task_id}").status_code == 404, "it to be deleted")
    assert client.get(f"/tasks/{young}").status_code == 200
