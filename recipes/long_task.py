"""Minutes of work that outlive the request, the reader and the server.

A report, a video, a model's training. The request only writes down what is to be done, and is
answered at once. The work goes on whether or not somebody watches, and after a crash it goes on
where it was. Take it for work that must not be lost. If the work may end with its reader, or takes
only seconds, a generator is enough: recipes/basics.py.

Run it with `uvicorn recipes.long_task:app --reload`, then open http://localhost:8000, or

    curl localhost:8000/tasks --json '{"parts": 9, "seconds": 1}'
    curl -N localhost:8000/tasks/ID/events

DBOS keeps what each part returned in a database: SQLite in a file next to this one, or PostgreSQL
for more than one machine, DATABASE_URL=postgresql://user:password@host/database. What happens
when the database or a server goes away is in long_task_database.py.
"""

import asyncio
import hmac
import os
import sys
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import Annotated, Any, Literal

from dbos import DBOS, StepOptions
from fastapi import FastAPI, Header, HTTPException, Path, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse
from pydantic import BaseModel, Field

from main import HEADERS, EndStreams, Stream
from recipes.common import keep_going, prepare
from recipes.long_task_database import AWAY, DEATHS, Database

NAME = "long_task"
POLL = 0.1  # seconds from one look at the tasks that are watched to the next
KEEP = 7  # days from the end of a task until it is deleted
KEEP_ALIVE = 10.0  # seconds of silence, then a comment
database = Database(NAME, KEEP)


# 1. The work --------------------------------------------------------------------------------------


async def work(part: int, seconds: float) -> float:
    """Do one part of the work. Yours goes here; what blocks goes through `asyncio.to_thread`.

    A part in which the server dies is done again, so a second run must do no harm: write to a file
    named after the part, insert with ON CONFLICT DO NOTHING.
    """
    await asyncio.sleep(seconds)
    return seconds


# A part that raises is tried three times, with pauses of 1 and 2 seconds.
RETRIES: StepOptions = {"name": "work", "retries_allowed": True, "max_attempts": 3}


# No limit on recoveries: `Database` has one, for each part instead of the whole task.
@DBOS.workflow(name=NAME, max_recovery_attempts=None)
async def long_task(parts: int, seconds: float) -> dict[str, float]:
    """Do all parts. After a crash it runs from its top, but no step that is done is done again."""
    worked = 0.0
    with database.at_work(str(DBOS.workflow_id)):
        for part in range(parts):
            # One step for each part, so that the number of steps is how far the task is.
            worked += await DBOS.run_step_async(RETRIES, work, part, seconds)
    return {"seconds": worked}


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


def read_tasks(task_ids: list[str]) -> dict[str, Task]:
    """Return those of these tasks that there are."""
    workflows: list[Any] = database.client.list_workflows(workflow_ids=task_ids, name=NAME)
    done = database.count_parts(task_ids)  # asked last: what is over has all its parts
    tasks = {}
    for workflow in workflows:
        task_id = workflow.workflow_id
        task = tasks[task_id] = Task(
            task_id=task_id,
            status=STATUS.get(workflow.status, "failed"),
            done=done[task_id],
            parts=workflow.input["args"][0],
            result=workflow.output,
        )
        if (workflow.attributes or {}).get("deaths") == DEATHS:
            task.status = "failed"
            task.error = f"{DEATHS} servers in a row did not survive part {task.done + 1}"
        elif task.status == "failed":
            task.error = str(workflow.error or workflow.status)
    return tasks


def read_task(task_id: str) -> Task:
    with suppress(ValueError):
        task_id = str(uuid.UUID(task_id))
        if task := read_tasks([task_id]).get(task_id):
            return task
    raise HTTPException(404, "There is no such task.")


class Watch:
    """A task that somebody watches in this process, as it was at the last look."""

    def __init__(self, task: Task) -> None:
        self.task: Task | None = task  # None: it is no longer there
        self.readers = 0
        self.news = asyncio.Event()


watches: dict[str, Watch] = {}


async def watch_tasks() -> None:
    """Look at all tasks that are watched, in one go, however many readers they have."""
    await asyncio.sleep(POLL)
    if watched := list(watches):
        tasks = await database.ask(read_tasks, watched)
        for task_id in watched:
            watch, task = watches.get(task_id), tasks.get(task_id)
            if watch and watch.task != task:
                watch.task, news = task, watch.news
                watch.news = asyncio.Event()
                news.set()


