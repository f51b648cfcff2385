"""recipes/long_task on SQLite: what is on the wire, what is refused, and what the faults leave.

The tests share one server, so they run in one worker.
"""

import sqlite3
import subprocess
import sys
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from typing import Any

import pytest
import requests

from main import HEADERS
from tests.faults import long_task as faults
from tests.faults.long_task import FAILING, PATIENT, Place, place
from tests.support.processes import ENVIRONMENT, LIMIT, ROOT, free_port, wait_for

pytestmark = pytest.mark.xdist_group("long_task")


@pytest.fixture(scope="module")
def here() -> Iterator[Place]:
    with place(LOOK="0.3") as here:
        yield here


def ask(here: Place, method: str, path: str, **options: Any) -> requests.Response:
    return PATIENT.request(method, f"{here.server().url}{path}", timeout=LIMIT, **options)


def events_after(here: Place, task_id: str, last_event_id: str) -> requests.Response:
    headers = {"Last-Event-ID": last_event_id}
    return ask(here, "GET", f"/tasks/{task_id}/events", headers=headers)


# What is on the wire ------------------------------------------------------------------------------


def test_a_task_from_its_start_to_its_end(here: Place) -> None:
    started = ask(here, "POST", "/tasks", json={"parts": 3, "seconds": 0.2})
    assert started.status_code == 202
    task_id = started.json()["task_id"]
    assert started.json() == {"task_id": task_id}
    assert started.headers["Location"] == f"/tasks/{task_id}"

    events = ask(here, "GET", f"/tasks/{task_id}/events")
    assert events.headers["Content-Type"].partition(";")[0] == "text/event-stream"
    assert HEADERS.items() <= {name: events.headers.get(name) for name in HEADERS}.items()
    retry, *parts, end, nothing = events.text.split("\n\n")
    assert (retry, nothing) == ("retry: 1000", "")
    assert parts == [f'id: {n}\ndata: {{"done": {n + 1}, "parts": 3}}' for n in range(3)]

    task = ask(here, "GET", f"/tasks/{task_id}")
    assert task.json() == {
        "task_id": task_id,
        "status": "done",
        "done": 3,
        "parts": 3,
        "result": {"seconds": pytest.approx(0.6)},
        "error": None,
    }
    assert end == f"event: end\nid: 3\ndata: {task.text}"
    # It cannot be cancelled any more.
    assert ask(here, "DELETE", f"/tasks/{task_id}").status_code == 202
    assert ask(here, "GET", f"/tasks/{task_id}").json() == task.json()


def test_a_task_that_is_cancelled(here: Place) -> None:
    first = here.start(here.server(), 900, 0.3)
    first.wait_for_part(1)
    path = f"/tasks/{first.task_id}"
    task = ask(here, "GET", path).json()
    assert (task["status"], task["parts"], task["result"]) == ("running", 900, None)
    # Whoever comes later gets what there was, and then goes on.
    later = here.read(here.server(), first.task_id)
    later.wait_for_part(3)
    assert ask(here, "DELETE", path).status_code == 202
    assert first.wait("cancelled") == later.wait("cancelled") == ask(here, "GET", path).json()
    # The part that was running then was the last, as is seen when another task has done more.
    here.start(here.server(), 3, 0.3).wait()
    assert set(here.begun(first.task_id)) <= set(range(len(first.events)))
    assert ask(here, "DELETE", path).json()["status"] == "cancelled"
    assert "WorkflowCancelled" not in here.server().log


def test_resuming_after_each_event(here: Place) -> None:
    reader = here.start(here.server(), 3, 0)
    reader.wait()
    whole = ask(here, "GET", f"/tasks/{reader.task_id}/events").text
    events = whole.removeprefix("retry: 1000\n\n").split("\n\n")
    for last_event_id in range(3):  # the last of them: between the last part and the end
        rest = events_after(here, reader.task_id, str(last_event_id))
        assert rest.status_code == 200
        assert rest.text.endswith("\n\n".join(events[last_event_id + 1 :]))
        assert rest.text.count("data: ") == 3 - last_event_id
    nothing = events_after(here, reader.task_id, "3")
    assert nothing.status_code == 204
    assert HEADERS.items() <= {name: nothing.headers.get(name) for name in HEADERS}.items()
    for no_id in ("4", "9" * 20, "-1", "1.5", "x"):
        answer = events_after(here, reader.task_id, no_id)
        assert answer.status_code == 422
        assert answer.json()["detail"][0]["loc"] == ["header", "last-event-id"]


def test_a_part_that_raises(here: Place) -> None:
    reader = here.start(here.server(), 5, FAILING)
    task = reader.wait("failed")
    assert (task["done"], task["error"]) == (2, "no space left on the disk")
    assert ask(here, "GET", f"/tasks/{reader.task_id}").json() == task
    assert "ValueError: no space left" in here.server().log, "whoever runs the server sees where"


def test_the_same_key_gives_the_same_task(here: Place) -> None:
    headers = {"Idempotency-Key": uuid.uuid4().hex}
    body = {"parts": 2, "seconds": 0.1}

    def start(body: dict[str, Any]) -> requests.Response:
        return ask(here, "POST", "/tasks", json=body, headers=headers)

    with ThreadPoolExecutor(10) as pool:
        answers = list(pool.map(start, [body] * 10))
    assert {answer.status_code for answer in answers} == {202}
    (task_id,) = {answer.json()["task_id"] for answer in answers}
    assert {answer.headers["Location"] for answer in answers} == {f"/tasks/{task_id}"}
    here.read(here.server(), task_id).wait()
    assert start(body).json()["task_id"] == task_id, "when it is done, too"
    assert here.begun(task_id) == {0: 1, 1: 1}
    for other in ({"parts": 3}, {"seconds": 0.2}):
        refused = start(body | other)
        assert refused.status_code == 422
        assert refused.json()["detail"][0]["loc"] == ["header", "idempotency-key"]


