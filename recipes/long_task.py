"""Minutes of work that outlive the request, the reader and the server.

A report, a video, a model's training. The request only writes down what is to be done, and is
answered at once; the work goes on whether somebody watches or not, and after a crash where it was.
Take it for work that must not be lost. Work that may be lost with its reader, or that is over in
seconds, needs no more than a generator: recipes/basics.py.

Run it with `uvicorn recipes.long_task:app --reload`, then open http://localhost:8000, or

    curl localhost:8000/tasks --json '{"parts": 9, "seconds": 1}'
    curl -N localhost:8000/tasks/ID/events

DBOS keeps what each part returns, and the stream of progress, in a database: a file next to this
one, or for more than one machine PostgreSQL, DATABASE_URL=postgresql://user:password@host/database.
"""

import asyncio
import json
import logging
import os
import socket
import sys
import time
import uuid
from asyncio import FIRST_COMPLETED
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing, asynccontextmanager, suppress
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from dbos import DBOS, DBOSClient, DBOSPortableJSONSerializer, error
from fastapi import FastAPI, Header, HTTPException, Request, Response
from fastapi import Path as PathParameter
from fastapi.encoders import jsonable_encoder
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, JSONResponse, StreamingResponse
from pydantic import BaseModel, Field
from sqlalchemy import exc

from main import HEADERS, PAGE_HEADERS, EndStreams, LastEventID, PageFiles

T = TypeVar("T")
NAME = "long_task"
STREAM = "progress"
HERE = Path(__file__).resolve().parent
logger = logging.getLogger(__name__)


# 1. The work --------------------------------------------------------------------------------------


async def work(part: int, seconds: float) -> float:
    """Do one part of the work. Yours goes here; what blocks goes through `asyncio.to_thread`.

    A part in which the server dies is done again, so it must not matter that it was begun before:
    write to a file named after the part, insert with ON CONFLICT DO NOTHING.
    """
    await asyncio.sleep(seconds)
    return seconds


@DBOS.workflow(name=NAME)
async def long_task(parts: int, seconds: float) -> dict[str, float]:
    """Do all parts. After a crash it runs from its top, but no step that is done is done again."""
    worked = 0.0
    for part in range(parts):
        worked += await DBOS.run_step_async({"name": "work"}, work, part, seconds)
        # After the step, not in it: a step that is done again would write its event again.
        await DBOS.write_stream_async(STREAM, {"done": part + 1, "parts": parts})
    return {"seconds": worked}


# 2. The database ----------------------------------------------------------------------------------

DATABASE_URL = os.environ.get("DATABASE_URL") or f"sqlite:///{HERE / 'long_task.sqlite'}"
POLL = 0.1  # seconds from one look for something new to the next
GRACE = 15  # seconds that a part may be late before its server is given up
KEEP_ALIVE = 10  # seconds of silence, then a comment
AWAY = (exc.OperationalError, exc.InterfaceError, exc.TimeoutError, TimeoutError)
client: DBOSClient


def start_dbos() -> None:
    """Go on with the tasks that this machine left unfinished, and take new ones."""
    global client
    log = logging.getLogger("dbos")
    log.setLevel(logging.CRITICAL)  # what goes wrong here is told by `lifespan`
    log.addFilter(lambda record: "WorkflowCancelled" not in str(record.exc_info))
    serializer = DBOSPortableJSONSerializer()  # the default is pickle
    # Requests go through a client, which says when the database is away. DBOS itself waits.
    client = DBOSClient(
        system_database_url=DATABASE_URL,
        serializer=serializer,
        application_name=NAME,
        use_listen_notify=DATABASE_URL.startswith("postgresql"),  # SQLite has none
        retry_connection_errors=False,
    )
    DBOS(
        config={
            "name": NAME,
            "system_database_url": DATABASE_URL,
            "serializer": serializer,
            # By default a hash of the workflow's code: an edit would leave what is running behind.
            "application_version": "1",
            # Whose tasks it takes up when it starts. By default everybody's, running or not.
            "executor_id": socket.gethostname(),
            "notification_listener_polling_interval_sec": POLL,
            "log_level": "ERROR",  # below that, an outage is told in thousands of lines
        }
    )
    DBOS.launch()
    DBOS.register_queue(NAME, worker_concurrency=100, polling_interval_sec=POLL)


