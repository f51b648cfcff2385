"""recipes/long_task whose work is on record, and which can be told to go wrong.

Each part appends a line to the file `WORK_LOG` when it begins. In a task with `FAILING` seconds for
each part, the third raises. In one with `LOSING` seconds, PostgreSQL ends the session that is to
keep the first part's result, twice. After part `PAUSE_AFTER`, when it has been kept, the workflow
waits. `LOOK` and `KEEP_ALIVE` are the recipe's own.
"""

import asyncio
import os
from pathlib import Path
from typing import Any
from unittest.mock import patch

import psycopg
import sqlalchemy as sa
from dbos import DBOS

from recipes import long_task, long_task_database
from recipes.long_task import app

__all__ = ["app"]

WORK_LOG = Path(os.environ["WORK_LOG"])
FAILING, LOSING = float(os.environ["FAILING"]), float(os.environ["LOSING"])
PAUSE_AFTER = int(os.environ.get("PAUSE_AFTER", "0"))
lost_writes = 0  # that are still to be lost
disk_is_full = False


def note(part: int) -> None:
    with WORK_LOG.open("a") as file:
        file.write(f"{DBOS.workflow_id} {part} {os.getpid()}\n")


@DBOS.step(name="work", retries_allowed=True, interval_seconds=0.1)
async def recorded_work(part: int, seconds: float) -> float:
    global lost_writes
    note(part)
    await asyncio.sleep(seconds)
    if seconds == FAILING and part == 2:
        raise ValueError("no space left on the disk")
    if seconds == LOSING and part == 0:
        lost_writes = 2
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


@sa.event.listens_for(sa.Engine, "before_cursor_execute")
def limit_sqlite(_connection: Any, cursor: Any, *_: Any) -> None:
    if long_task_database.IS_SQLITE:
        pages = 1 if disk_is_full else 2**32 - 2
        cursor.connection.execute(f"PRAGMA max_page_count = {pages}")


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
    with patch.object(long_task, "ask", side_effect=IndexError("list index out of range")):
        await asyncio.sleep(seconds)


@app.post("/full/{is_full}")
async def full(is_full: bool) -> None:
    """From now on, SQLite gets no more room on the disk, or some again."""
    global disk_is_full
    disk_is_full = is_full
