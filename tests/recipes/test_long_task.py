"""recipes/long_task: what is on the wire, what is refused, and what the faults leave behind."""

import signal
import subprocess
import sys
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest

from main import HEADERS
from tests.recipes import long_task_faults as faults
from tests.recipes.long_task_faults import (
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


@pytest.mark.parametrize(
    "url",
    [
        "postgresql://user:secret@127.0.0.1:{port}/tasks",
        "sqlite:////nowhere/tasks.sqlite",
        "tasks",
    ],
)
def test_a_database_that_is_not_there(url: str) -> None:
    url = url.format(port=free_port())
    words = [sys.executable, "-m", "uvicorn", "recipes.long_task:app", "--port", str(free_port())]
    environment = ENVIRONMENT | {"DATABASE_URL": url}
    done = subprocess.run(
        words, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=LIMIT
    )
    lines = [line for line in done.stderr.splitlines() if not line.startswith("INFO:")]
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith("Cannot use DATABASE_URL: ")
    assert "secret" not in lines[0]
    assert done.returncode == 3


# Many readers -------------------------------------------------------------------------------------


def test_one_read_for_all_readers_of_a_task(client: httpx.Client, server: Process) -> None:
    """As long as there are readers, and no longer."""
    task_id = start_task(server, 900, 0.2)
    readers = faults.open_streams(server, [task_id], 20)
    wait_for(lambda: client.get("/watches").json() == 1, "one read")
    for reader in readers:
        reader.close()
    wait_for(lambda: client.get("/watches").json() == 0, "the stream to be let go")
    client.delete(f"/tasks/{task_id}")


def test_a_silence_longer_than_the_proxys_patience() -> None:
    """In short: a comment each second, nginx waits for 7, and the part takes 9."""
    with place() as here:
        changes = {"proxy_read_timeout 12s;": "proxy_read_timeout 7s;"}
        faults.read_through_nginx(here, 1, 9, changes, keep_alive=1)


# The faults, in short: `python -m tests.recipes.long_task_faults` has them in full ----------------


def test_kill_after_each_part() -> None:
    with place() as here:
        faults.kill_after_each_part(here, 3)


def test_kill_at_random(postgres: Postgres) -> None:
    with place(postgres.database_url) as here:
        faults.kill_at_random(here, 60, 2)


def test_sigterm(postgres: Postgres) -> None:
    with place(postgres.database_url) as here:
        faults.terminate(here, 3, 12, 12)


def test_an_edit_under_reload() -> None:
    with place() as here:
        faults.save_the_code(here, 3, 12, 12)


def test_a_server_is_lost_for_good(postgres: Postgres) -> None:
    with place(postgres.database_url) as here:
        faults.lose_one_of_two(here, signal.SIGKILL, grace="1")


def test_started_on_one_server_cancelled_on_another(postgres: Postgres) -> None:
    with place(postgres.database_url) as here:
        faults.two_servers(here, 3)


def test_the_database_goes_away(postgres: Postgres) -> None:
    with place(postgres.database_url) as here:
        faults.take_the_database_away(here, postgres, 3)


def test_the_database_hangs(postgres: Postgres) -> None:
    """It takes connections, but says nothing."""
    with place(postgres.database_url) as here:
        server = here.serve()
        task_id = start_task(server, 8, 0.3)
        reader = Reader(server.url, task_id)
        reader.wait_for_event(1)
        postgres.signal(signal.SIGSTOP, everyone=True)
        try:
            answer = httpx.get(f"{server.url}/tasks/{task_id}", timeout=LIMIT)
        finally:
            postgres.signal(signal.SIGCONT, everyone=True)
        assert (answer.status_code, answer.headers["Retry-After"]) == (503, "5")
        assert_exact(reader.wait(), 8)
        assert reader.connections == 1