async def ask(question: Callable[..., T], *args: Any, **kwargs: Any) -> T:
    """Ask the database, for 4 seconds at most, without holding up the event loop."""
    return await asyncio.wait_for(asyncio.to_thread(question, *args, **kwargs), 4)


async def rescue_tasks() -> None:
    """Put tasks that stand still back into the queue: the server that had them is gone, or hangs.

    If it was only slow, nothing breaks: DBOS refuses what comes from any but the last to begin.
    """
    seen: dict[tuple[str, int | None], tuple[int, float]] = {}
    while True:
        await asyncio.sleep(GRACE / 3)
        before, seen, now = seen, {}, time.monotonic()
        try:
            running: list[Any] = await ask(client.list_workflows, status="PENDING")
            for task in running:
                key = task.workflow_id, task.dequeued_at
                steps, since = before.get(key, (0, now))
                new = await ask(client.list_workflow_steps, task.workflow_id, offset=steps)
                seen[key] = steps + len(new), now if new else since
                if now - seen[key][1] > task.input["args"][1] + GRACE:
                    await ask(client.resume_workflow, task.workflow_id, queue_name=NAME)
        except AWAY:
            logger.error("The database is away. Tasks and readers wait for it.")


# 3. A task, as a reader sees it -------------------------------------------------------------------


class Task(BaseModel):
    task_id: str
    status: Literal["running", "done", "failed", "cancelled"]
    done: int
    parts: int
    result: Any = None
    error: str | None = None


STATUS: dict[str, Any] = {"ENQUEUED": "running", "PENDING": "running"}
STATUS |= {"SUCCESS": "done", "CANCELLED": "cancelled"}


def read_task(task_id: str) -> Task:
    with suppress(ValueError):
        workflows: list[Any] = client.list_workflows(workflow_ids=[str(uuid.UUID(task_id))])
        for workflow in workflows:
            done = 0
            with suppress(error.DBOSStreamTimeoutError):  # that was all until now
                for _ in client.read_stream(workflow.workflow_id, STREAM, timeout_seconds=0):
                    done += 1
            status = STATUS.get(workflow.status, "failed")
            return Task(
                task_id=workflow.workflow_id,
                status=status,
                done=done,
                parts=workflow.input["args"][0],
                result=workflow.output,
                error=str(workflow.error or workflow.status) if status == "failed" else None,
            )
    raise HTTPException(404, "There is no such task.")


class Watch:
    """A task's stream, read once for all who watch it in this process. Frame n has the id n."""

    def __init__(self, task: Task) -> None:
        watches[task.task_id] = self
        self.task = task
        self.readers = 0
        self.frames: list[bytes] = []
        self.news: asyncio.Future[None] = asyncio.Future()
        self.reading = asyncio.create_task(self.read(task.task_id))

    def add(self, data: str, fields: str = "") -> None:
        self.frames.append(f"{fields}id: {len(self.frames)}\ndata: {data}\n\n".encode())
        self.news.set_result(None)
        self.news = asyncio.Future()

    async def read(self, task_id: str) -> None:
        while True:
            values = client.read_stream_async(
                task_id, STREAM, offset=len(self.frames), polling_interval_sec=POLL
            )
            try:
                async with aclosing(values):
                    async for value in values:
                        self.add(json.dumps(value))
                self.task = await ask(read_task, task_id)
                return self.add(self.task.model_dump_json(), "event: end\n")
            except AWAY:
                await asyncio.sleep(1)


watches: dict[str, Watch] = {}


async def follow(task: Task, first: int) -> AsyncIterator[bytes]:
    """Yield a task's frames from `first` to the end, and a comment in each longer silence."""
    watch = watches.get(task.task_id) or Watch(task)
    watch.readers += 1
    try:
        yield b"retry: 1000\n\n"
        while True:
            if frames := watch.frames[first:]:
                first += len(frames)
                yield b"".join(frames)
            elif watch.reading.done():
                return
            else:
                more = (watch.news, watch.reading)
                heard, _ = await asyncio.wait(more, timeout=KEEP_ALIVE, return_when=FIRST_COMPLETED)
                if not heard:
                    yield b": keep-alive\n\n"
    finally:
        watch.readers -= 1
        if not watch.readers:
            watch.reading.cancel()
            watches.pop(task.task_id, None)