# What is refused ----------------------------------------------------------------------------------


def test_what_is_refused(here: Place) -> None:
    good = {"parts": 1, "seconds": 0}
    for wrong in ({"parts": 0}, {"parts": 901}, {"parts": 1.5}, {"seconds": -1}, {"seconds": 60.1}):
        answer = ask(here, "POST", "/tasks", json=good | wrong)
        assert answer.status_code == 422
        assert answer.json()["detail"][0]["loc"] == ["body", *wrong]
    for task_id in (str(uuid.UUID(int=1)), "x"):
        for method, path in (("GET", ""), ("DELETE", ""), ("GET", "/events")):
            assert ask(here, method, f"/tasks/{task_id}{path}").status_code == 404


@pytest.mark.parametrize(
    "url", ["postgresql://u:secret@127.0.0.1:{port}/tasks", "sqlite:////nowhere/tasks.sqlite"]
)
def test_a_database_that_is_not_there(url: str) -> None:
    command = [sys.executable, "-m", "uvicorn", "recipes.long_task:app", "--port", "0"]
    environment = ENVIRONMENT | {"DATABASE_URL": url.format(port=free_port())}
    options: Any = {"cwd": ROOT, "env": environment, "text": True, "timeout": LIMIT}
    done = subprocess.run(command, capture_output=True, **options)
    (line,) = (line for line in done.stderr.splitlines() if not line.startswith("INFO:"))
    assert line.startswith("Cannot use DATABASE_URL: ")
    assert "secret" not in line
    assert done.returncode == 3


# The rest -----------------------------------------------------------------------------------------


def test_one_look_for_all_readers_of_a_task(here: Place) -> None:
    """As long as there are readers, and no longer."""
    server = here.server()
    first = here.start(server, 900, 0.2)
    readers = [first, *(here.read(server, first.task_id) for _ in range(20))]
    for reader in readers:
        reader.wait_for_part(0)
    wait_for(lambda: ask(here, "GET", "/watches").json() == 1, "one task to be looked at")
    here.sources.close(readers)
    wait_for(lambda: ask(here, "GET", "/watches").json() == 0, "the task to be let go")
    ask(here, "DELETE", f"/tasks/{first.task_id}")


def test_sqlite_is_locked_by_somebody_else(here: Place) -> None:
    reader = here.start(here.server(), 6, 0.3)
    reader.wait_for_part(0)
    file = here.database_url.removeprefix("sqlite:///")
    with closing(sqlite3.connect(file, LIMIT, isolation_level=None)) as other:
        other.execute("BEGIN EXCLUSIVE")
        answer = requests.get(f"{here.server().url}/tasks/{reader.task_id}", timeout=LIMIT)
        assert (answer.status_code, answer.headers["Retry-After"]) == (503, "5")
    reader.wait()
    assert reader.opened == 1


def test_the_disk_of_sqlite_is_full(here: Place) -> None:
    reader = here.start(here.server(), 6, 0.3)
    reader.wait_for_part(0)
    url, body = here.server().url, {"parts": 1, "seconds": 0}
    requests.post(f"{url}/full/1", timeout=LIMIT)
    post: Any = lambda: requests.post(f"{url}/tasks", json=body, timeout=LIMIT)  # noqa: E731
    wait_for(lambda: post().status_code == 503, "the disk to be full")
    requests.post(f"{url}/full/0", timeout=LIMIT)
    reader.wait()
    assert reader.opened == 1


def test_tasks_are_deleted_in_the_end(here: Place) -> None:
    old, young = (here.start(here.server(), 1, 0) for _ in range(2))
    for reader in (old, young):
        reader.wait()
    eight_days = 8 * 24 * 3600 * 1000
    with closing(sqlite3.connect(here.database_url.removeprefix("sqlite:///"))) as connection:
        ago = "UPDATE workflow_status SET completed_at = completed_at - ? WHERE workflow_uuid = ?"
        connection.execute(ago, [eight_days, old.task_id])
        connection.commit()
    path = f"/tasks/{old.task_id}"
    wait_for(lambda: ask(here, "GET", path).status_code == 404, "it to be deleted")
    assert ask(here, "GET", f"/tasks/{young.task_id}").status_code == 200


# The faults, in short: `python -m tests.faults.long_task` has them in full ------------------------


def test_the_table_is_of_these_faults() -> None:
    section = (ROOT / "tests/README.md").read_text().partition("<!-- faults of long_task -->\n")[2]
    _, _, *rows = section.partition("\n\n")[0].splitlines()
    names = [row.split(" | ")[0].removeprefix("| ") for row in rows]
    assert names == [*faults.BOTH, *faults.ALONE]


def test_kill_at_random(here: Place) -> None:
    faults.kill_at_random(here, 30, 1)


def test_a_part_that_its_server_does_not_survive(here: Place) -> None:
    assert faults.die_in_a_part(here).endswith("3 servers in a row did not survive part 1")


def test_an_edit_under_reload() -> None:
    with place(LOOK="0.3") as here:
        faults.save_the_code(here, 3, 3)


def test_a_server_that_hangs(here: Place) -> None:
    faults.hang(here, 3)
