"""recipes/long_task whose work is on record, and which can be told to go wrong.

Each part appends to the file `WORK_LOG` a line when it begins and one when it ends. In a task with
`FAILING` seconds for each part, the third raises; in one with `SLOW` seconds, the third takes four
seconds longer than it was said to. After part `PAUSE_AFTER` the workflow waits, when the part has
been kept. The first `LOST_WRITES` times that PostgreSQL is to keep a part's result, the session is
ended just then. `LOOK` and `KEEP_ALIVE` are the recipe's own.
"""

import asyncio
import os
import time
from pathlib import Path
from typing import Any

import psycopg
import pytest
import sqlalchemy as sa
from dbos import DBOS

from recipes import long_task
from recipes.long_task import app

__all__ = ["app"]

WORK_LOG = Path(os.environ["WORK_LOG"])
FAILING, SLOW = float(os.environ["FAILING"]), float(os.environ["SLOW"])
PAUSE_AFTER = int(os.environ.get("PAUSE_AFTER", "0"))
lost_writes = int(os.environ.get("LOST_WRITES", "0"))


def note(what: str, part: int) -> None:
    with WORK_LOG.open("a") as file:
        file.write(f"{DBOS.workflow_id} {what} {part} {time.time()} {os.getpid()}\n")


@DBOS.step(name="work", retries_allowed=True)
async def recorded_work(part: int, seconds: float) -> float:
    note("begin", part)
    await asyncio.sleep(seconds + (4 if seconds == SLOW and part == 2 else 0))
    if seconds == FAILING and part == 2:
        raise ValueError("no space left on the disk")
    note("end", part)
    return seconds


async def work(part: int, seconds: float) -> float:
    worked = await recorded_work(part, seconds)
    if part + 1 == PAUSE_AFTER:
        await asyncio.sleep(600)
    return worked


@sa.event.listens_for(sa.Engine, "before_cursor_execute")
def lose_a_write(_connection: Any, cursor: Any, statement: str, *_: Any) -> None:
    global lost_writes
    if lost_writes and statement.startswith("INSERT INTO dbos.operation_outputs"):
        lost_writes -= 1
        with psycopg.connect(os.environ["DATABASE_URL"]) as other:
            other.execute("SELECT pg_terminate_backend(%s)", [cursor.connection.info.backend_pid])


long_task.work = work
long_task.KEEP_ALIVE = float(os.environ.get("KEEP_ALIVE", long_task.KEEP_ALIVE))
long_task.LOOK = float(os.environ.get("LOOK", long_task.LOOK))


@app.get("/watches")
async def watches() -> int:
    """How many tasks this process looks at."""
    return len(long_task.latest)


@app.post("/broken/{seconds}")
async def broken(seconds: float) -> None:
    """For so long, each question to the database raises what nobody has foreseen."""

    async def raises(*_: Any) -> Any:
        raise IndexError("list index out of range")

    patch = pytest.MonkeyPatch()
    patch.setattr(long_task, "ask", raises)
    asyncio.get_running_loop().call_later(seconds, patch.undo)