# 4. The requests ----------------------------------------------------------------------------------


@asynccontextmanager
async def lifespan(_: FastAPI) -> AsyncIterator[None]:
    try:
        # In a thread: started from a coroutine, DBOS would run the work on the server's event loop.
        await asyncio.to_thread(start_dbos)
    except (*AWAY, exc.ArgumentError, error.DBOSException) as problem:
        print(f"Cannot use DATABASE_URL: {str(problem).splitlines()[0]}", file=sys.stderr)
        os._exit(3)  # as uvicorn itself does, but without its traceback
    rescue = asyncio.create_task(rescue_tasks())
    yield
    rescue.cancel()
    DBOS.destroy()  # waits for no task: they go on after the next start
    client.destroy()


async def database_away(_: Request, problem: Exception) -> Response:
    """Nobody knows now whether something was done. It can be asked for again, with the same key."""
    return JSONResponse({"detail": "The database is away."}, 503, {"Retry-After": "5"})


app = FastAPI(lifespan=lifespan, exception_handlers=dict.fromkeys(AWAY, database_away))
app.add_middleware(EndStreams)


@app.exception_handler(RequestValidationError)
async def invalid_input(_: Request, problem: RequestValidationError) -> Response:
    """FastAPI's 422, also where it repeats an input that neither JSON nor UTF-8 can hold.

    https://github.com/fastapi/fastapi/issues/459
    """
    detail = json.dumps({"detail": jsonable_encoder(problem.errors())})
    detail = json.dumps(json.loads(detail, parse_constant=str))
    return Response(detail, 422, media_type="application/json")


def invalid_header(name: str, value: object, message: str) -> HTTPException:
    detail = {"type": "value_error", "loc": ("header", name), "msg": message, "input": value}
    return HTTPException(422, [detail])


TaskID = Annotated[str, PathParameter(json_schema_extra={"format": "uuid"})]


class NewTask(BaseModel):
    parts: int = Field(ge=1, le=900)
    seconds: float = Field(ge=0, le=60, description="Seconds of work for each part.")


def start_task(task_id: str, *args: Any) -> Any:
    """Write down what is to be done, unless that was done before; return what is written there."""
    handle: Any = client.enqueue(
        {"queue_name": NAME, "workflow_name": NAME, "workflow_id": task_id}, *args
    )
    return handle.get_status().input["args"]


def cancel_task(task_id: str) -> Task:
    client.cancel_workflow(read_task(task_id).task_id)
    return read_task(task_id)


@app.post("/tasks", status_code=202)
async def start(
    new: NewTask, response: Response, idempotency_key: Annotated[str | None, Header()] = None
) -> dict[str, str]:
    """Start a task. Who got no answer sends it again: the same key gives the same task."""
    key = uuid.uuid5(uuid.NAMESPACE_OID, idempotency_key) if idempotency_key else uuid.uuid4()
    args = new.parts, new.seconds
    if await ask(start_task, str(key), *args) != args:
        message = "Another task was started with this key"
        raise invalid_header("idempotency-key", idempotency_key, message)
    response.headers["Location"] = f"/tasks/{key}"
    return {"task_id": str(key)}


@app.get("/tasks/{task_id}")
async def show(task_id: TaskID) -> Task:
    return await ask(read_task, task_id)


@app.delete("/tasks/{task_id}", status_code=202)
async def cancel(task_id: TaskID) -> Task:
    """Let a task stop before its next part."""
    return await ask(cancel_task, task_id)


@app.get("/tasks/{task_id}/events", response_class=StreamingResponse)
async def events(task_id: TaskID, last_event_id: LastEventID = None) -> Response:
    task = watches[task_id].task if task_id in watches else await show(task_id)
    first = 0 if last_event_id is None else last_event_id + 1
    if first > task.parts + 1:
        message = f"Input should be at most {task.parts}, the id of the end"
        raise invalid_header("last-event-id", last_event_id, message)
    if first > task.done and task.status != "running":
        return Response(status_code=204, headers=HEADERS)
    return StreamingResponse(follow(task, first), media_type="text/event-stream", headers=HEADERS)


@app.get("/", response_class=FileResponse)
async def page() -> Response:
    return FileResponse(HERE / "pages/long_task.html", headers=PAGE_HEADERS)


app.mount("/pages", PageFiles(directory=HERE / "pages"))
