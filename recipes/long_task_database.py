"""The database of long_task, SQLite or PostgreSQL: what to do if it goes away, or a server dies.

Nothing here is about tasks. You can read long_task.py without it, or use it for other workflows.
"""

import asyncio
import fcntl
import os
import sys
import time
import zlib
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import IO, Any, TypeVar
from uuid import UUID, uuid4

import sqlalchemy as sa
from dbos import DBOS, DBOSClient, DBOSPortableJSONSerializer
from sqlalchemy import event, exc

from recipes.common import database_url, in_one_line

NAME = "long_task"  # of the workflow and its queue
DATABASE_URL = database_url(f"sqlite:///{Path(__file__).resolve().with_name('long_task.sqlite')}")
IS_SQLITE = DATABASE_URL.startswith("sqlite:")
SCHEMA = "" if IS_SQLITE else "dbos."
POSTGRESQL = {
    "client_encoding": "UTF8",  # the database itself may be in SQL_ASCII
    "connect_timeout": "3",
    "target_session_attrs": "read-write",  # after a failover: the new primary
    # A machine that vanishes is noticed on both sides, within 20 seconds.
    "tcp_user_timeout": "20000",
    "options": "-c tcp_keepalives_idle=10 -c tcp_keepalives_interval=5 -c tcp_keepalives_count=2",
    **{"keepalives_idle": "10", "keepalives_interval": "5", "keepalives_count": "2"},
}
SERVER = str(uuid4())  # the name of this process, which no other ever has
missing: set[str] = set()  # the servers that were not found at the last look
# `launch` sets these.
engine: sa.Engine
secret: UUID  # all servers with this database share it
locks: IO[str]  # with SQLite: a file in which each live server has locked a byte
T = TypeVar("T")


async def ask(question: Callable[..., T], *args: Any) -> T:
    """Ask the database, for 4 seconds at most, without blocking the event loop."""
    return await asyncio.wait_for(asyncio.to_thread(question, *args), 4)


@asynccontextmanager
async def running() -> AsyncIterator[None]:
    """Work on what is in the queue. At the end of the block, leave the rest to other servers."""
    try:
        # In a thread: started from a coroutine, DBOS would run the work on the server's event loop.
        await asyncio.to_thread(launch)
    except Exception as problem:
        why = in_one_line(getattr(problem, "orig", problem))
        print(f"Cannot use DATABASE_URL: {why}", file=sys.stderr)
        os._exit(3)  # as uvicorn itself does, but without its traceback
    yield
    try:
        await ask(stop)
    except Exception:
        os._exit(1)  # a thread that waits for the database would not let the process end


def launch() -> None:
    global engine, secret, locks
    url = sa.make_url(DATABASE_URL.replace("postgresql:", "postgresql+psycopg:", 1))
    if IS_SQLITE:
        url = url.update_query_dict({"isolation_level": "IMMEDIATE"})  # as DBOS itself does
        locks = Path(f"{url.database}.servers").open("a")  # noqa: SIM115
        lock(SERVER)
    else:
        url = url.update_query_dict(POSTGRESQL | dict(url.query) | {"application_name": SERVER})
    engine = sa.create_engine(url, pool_size=8, max_overflow=0, pool_pre_ping=True)
    DBOS(
        config={
            "name": NAME,
            "system_database_engine": engine,
            "serializer": DBOSPortableJSONSerializer(),  # the default is pickle
            # The default is a hash of the code: after an edit, running tasks would be left behind.
            "application_version": "1",
            "executor_id": SERVER,
            "use_listen_notify": False,
            "log_level": "CRITICAL",  # the recipe itself reports what is wrong
        }
    )
    DBOS.launch()
    secret = UUID(DBOS.get_latest_application_version()["version_id"])
    wait_while_it_is_away()


def wait_while_it_is_away() -> None:
    """From now on, wait after each error until the database can be used again."""
    probe = sa.create_engine(engine.url, poolclass=sa.NullPool)
    write = sa.text(f"UPDATE {SCHEMA}workflow_status SET name = name WHERE 1 = 0")

    @event.listens_for(engine, "handle_error")
    def wait(context: sa.engine.ExceptionContext) -> None:
        if isinstance(context.sqlalchemy_exception, exc.IntegrityError | exc.DataError):
            return
        # After a lost connection DBOS tries again, the first time within two seconds, later with
        # pauses of up to 90. Any other error would fail the workflow, even if the database is only
        # read-only, full, or without its tables.
        context.is_disconnect = True
        if IS_SQLITE and context.connection:
            with suppress(Exception):  # otherwise it keeps the lock that `probe` needs
                context.connection.connection.rollback()
        engine.dispose()  # an idle connection may lead to what is now a replica
        while True:
            with suppress(exc.SQLAlchemyError), probe.begin() as connection:
                connection.execute(write)
                return
            time.sleep(0.1)


def make_what_is_missing() -> None:
    """Create missing tables and the queue: the database may have come back empty."""
    DBOS.migrate(engine.url.render_as_string(hide_password=False))
    DBOS.register_queue(NAME, worker_concurrency=100, on_conflict="always_update")


def stop() -> None:
    """Hand over this server's tasks: a task that is left behind would count as a death."""
    DBOS.destroy()
    client = DBOSClient(system_database_engine=engine, lazy=True)
    mine = client.list_workflows(name=NAME, status="PENDING", executor_id=SERVER, load_input=False)
    client.resume_workflows([workflow.workflow_id for workflow in mine], queue_name=NAME)


def find_dead(servers: set[str]) -> set[str]:
    """Return which of these servers are dead, however slow the others are.

    Until its process ends, a server has sessions in PostgreSQL under its name. With SQLite, it has
    locked a byte. Sessions may be lost and opened again, so only a second look counts.
    """
    global missing
    if IS_SQLITE:
        found = {server for server in servers - {SERVER} if lock(server)}
    else:
        names = sa.text("SELECT application_name FROM pg_stat_activity")
        with engine.connect() as connection:
            found = servers - set(connection.scalars(names))
    dead, missing = found & missing, found
    return dead


def lock(server: str) -> bool:
    """Lock a server's byte, so that nobody else finds it dead; return whether that was possible."""
    with suppress(OSError):
        fcntl.lockf(locks, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, zlib.crc32(server.encode()))
        return True
    return False


def count_steps(workflow_ids: list[str]) -> dict[str, int]:
    """Return how many steps are done, for each of these workflows that has any."""
    # DBOS has no function for this, but documents its tables:
    # https://docs.dbos.dev/explanations/system-tables
    count = sa.text(
        f"SELECT workflow_uuid, max(function_id) FROM {SCHEMA}operation_outputs"
        " WHERE workflow_uuid IN :ids AND error IS NULL GROUP BY workflow_uuid"
    ).bindparams(sa.bindparam("ids", workflow_ids, expanding=True))
    with engine.connect() as connection:
        return dict(connection.execute(count).tuples().all())
