"""What is behind recipes/long_task.py: DBOS, its database, and which servers are alive.

The lesson is in long_task.py. This is for those who run it, and know what it does when its
database goes away, or another server.
"""

import asyncio
import fcntl
import logging
import os
import secrets
import threading
import time
import uuid
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, TypeVar

import psycopg
import sqlalchemy as sa
from dbos import DBOS, DBOSClient, DBOSPortableJSONSerializer, WorkflowStatus, error
from sqlalchemy import event, exc

T = TypeVar("T")
LOOK = 5.0  # seconds from one look for tasks whose server is gone to the next
DEATHS = 3  # servers that did not survive the same part; then its task has failed
AWAY = (exc.SQLAlchemyError, psycopg.Error, TimeoutError)  # what `ask` raises when it is away
EXPECTED = "expected sqlite:///FILE or postgresql://USER:PASSWORD@HOST/DATABASE"
POSTGRESQL = {
    # A machine that vanishes is noticed on both sides, within 20 seconds.
    **{"keepalives_idle": "10", "keepalives_interval": "5", "keepalives_count": "2"},
    "options": "-c tcp_keepalives_idle=10 -c tcp_keepalives_interval=5 -c tcp_keepalives_count=2",
    "connect_timeout": "3",
    "target_session_attrs": "read-write",  # after a failover: the new primary
}


