"""Minutes of work that outlive the request, the reader and the server.

A report, a video, a model's training. The request only records what is to be done, and is answered
at once. The work continues whether or not somebody watches, and after a crash it resumes where it
was. If the work may end with its reader, or takes only seconds, a generator is enough:
recipes/basics.py.

Run it with `uvicorn recipes.long_task:app --reload`, then open http://localhost:8000, or

    curl localhost:8000/tasks --json '{"parts": 9, "seconds": 1}'
    curl -N localhost:8000/tasks/ID/events

DBOS keeps the result of each part in a database: SQLite in a file next to this one. For more than
one machine, use PostgreSQL: DATABASE_URL=postgresql://user:password@host/database. If the database
is away, the tasks wait for it: long_task_database.py.
"""

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from datetime import UTC, datetime, timedelta
from typing import Annotated, Any, Literal
from uuid import UUID, uuid4, uuid5

from dbos import DBOS, SetWorkflowID, error
from fastapi import FastAPI, Header, HTTPException, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse
from pydantic import BaseModel, Field
from sqlalchemy.exc import SQLAlchemyError

from main import HEADERS, EndStreams, Stream
from recipes import long_task_database as database
from recipes.common import keep_going, logger, prepare
from recipes.long_task_database import NAME, ask

POLL = 0.25  # seconds between two looks at the tasks that have readers
LOOK = 1.0  # seconds between two looks for tasks that nobody works on
DEATHS = 3  # a task fails when so many servers have died in the same part
KEEP = timedelta(days=7)  # from the end of a task until it is deleted
KEEP_ALIVE = 10.0  # seconds of silence, then a comment
OURS: Any = {"name": NAME, "application_name": NAME}  # our workflows; others are left alone


# 1. The work --------------------------------------------------------------------------------------


@DBOS.step(retries_allowed=True, max_attempts=3)  # with pauses of 1 and 2 seconds
async def work(part: int, seconds: float) -> float:
    """Do one part of the work. Put yours here; call what blocks with `asyncio.to_thread`.

    If the server dies, the part is done again. So a second run must do no harm: write to a file
    named after the part, or insert with ON CONFLICT DO NOTHING.
    """
    await asyncio.sleep(seconds)
    return seconds


@DBOS.workflow(name=NAME, max_recovery_attempts=None)  # `rescue` has a limit for each part
async def long_task(parts: int, seconds: float) -> dict[str, float]:
    """Do all parts. After a crash it runs from its top, but skips the steps that are done."""
    worked = 0.0
    try:
        for part in range(parts):
            # One step for each part, so the number of steps is the progress of the task.
            worked += await work(part, seconds)
    except error.DBOSMaxStepRetriesExceeded as problem:
        logger.error("Task %s has failed", DBOS.workflow_id, exc_info=problem.errors[-1])
        raise problem.errors[-1] from None
    return {"seconds": worked}


# 2. A task, as a reader sees it -------------------------------------------------------------------


class Task(BaseModel):
    task_id: str
    status: Literal["running", "done", "failed", "cancelled"]
    done: int
    parts: int
    result: Any = None
    error: str | None = None


OVER: dict[str, Any] = {"SUCCESS": "done", "CANCELLED": "cancelled", "ERROR": "failed"}


def read_tasks(task_ids: list[str]) -> dict[str, Task]:
    """Return those of these tasks that exist, with two queries for any number of them."""
    tasks = {}
    workflows: list[Any] = DBOS.list_workflows(workflow_ids=task_ids, **OURS)
    done = database.count_steps(task_ids)  # last, so that a finished task has all its parts
    for workflow in workflows:
        problem = (workflow.attributes or {}).get("error") or workflow.error
        tasks[workflow.workflow_id] = Task(
            task_id=workflow.workflow_id,
            status="failed" if problem else OVER.get(workflow.status, "running"),
            done=done.get(workflow.workflow_id, 0),
            parts=workflow.input["args"][0],
            result=workflow.output,
            error=str(problem) if problem else None,
        )
    return tasks


