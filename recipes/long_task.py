"""Minutes of work that outlive the request, the reader and the server.

A report, a video, a model's training. The request only writes down what is to be done, and is
answered at once. The work goes on whether or not somebody watches, and after a crash it goes on
where it was. If the work may end with its reader, or takes only seconds, a generator is enough:
recipes/basics.py.

Run it with `uvicorn recipes.long_task:app --reload`, then open http://localhost:8000, or

    curl localhost:8000/tasks --json '{"parts": 9, "seconds": 1}'
    curl -N localhost:8000/tasks/ID/events

DBOS keeps what each part returned in a database: SQLite in a file next to this one, or PostgreSQL
for more than one machine, DATABASE_URL=postgresql://user:password@host/database.
"""

import asyncio
import fcntl
import os
import sys
import time
import zlib
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import IO, Annotated, Any, Literal, TypeVar
from uuid import UUID, uuid4, uuid5

import sqlalchemy as sa
from dbos import DBOS, DBOSClient, DBOSPortableJSONSerializer, SetWorkflowID, error
from fastapi import FastAPI, Header, HTTPException, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse
from pydantic import BaseModel, Field
from sqlalchemy import event, exc

from main import HEADERS, EndStreams, Stream
from recipes.common import database_url, in_one_line, keep_going, logger, prepare

NAME = "long_task"  # of the workflow and its queue
POLL = 0.1  # seconds from one look at the tasks that have readers to the next
LOOK = 1.0  # seconds from one look for tasks that nobody works on to the next
DEATHS = 3  # servers that did not survive the same part; then its task has failed
KEEP = timedelta(days=7)  # from the end of a task until it is deleted
KEEP_ALIVE = 10.0  # seconds of silence, then a comment
DATABASE_URL = database_url(default=f"sqlite:///{Path(__file__).resolve().with_suffix('.sqlite')}")
IS_SQLITE = DATABASE_URL.startswith("sqlite:")
T = TypeVar("T")


# 1. The work --------------------------------------------------------------------------------------


@DBOS.step(retries_allowed=True, max_attempts=3)  # with pauses of 1 and 2 seconds
async def work(part: int, seconds: float) -> float:
    """Do one part of the work. Yours goes here; what blocks goes through `asyncio.to_thread`.

    A part in which the server dies is done again, so a second run must do no harm: write to a file
    named after the part, insert with ON CONFLICT DO NOTHING.
    """
    await asyncio.sleep(seconds)
    return seconds


working: list[str] = []  # the tasks that this process works on


@DBOS.workflow(name=NAME, max_recovery_attempts=None)  # `rescue` has a limit for each part
async def long_task(parts: int, seconds: float) -> dict[str, float]:
    """Do all parts. After a crash it runs from its top, but no step that is done is done again."""
    task_id, worked = str(DBOS.workflow_id), 0.0
    working.append(task_id)
    try:
        for part in range(parts):
            # One step for each part, so that the number of steps is how far the task is.
            worked += await work(part, seconds)
        return {"seconds": worked}
    except error.DBOSMaxStepRetriesExceeded as problem:
        logger.error("Task %s has failed", task_id, exc_info=problem.errors[-1])
        raise problem.errors[-1] from None
    finally:
        working.remove(task_id)


# 2. A task, as a reader sees it -------------------------------------------------------------------


class Task(BaseModel):
    task_id: str
    status: Literal["running", "done", "failed", "cancelled"]
    done: int
    parts: int
    result: Any = None
    error: str | None = None


STATUS: dict[str, Any] = {"ENQUEUED": "running", "PENDING": "running"}
STATUS |= {"SUCCESS": "done", "CANCELLED": "cancelled"}
# How many parts are done. DBOS has no function for this, but documents its tables:
# https://docs.dbos.dev/explanations/system-tables
DONE = sa.text(
    f"SELECT workflow_uuid, max(function_id) FROM {'' if IS_SQLITE else 'dbos.'}operation_outputs"
    " WHERE workflow_uuid IN :tasks AND error IS NULL GROUP BY workflow_uuid"
).bindparams(sa.bindparam("tasks", expanding=True))