async def follow(task: Task, first: int) -> AsyncIterator[str]:
    """Yield a task's events from number `first` to the end, and a comment in each silence."""
    watch = watches.setdefault(task.task_id, Watch(task))
    watch.readers += 1
    try:
        yield "retry: 1000\n\n"
        while now := watch.task:
            news = watch.news
            for n in range(first, now.done):
                yield f'id: {n}\ndata: {{"done": {n + 1}, "parts": {now.parts}}}\n\n'
            first = max(first, now.done)
            if now.status != "running":
                yield f"event: end\nid: {now.done}\ndata: {now.model_dump_json()}\n\n"
                return
            try:
                await asyncio.wait_for(news.wait(), KEEP_ALIVE)
            except TimeoutError:
                yield ": keep-alive\n\n"
    finally:
        watch.readers -= 1
        if not watch.readers:
            del watches[task.task_id]


# 3. The requests ----------------------------------------------------------------------------------


@asynccontextmanager
async def lifespan(_: FastAPI) -> AsyncIterator[None]:
    try:
        await database.start()
    except Exception as problem:
        why = str(getattr(problem, "orig", problem)).partition("\n")[0]
        print(f"Cannot use DATABASE_URL: {why}", file=sys.stderr)
        os._exit(3)  # as uvicorn itself does, but without its traceback
    loops = [
        keep_going("Tasks cannot be watched", watch_tasks),
        keep_going("Tasks cannot be looked after", database.look_after_tasks, pause=2),
        keep_going("Tasks cannot be deleted", database.delete_old_tasks, pause=60),
    ]
    tasks = [asyncio.create_task(loop) for loop in loops]
    yield
    for task in tasks:
        task.cancel()
    await database.stop()


async def database_away(_: Request, problem: Exception) -> Response:
    """Nobody knows now whether something was done. It can be asked for again, with the same key."""
    return JSONResponse({"detail": "The database is away."}, 503, {"Retry-After": "5"})


app = FastAPI(lifespan=lifespan, exception_handlers=dict.fromkeys(AWAY, database_away))
app.add_middleware(EndStreams)
prepare(app, page="long_task.html")


TaskID = Annotated[str, Path(json_schema_extra={"format": "uuid"})]


class NewTask(BaseModel):
    parts: int = Field(ge=1, le=900)
    seconds: float = Field(ge=0, le=60, description="Seconds of work for each part.")


def start_task(task_id: str, *args: Any) -> Any:
    """Write down what is to be done, unless that was done before; return what is written there."""
    handle: Any = database.client.enqueue(
        {"queue_name": NAME, "workflow_name": NAME, "workflow_id": task_id}, *args
    )
    return handle.get_status().input["args"]


def cancel_task(task_id: str) -> Task:
    database.client.cancel_workflow(read_task(task_id).task_id)
    return read_task(task_id)


def invalid_header(name: str, value: object, message: str) -> HTTPException:
    detail = {"type": "value_error", "loc": ("header", name), "msg": message, "input": value}
    return HTTPException(422, [detail])


@app.post("/tasks", status_code=202)
async def start(
    new: NewTask, response: Response, idempotency_key: Annotated[str | None, Header()] = None
) -> dict[str, str]:
    """Start a task. If you got no answer, send it again: the same key gives the same task."""
    task_id = uuid.uuid4()
    if idempotency_key:
        # The same on each server, and nobody can tell it from the key alone.
        digest = hmac.digest(database.secret.encode(), idempotency_key.encode(), "sha256")
        task_id = uuid.UUID(bytes=digest[:16], version=4)
    args = new.parts, new.seconds
    if await database.ask(start_task, str(task_id), *args) != args:
        raise invalid_header("idempotency-key", idempotency_key, "It has started another task")
    response.headers["Location"] = f"/tasks/{task_id}"
    return {"task_id": str(task_id)}


@app.get("/tasks/{task_id}")
async def show(task_id: TaskID) -> Task:
    return await database.ask(read_task, task_id)


@app.delete("/tasks/{task_id}", status_code=202)
async def cancel(task_id: TaskID) -> Task:
    """Let a task stop before its next part."""
    return await database.ask(cancel_task, task_id)


@app.get("/tasks/{task_id}/events", response_class=StreamingResponse)
async def events(
    task_id: TaskID, last_event_id: Annotated[str, Header(pattern="^[0-9]{0,19}$")] = ""
) -> Response:
    task = await show(task_id)
    first = int(last_event_id) + 1 if last_event_id else 0
    if first > task.parts + 1:
        message = f"Input should be at most {task.parts}, the id of the end"
        raise invalid_header("last-event-id", last_event_id, message)
    if first > task.done and task.status != "running":
        return Response(status_code=204, headers=HEADERS)
    return Stream(follow(task, first), media_type="text/event-stream")