watched: set[str] = set()  # the tasks for which readers have waited since the last look
latest: dict[str, Task | None] = {}  # these tasks at the last look; None: it is no longer there
looked = asyncio.Event()  # set after the next look


async def watch_tasks() -> None:
    """Look at all tasks that have readers, in one go, and wake the readers."""
    global latest, looked
    await asyncio.sleep(POLL)
    task_ids = list(watched)
    watched.clear()
    try:
        latest = dict.fromkeys(task_ids) | (await ask(read_tasks, task_ids) if task_ids else {})
    finally:
        looked.set()
        looked = asyncio.Event()


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
        await looked.wait()
        task = latest.get(task.task_id, task)


# 3. The requests ----------------------------------------------------------------------------------


@asynccontextmanager
async def lifespan(_: FastAPI) -> AsyncIterator[None]:
    async with database.running():
        loops = asyncio.gather(
            keep_going("Tasks cannot be watched", watch_tasks),
            keep_going("Tasks cannot be looked after", look_after_tasks),
        )
        yield
        loops.cancel()
        with suppress(asyncio.CancelledError):
            await loops


app = FastAPI(lifespan=lifespan)
app.add_middleware(EndStreams)
prepare(app, page="long_task.html")


@app.exception_handler(SQLAlchemyError)
@app.exception_handler(TimeoutError)
async def database_away(_: Request, problem: Exception) -> Response:
    """The request may have been carried out or not. Send it again, with the same key."""
    return JSONResponse({"detail": "The database is away."}, 503, {"Retry-After": "5"})


class NewTask(BaseModel):
    parts: int = Field(ge=1, le=900)
    seconds: float = Field(ge=0, le=60, description="Seconds of work for each part.")


def enqueue(task_id: str, *args: Any) -> Any:
    """Record a task, unless there is one with this id. Return the arguments that are recorded."""
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
    # Without the servers' secret, nobody can work out the id from the key.
    task_id = str(uuid5(database.secret, idempotency_key) if idempotency_key else uuid4())
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
    """Stop a task before its next part."""
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


# 4. Servers that die ------------------------------------------------------------------------------


async def look_after_tasks() -> None:
    await ask(database.make_what_is_missing)
    while True:
        await asyncio.sleep(LOOK)
        await ask(rescue)
        await ask(delete_old)


def rescue() -> None:
    """Put the tasks of dead servers back into the queue, or let them fail.

    If a server is alive after all, DBOS refuses its results, so nothing is in the stream twice.
    """
    tasks: list[Any] = DBOS.list_workflows(**OURS, status="PENDING", load_input=False)
    dead = database.find_dead({task.executor_id for task in tasks})
    for task in tasks:
        # By now it may be cancelled, or another server may have put it back.
        same = {"workflow_ids": [task.workflow_id], "executor_id": task.executor_id}
        if task.executor_id in dead and DBOS.list_workflows(**same, status="PENDING"):
            part = database.count_steps([task.workflow_id]).get(task.workflow_id, 0)
            # The parts in which servers died.
            deaths = [*(task.attributes or {}).get("deaths", []), part]
            if deaths.count(part) < DEATHS:
                DBOS.update_workflow_attributes(task.workflow_id, {"deaths": deaths})
                DBOS.resume_workflow(task.workflow_id, queue_name=NAME)
            else:
                problem = f"{DEATHS} servers in a row did not survive part {part + 1}"
                DBOS.update_workflow_attributes(task.workflow_id, {"error": problem})
                DBOS.cancel_workflow(task.workflow_id)


def delete_old() -> None:
    before = (datetime.now(UTC) - KEEP).isoformat()
    old = DBOS.list_workflows(**OURS, completed_before=before, limit=1000)
    DBOS.delete_workflows([task.workflow_id for task in old])