def read_tasks(task_ids: list[str]) -> dict[str, Task]:
    """Return those of these tasks that there are, with two queries for any number of them."""
    tasks = {}
    workflows: list[Any] = DBOS.list_workflows(workflow_ids=task_ids, name=NAME)
    with engine.connect() as connection:  # asked last, so that what is over has all its parts
        done: dict[str, int] = dict(connection.execute(DONE, {"tasks": task_ids}).tuples().all())
    for workflow in workflows:
        problem = (workflow.attributes or {}).get("error") or workflow.error
        tasks[workflow.workflow_id] = Task(
            task_id=workflow.workflow_id,
            status="failed" if problem else STATUS.get(workflow.status, "failed"),
            done=done.get(workflow.workflow_id, 0),
            parts=workflow.input["args"][0],
            result=workflow.output,
            error=str(problem) if problem else None,
        )
    return tasks


watched: set[str] = set()  # the tasks for which readers have waited since the last look
latest: dict[str, Task | None] = {}  # these tasks at the last look; None: it is no longer there


async def watch_tasks() -> None:
    """Look at all tasks that have readers, in one go."""
    global latest
    await asyncio.sleep(POLL)
    task_ids = list(watched)
    watched.clear()
    latest = dict.fromkeys(task_ids) | (await ask(read_tasks, task_ids) if task_ids else {})


async def follow(task: Task | None, first: int) -> AsyncIterator[str]:
    """Yield a task's events from number `first` to the end, and a comment in each silence."""
    yield "retry: 1000\n\n"
    sent = time.monotonic()
    while task:
        for n in range(first, task.done):
            yield f'id: {n}\ndata: {{"done": {n + 1}, "parts": {task.parts}}}\n\n'
            first, sent = n + 1, time.monotonic()
        if task.status != "running":
            yield f"event: end\nid: {task.done}\ndata: {task.model_dump_json()}\n\n"
            return
        if time.monotonic() > sent + KEEP_ALIVE:
            yield ": keep-alive\n\n"
            sent = time.monotonic()
        watched.add(task.task_id)
        await asyncio.sleep(POLL)
        task = latest.get(task.task_id, task)


# 3. The requests ----------------------------------------------------------------------------------


@asynccontextmanager
async def lifespan(_: FastAPI) -> AsyncIterator[None]:
    try:
        # In a thread: started from a coroutine, DBOS would run the work on the server's event loop.
        await asyncio.to_thread(launch)
    except Exception as problem:
        why = in_one_line(getattr(problem, "orig", problem))
        print(f"Cannot use DATABASE_URL: {why}", file=sys.stderr)
        os._exit(3)  # as uvicorn itself does, but without its traceback
    loops = asyncio.gather(
        keep_going("Tasks cannot be watched", watch_tasks),
        keep_going("Tasks cannot be looked after", look_after_tasks),
    )
    yield
    loops.cancel()
    try:
        await ask(stop)
    except Exception:
        os._exit(1)  # a thread that waits for the database would not let the process end


app = FastAPI(lifespan=lifespan)
app.add_middleware(EndStreams)
prepare(app, page="long_task.html")


@app.exception_handler(exc.SQLAlchemyError)
@app.exception_handler(TimeoutError)
async def database_away(_: Request, problem: Exception) -> Response:
    """Nobody knows now whether something was done. It can be asked for again, with the same key."""
    return JSONResponse({"detail": "The database is away."}, 503, {"Retry-After": "5"})


class NewTask(BaseModel):
    parts: int = Field(ge=1, le=900)
    seconds: float = Field(ge=0, le=60, description="Seconds of work for each part.")


def enqueue(task_id: str, *args: Any) -> Any:
    """Write down what is to be done, unless that was done before. Return what is written there."""
    with SetWorkflowID(task_id):
        handle: Any = DBOS.enqueue_workflow(NAME, long_task, *args)
    return handle.get_status().input["args"]


def invalid_header(name: str, value: str, message: str) -> HTTPException:
    detail = {"type": "value_error", "loc": ("header", name), "msg": message, "input": value}
    return HTTPException(422, [detail])