class Database:
    """DBOS and its database. `client`, `engine` and `ask` are for requests: they never wait long.

    `secret` is the same for all servers that share the database.
    """

    client: DBOSClient
    engine: sa.Engine
    secret: str

    def __init__(self, name: str, keep: float) -> None:
        """`name` is that of the workflow and its queue; `keep`: days until a task is deleted."""
        self.name, self.keep = name, keep
        self.file = (
            Path(__file__).resolve().with_name(f"{name}.sqlite")
        )  # unless DATABASE_URL is set
        self.server = str(uuid.uuid4())  # the name of this process, which no other ever has
        self.working: list[str] = []  # the tasks that this process works on
        self.idle: set[str] = set()  # those that are its own, but were not in work at the last look
        self.lock: Any = None
        self.threads = ThreadPoolExecutor(4, "database")
        self.stopping = threading.Event()

    async def ask(self, question: Callable[..., T], *args: Any) -> T:
        """Ask the database, for 4 seconds at most, without holding up the event loop."""
        answer = asyncio.get_running_loop().run_in_executor(self.threads, question, *args)
        try:
            return await asyncio.wait_for(answer, 4)
        except TimeoutError:
            raise TimeoutError("the database did not answer within 4 seconds") from None

    @contextmanager
    def at_work(self, task_id: str) -> Iterator[None]:
        """Note that this process works on a task. Raises what its work has raised at last."""
        self.working.append(task_id)
        try:
            yield
        except error.DBOSMaxStepRetriesExceeded as problem:
            raise problem.errors[-1] from None
        finally:
            self.working.remove(task_id)

    # Start and stop -------------------------------------------------------------------------------

    async def start(self) -> None:
        """Start DBOS, and go on with the tasks that nobody works on; raise if that cannot be."""
        # In a thread: started from a coroutine, DBOS would run the work on the server's event loop.
        await asyncio.get_running_loop().run_in_executor(self.threads, self.start_dbos)

    def start_dbos(self) -> None:
        log = logging.getLogger("dbos")
        log.setLevel(logging.CRITICAL)  # what goes wrong here is told by the caller
        log.addFilter(lambda record: "WorkflowCancelled" not in str(record.exc_info))
        self.url = read_url(os.environ.get("DATABASE_URL") or f"sqlite:///{self.file}")
        self.engine, patient = self.create_engine(), self.create_engine()
        event.listen(self.engine, "begin", self.refuse_read_only)
        event.listen(patient, "handle_error", self.take_as_lost_connection)
        event.listen(patient, "do_connect", self.connect_when_it_is_back)
        serializer = DBOSPortableJSONSerializer()  # the default is pickle
        self.client = DBOSClient(
            system_database_engine=self.engine,
            serializer=serializer,
            application_name=self.name,
            lazy=True,
            retry_connection_errors=False,
        )
        self.prepare()
        DBOS(
            config={
                "name": self.name,
                "system_database_engine": patient,
                "serializer": serializer,
                # By default a hash of the code: an edit would leave what is running behind.
                "application_version": "1",
                "executor_id": self.server,
                "use_listen_notify": False,
                "log_level": "ERROR",  # below that, an outage is told in thousands of lines
            }
        )
        DBOS.launch()
        self.rescue()

    async def stop(self) -> None:
        """Stop DBOS, and hand its tasks over; for two seconds at most."""
        self.stopping.set()
        with suppress(Exception):  # then the others notice in a while that this server is gone
            await asyncio.wait_for(self.ask(self.stop_dbos), 2)
        threading.Thread(target=self.end_process, daemon=True).start()

    def stop_dbos(self) -> None:
        DBOS.destroy()
        mine = self.list_running(executor_id=self.server)
        self.client.resume_workflows([task.workflow_id for task in mine], queue_name=self.name)

    def end_process(self) -> None:
        """End the process even if threads of DBOS still wait for a database that is away."""
        with suppress(RuntimeError):  # which comes as soon as Python waits for threads to end
            while True:
                self.threads.submit(int)
                time.sleep(0.5)
        time.sleep(1)
        os._exit(130)

    def prepare(self) -> None:
        """Make what the database lacks, at the start and when it came back, perhaps empty."""
        DBOS.migrate(self.url.render_as_string(hide_password=False))
        self.client.register_queue(self.name, worker_concurrency=100, polling_interval_sec=0.5)
        # `enqueue` changes nothing if there is a row with that id, and no server works on this
        # queue. So the secret of the first server becomes everybody's.
        row: Any = {"queue_name": "secrets", "workflow_name": "secret"}
        row["workflow_id"] = f"{self.name} secret"
        kept: Any = self.client.enqueue(row, secrets.token_hex())
        self.secret = kept.get_status().input["args"][0]
        if self.url.drivername == "sqlite":
            self.lock = self.lock or Path(f"{self.url.database}.servers").open("a")  # noqa: SIM115
        elif not self.lock or self.lock.closed:
            _, options = self.engine.dialect.create_connect_args(self.url)
            self.lock = psycopg.connect(**options, autocommit=True)
        if not self.take_lock(self.server):
            raise TimeoutError("PostgreSQL has not noticed yet that our last session is over")

    # The connections ------------------------------------------------------------------------------

    def create_engine(self) -> sa.Engine:
        # IMMEDIATE is what DBOS sets itself where it creates the engine.
        options = {"isolation_level": "IMMEDIATE"} if self.url.drivername == "sqlite" else {}
        return sa.create_engine(
            self.url, connect_args=options, pool_size=4, max_overflow=0, pool_pre_ping=True
        )

    def refuse_read_only(self, connection: sa.Connection) -> None:
        """After a failover the old primary does not know what the new one has been told."""
        if self.url.drivername == "sqlite":
            return
        if connection.scalar(sa.text("SHOW transaction_read_only")) == "on":
            connection.invalidate()
            raise exc.DisconnectionError("The database is read-only.")

    def take_as_lost_connection(self, context: sa.engine.ExceptionContext) -> None:
        """Let DBOS wait while the database is read-only, full, or without its tables.

        It waits where a connection is lost. By any other error the task would fail.
        """
        wrong = isinstance(context.sqlalchemy_exception, exc.IntegrityError | exc.DataError)
        context.is_disconnect = not wrong

    def connect_when_it_is_back(self, dialect: Any, _: Any, args: Any, options: Any) -> Any:
        """Try again soon: DBOS would double its pause each time, up to 90 seconds."""
        while not self.stopping.wait(0.1):
            with suppress(dialect.dbapi.Error):
                return dialect.connect(*args, **options)
        raise exc.DisconnectionError("The server stops.")

    # The living and the dead ----------------------------------------------------------------------

    def take_lock(self, server: str) -> bool:
        """Take the lock of a server, unless it lives.

        Each server has its own for as long as it lives, however slow it is. PostgreSQL lets go of
        an advisory lock when its session ends, the operating system of a file's when the process
        ends: for SQLite, the lock is a byte of a file.
        """
        if self.url.drivername != "sqlite":
            take = "SELECT pg_try_advisory_lock(hashtextextended(%s, 0))"
            return bool(self.lock.execute(take, [server]).fetchone()[0])
        with suppress(BlockingIOError, PermissionError):
            byte = zlib.crc32(server.encode())
            fcntl.lockf(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, byte)
            return True
        return False

    def give_lock_back(self, server: str) -> None:
        if self.url.drivername != "sqlite":
            self.lock.execute("SELECT pg_advisory_unlock(hashtextextended(%s, 0))", [server])
        else:
            fcntl.lockf(self.lock, fcntl.LOCK_UN, 1, zlib.crc32(server.encode()))

    def list_running(self, **options: Any) -> list[WorkflowStatus]:
        return self.client.list_workflows(name=self.name, status="PENDING", **options)

    def rescue(self) -> None:
        """Put tasks that nobody works on back into the queue.

        Should somebody work on one after all, DBOS refuses what all but the last return.
        """
        self.take_lock(self.server)  # which it has, or this raises: the session is lost
        tasks = self.list_running(load_input=False)
        mine = {task.workflow_id for task in tasks if task.executor_id == self.server}
        # DBOS loses a task if the database goes away just when it takes it from the queue.
        idle_before, self.idle = self.idle, mine - set(self.working)
        if lost := idle_before & self.idle:
            self.client.resume_workflows(list(lost), queue_name=self.name)
        for server in {str(task.executor_id) for task in tasks} - {self.server}:
            if self.take_lock(server):  # so nobody else does the same
                for task in self.list_running(executor_id=server):
                    self.put_back(task)
                self.give_lock_back(server)

    def put_back(self, task: WorkflowStatus) -> None:
        """Put a task back into the queue, unless its part has killed too many servers."""
        task_id, before = task.workflow_id, task.attributes or {}
        part = self.count_parts([task_id])[task_id]
        deaths = 1 + (before["deaths"] if before.get("part") == part else 0)
        self.client.update_workflow_attributes(task_id, {"part": part, "deaths": deaths})
        if deaths < DEATHS:
            self.client.resume_workflow(task_id, queue_name=self.name)
        else:
            self.client.cancel_workflow(task_id)

    async def look_after_tasks(self) -> None:
        await self.ask(self.prepare)
        await asyncio.sleep(2 * LOOK)  # for the others to take their locks, if it was away
        while True:
            await self.ask(self.rescue)
            await asyncio.sleep(LOOK)

    def delete_old(self) -> None:
        before = (datetime.now(UTC) - timedelta(days=self.keep)).isoformat()
        old = self.client.list_workflows(name=self.name, completed_before=before, limit=1000)
        self.client.delete_workflows([task.workflow_id for task in old])

    async def delete_old_tasks(self) -> None:
        await self.ask(self.delete_old)
        await asyncio.sleep(60)

    def count_parts(self, task_ids: list[str]) -> dict[str, int]:
        """Return how many parts of each task are done: the number of the last step that it kept.

        One question for any number of tasks. DBOS has no function for it, but documents its tables:
        https://docs.dbos.dev/explanations/system-tables
        """
        columns: list[Any] = [sa.column(name) for name in ("workflow_uuid", "function_id", "error")]
        schema = None if self.url.drivername == "sqlite" else "dbos"
        steps: Any = sa.table("operation_outputs", *columns, schema=schema)
        count = (
            sa.select(steps.c.workflow_uuid, sa.func.max(steps.c.function_id))
            .where(steps.c.workflow_uuid.in_(task_ids), steps.c.error.is_(None))
            .group_by(steps.c.workflow_uuid)
        )
        with self.engine.connect() as connection:
            done = {str(task_id): int(number) for task_id, number in connection.execute(count)}
        return {task_id: done.get(task_id, 0) for task_id in task_ids}


def read_url(value: str) -> sa.URL:
    """Return the address of the database. Raises ValueError with what was expected."""
    try:
        url = sa.make_url(value)
    except (exc.ArgumentError, ValueError):  # which may repeat a part of the password
        raise ValueError(f"{EXPECTED}, special characters as %XX") from None
    if url.drivername.startswith("postgres"):  # postgres: and postgresql+psycopg: are usual, too
        url = url.set(drivername="postgresql+psycopg")
        url = url.update_query_dict(POSTGRESQL | dict(url.query))  # the address has the last word
    elif url.drivername != "sqlite":
        raise ValueError(EXPECTED)
    if url.database in (None, "", ":memory:") or "@" in str(url.host):
        raise ValueError(f"{EXPECTED}, special characters as %XX")
    return url
