"""recipes/long_task on PostgreSQL: its servers are lost, its database goes away and comes back.

The tests share the database and the servers, so they run in one worker.
`python -m tests.faults.long_task` has the faults in full.
"""

import signal
import subprocess
import sys
import time
from collections.abc import Iterator

import psycopg
import pytest
import requests

from tests.faults import long_task as faults
from tests.faults.long_task import LOSING, Place, place
from tests.support.postgres import Postgres, running_postgres
from tests.support.processes import LIMIT, wait_for

pytestmark = pytest.mark.xdist_group("long_task on PostgreSQL")


@pytest.fixture(scope="module")
def postgres() -> Iterator[Postgres]:
    """One for all tests; each leaves it running."""
    with running_postgres() as postgres:
        yield postgres


@pytest.fixture(scope="module")
def here(postgres: Postgres) -> Iterator[Place]:
    url = f"{postgres.database_url}?application_name=tasks"  # which people do set
    with place(url, LOOK="0.3", KEEP_ALIVE="1") as here:
        yield here


# One server ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("away", faults.AWAY)
def test_the_database_is_away(here: Place, postgres: Postgres, away: faults.Away) -> None:
    faults.take_the_database_away(here, postgres, away, 0)


def test_a_session_is_lost_while_a_result_is_kept(here: Place) -> None:
    """Twice in a row: the database's error is not kept in place of the result."""
    reader = here.start(here.server(), 3, LOSING)
    reader.wait()
    assert here.begun(reader.task_id) == {0: 1, 1: 1, 2: 1}


@pytest.mark.parametrize(
    ("away", "signum"), [(faults.killed, signal.SIGINT), (faults.hanging, signal.SIGTERM)]
)
def test_one_signal_is_enough_while_the_database_is_away(
    here: Place, postgres: Postgres, away: faults.Away, signum: int
) -> None:
    server = here.server()
    reader = here.start(server, 6, 0.3)
    reader.wait_for_part(0)
    with away(postgres):
        asked = time.monotonic()
        server.signal(signum)
        server.wait()
        assert time.monotonic() - asked < 20
    here.server()  # starts it again
    reader.wait()


def test_the_database_comes_back_older(here: Place, postgres: Postgres) -> None:
    """From a backup: no reader gets an event twice, also when another server goes on."""
    server = here.server()
    reader = here.start(server, 9, 0.3)
    reader.wait_for_part(3)
    with psycopg.connect(postgres.database_url) as connection:
        connection.execute("DELETE FROM dbos.operation_outputs WHERE function_id > 2")
    reader.wait_for_part(5)
    assert reader.opened == 1
    server.kill()
    server.start()
    reader.wait()
    assert here.begun(reader.task_id)[3] == 2


def test_the_database_comes_back_empty(here: Place, postgres: Postgres) -> None:
    """Its tasks are gone: a 404 says so. New ones can be started."""
    server = here.server()
    reader = here.start(server, 60, 0.5, key="one")
    reader.wait_for_part(0)
    with psycopg.connect(postgres.database_url) as connection:
        connection.execute("DROP SCHEMA dbos CASCADE")
    wait_for(lambda: reader.status == 404, "the reader to be told")
    here.sources.close([reader])
    here.start(server, 2, 0).wait()
    # What makes an id of a key is a secret of the database.
    server.kill()
    server.start()
    assert here.start(server, 1, 0, key="one").task_id != reader.task_id


OTHER = """
import time
from dbos import DBOS

@DBOS.workflow(name="long_task")
def another():
    print("running", flush=True)
    time.sleep(600)

DBOS(config={"name": "another", "system_database_url": %r, "executor_id": "another"})
DBOS.launch()
another()
"""


def test_another_program_in_the_same_database(here: Place, postgres: Postgres) -> None:
    """Its workflows are left alone, even one of the same name."""
    server = here.server()
    reader = here.start(server, 3, 3)
    wait_for(lambda: here.begun(reader.task_id), "the task to begin")
    command = [sys.executable, "-c", OTHER % postgres.database_url]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as another:
        assert another.stdout
        assert another.stdout.readline() == "running\n"
        another.kill()
    server.kill()
    server.start()
    reader.wait()  # the server has looked for what dead ones left behind
    look = "SELECT status, workflow_uuid FROM dbos.workflow_status WHERE executor_id = 'another'"
    with psycopg.connect(postgres.database_url) as connection:
        [(status, workflow_id)] = connection.execute(look).fetchall()
    assert status == "PENDING"
    assert requests.get(f"{server.url}/tasks/{workflow_id}", timeout=LIMIT).status_code == 404


# Two servers --------------------------------------------------------------------------------------


def test_started_on_one_server_cancelled_on_another(here: Place) -> None:
    faults.use_two_servers(here, 3)


def test_a_server_that_hangs(here: Place) -> None:
    faults.hang(here, 3)


def test_servers_whose_sessions_are_lost_live_on(here: Place, postgres: Postgres) -> None:
    """At any moment: nothing is lost, and nothing is sent twice."""
    end = (
        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
        " WHERE backend_type = 'client backend' AND pid != pg_backend_pid()"
    )
    readers = [here.start(server, 60, 0.05) for server in here.servers(2) * 3]
    with psycopg.connect(postgres.database_url) as connection:
        for part in range(5, 50, 5):
            readers[0].wait_for_part(part)
            connection.execute(end)
    for reader in readers:
        reader.wait()
        assert reader.opened == 1


def test_a_server_is_lost_and_the_loops_of_the_other_outlive_what_nobody_has_foreseen(
    here: Place,
) -> None:
    _, other = here.servers(2)
    reader = here.start(other, 20, 0.3)
    reader.wait_for_part(0)
    requests.post(f"{other.url}/broken/2")
    other.wait_for_log("Tasks cannot be watched: IndexError: list index out of range")
    other.wait_for_log("Tasks cannot be looked after: IndexError: list index out of range")
    faults.lose_one_of_two(here)
    reader.wait()
    assert reader.opened == 1