@app.post("/tasks", status_code=202)
async def start(
    new: NewTask, response: Response, idempotency_key: Annotated[str, Header()] = ""
) -> dict[str, str]:
    """Start a task. If you got no answer, send it again: the same key gives the same task."""
    # Without the servers' secret nobody can tell the id from the key.
    task_id = str(uuid5(secret, idempotency_key) if idempotency_key else uuid4())
    args = new.parts, new.seconds
    if await ask(enqueue, task_id, *args) != args:
        raise invalid_header("idempotency-key", idempotency_key, "It has started another task")
    response.headers["Location"] = f"/tasks/{task_id}"
    return {"task_id": task_id}


@app.get("/tasks/{task_id:uuid}")
async def show(task_id: UUID) -> Task:
    if task := (await ask(read_tasks, [str(task_id)])).get(str(task_id)):
        return task
    raise HTTPException(404, "There is no such task.")


@app.delete("/tasks/{task_id:uuid}", status_code=202)
async def cancel(task_id: UUID) -> Task:
    """Let a task stop before its next part."""
    task = await show(task_id)
    await ask(DBOS.cancel_workflow, task.task_id)
    return await show(task_id)


@app.get("/tasks/{task_id:uuid}/events", response_class=StreamingResponse)
async def events(
    task_id: UUID, last_event_id: Annotated[str, Header(pattern="^[0-9]{0,19}$")] = ""
) -> Response:
    task = await show(task_id)
    first = int(last_event_id) + 1 if last_event_id else 0
    if first > task.parts + 1:
        message = f"Input should be at most {task.parts}, the id of the end"
        raise invalid_header("last-event-id", last_event_id, message)
    if first > task.done and task.status != "running":
        return Response(status_code=204, headers=HEADERS)
    return Stream(follow(task, first), media_type="text/event-stream")


# 4. The database ----------------------------------------------------------------------------------

SERVER = str(uuid4())  # the name of this process, which no other ever has
POSTGRESQL = {
    "connect_timeout": "3",
    "target_session_attrs": "read-write",  # after a failover: the new primary
    # A machine that vanishes is noticed on both sides, within 20 seconds.
    "tcp_user_timeout": "20000",
    "options": "-c tcp_keepalives_idle=10 -c tcp_keepalives_interval=5 -c tcp_keepalives_count=2",
    **{"keepalives_idle": "10", "keepalives_interval": "5", "keepalives_count": "2"},
}
# `launch` sets these.
engine: sa.Engine
secret: UUID  # that all servers with this database have in common
locks: IO[str]  # with SQLite: a file, of which each server that lives has locked a byte


async def ask(question: Callable[..., T], *args: Any) -> T:
    """Ask the database, for 4 seconds at most, without holding up the event loop."""
    return await asyncio.wait_for(asyncio.to_thread(question, *args), 4)


def launch() -> None:
    """Connect to the database, and start to work on what is in the queue."""
    global engine, secret, locks
    url = sa.make_url(DATABASE_URL.replace("postgresql:", "postgresql+psycopg:", 1))
    if IS_SQLITE:
        url = url.update_query_dict({"isolation_level": "IMMEDIATE"})  # as DBOS itself does
        locks = Path(f"{url.database}.servers").open("a")  # noqa: SIM115
        is_alive(SERVER)  # locks its byte
    else:
        url = url.update_query_dict(POSTGRESQL | dict(url.query) | {"application_name": SERVER})
    engine = sa.create_engine(url, pool_size=8, max_overflow=0, pool_pre_ping=True)
    DBOS(
        config={
            "name": NAME,
            "system_database_engine": engine,
            "serializer": DBOSPortableJSONSerializer(),  # the default is pickle
            # By default a hash of the code: an edit would leave what is running behind.
            "application_version": "1",
            "executor_id": SERVER,
            "use_listen_notify": False,
            "log_level": "CRITICAL",  # `lifespan`, `keep_going` and `long_task` tell what is wrong
        }
    )
    DBOS.launch()
    secret = UUID(DBOS.get_latest_application_version()["version_id"])
    # From now on, a database that is away is waited for.
    event.listen(engine, "handle_error", take_as_lost_connection)
    event.listen(engine, "do_connect", connect_when_it_is_back)


def take_as_lost_connection(context: sa.engine.ExceptionContext) -> None:
    """Let DBOS wait while the database is read-only, full, or without its tables.

    It waits where a connection is lost. By any other error the task would fail.
    """
    wrong = isinstance(context.sqlalchemy_exception, exc.IntegrityError | exc.DataError)
    context.is_disconnect = not wrong


def connect_when_it_is_back(dialect: Any, _: Any, args: Any, options: Any) -> Any:
    """Try again soon: DBOS would double its pause each time, up to 90 seconds."""
    while True:
        with suppress(dialect.dbapi.Error):
            return dialect.connect(*args, **options)
        time.sleep(0.1)


def make_what_is_missing() -> None:
    """Make the tables and the queue, if there are none: the database may have come back empty."""
    DBOS.migrate(engine.url.render_as_string(hide_password=False))
    DBOS.register_queue(NAME, worker_concurrency=100, on_conflict="always_update")


def stop() -> None:
    """Stop DBOS, and hand its tasks over: what is left behind counts as a death."""
    DBOS.destroy()
    client = DBOSClient(system_database_engine=engine, lazy=True)
    mine = client.list_workflows(name=NAME, status="PENDING", executor_id=SERVER, load_input=False)
    client.resume_workflows([task.workflow_id for task in mine], queue_name=NAME)


def is_alive(server: str) -> bool:
    """Return whether a server lives, however slow it is.

    Until its process ends, it has sessions in PostgreSQL, which bear its name. With SQLite it has
    locked a byte. That of a dead server is locked here, so that no other finds it dead as well.
    """
    if IS_SQLITE:
        with suppress(OSError):
            fcntl.lockf(locks, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, zlib.crc32(server.encode()))
            return False
        return True
    sessions = sa.text("SELECT count(*) FROM pg_stat_activity WHERE application_name = :server")
    with engine.connect() as connection:
        return bool(connection.scalar(sessions, {"server": server}))


# 5. The living and the dead -----------------------------------------------------------------------

idle: Counter[str] = Counter()  # at how many looks in a row nobody worked on a task


async def look_after_tasks() -> None:
    await ask(make_what_is_missing)
    while True:
        await asyncio.sleep(LOOK)
        await ask(rescue)
        await ask(delete_old)


def rescue() -> None:
    """Put tasks that nobody works on back into the queue, or let them fail.

    Should somebody work on one after all, DBOS refuses what all but the last return.
    """
    global idle
    tasks: list[Any] = DBOS.list_workflows(name=NAME, status="PENDING")
    others = {task.executor_id for task in tasks} - {SERVER}
    alive = {server for server in others if is_alive(server)}
    lost = {task.workflow_id for task in tasks if task.executor_id not in alive} - set(working)
    idle = Counter({task_id: idle[task_id] + 1 for task_id in lost})
    for task in tasks:
        # What this server has just taken from the queue needs a moment to begin. If the database
        # went away just then, it never does.
        task_id, is_mine = task.workflow_id, task.executor_id == SERVER
        if idle[task_id] < (10 if is_mine else 2):
            continue
        part = read_tasks([task_id])[task_id].done
        died = (task.attributes or {}).get("died", [])  # the parts in which servers died
        died += [] if is_mine else [part]
        if died.count(part) < DEATHS:
            DBOS.update_workflow_attributes(task_id, {"died": died})
            DBOS.resume_workflow(task_id, queue_name=NAME)
        else:
            problem = f"{DEATHS} servers in a row did not survive part {part + 1}"
            DBOS.update_workflow_attributes(task_id, {"error": problem})
            DBOS.cancel_workflow(task_id)


def delete_old() -> None:
    before = (datetime.now(UTC) - KEEP).isoformat()
    old = DBOS.list_workflows(name=NAME, completed_before=before, limit=1000)
    DBOS.delete_workflows([task.workflow_id for task in old])
