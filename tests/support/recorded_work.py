"""recipes/long_task whose work is on record, and which can be told to go wrong.

Each part appends to the file `WORK_LOG` a line when it begins and one when it ends. In a task with
`FAILING` seconds for each part, the third raises; in one with `SLOW` seconds, the third takes six
seconds longer than it was said to. After part `PAUSE_AFTER` the workflow waits, when the part has
been kept. `LOOK` and `KEEP_ALIVE` are the recipe's own.
"""

import asyncio
import os
import time
from pathlib import Path
from typing import Any

from dbos import DBOS

from recipes import long_task, long_task_database
from recipes.long_task import app, database

__all__ = ["app"]

WORK_LOG = Path(os.environ["WORK_LOG"])
FAILING, SLOW = float(os.environ["FAILING"]), float(os.environ["SLOW"])
PAUSE_AFTER = int(os.environ.get("PAUSE_AFTER", "0"))
ask, run_step_async = database.ask, DBOS.run_step_async


def note(what: str, part: int) -> None:
    with WORK_LOG.open("a") as file:
        file.write(f"{DBOS.workflow_id} {what} {part} {time.time()} {os.getpid()}\n")


async def work(part: int, seconds: float) -> float:
    note("begin", part)
    await asyncio.sleep(seconds + (6 if seconds == SLOW and part == 2 else 0))
    if seconds == FAILING and part == 2:
        raise ValueError("no space left on the disk")
    note("end", part)
    return seconds


async def run_and_pause(options: Any, step: Any, part: int, seconds: float) -> Any:
    result = await run_step_async(options, step, part, seconds)
    if part + 1 == PAUSE_AFTER:
        await asyncio.sleep(600)
    return result


long_task.work = work
long_task.KEEP_ALIVE = float(os.environ.get("KEEP_ALIVE", long_task.KEEP_ALIVE))
long_task_database.LOOK = float(os.environ.get("LOOK", long_task_database.LOOK))
DBOS.run_step_async = run_and_pause  # type: ignore[method-assign, assignment]


@app.get("/watches")
async def watches() -> int:
    """How many tasks this process looks at."""
    return len(long_task.watches)


@app.post("/broken/{seconds}")
async def broken(seconds: float) -> None:
    """For so long, each question to the database raises what nobody has foreseen."""

    async def raises(*_: Any) -> Any:
        raise IndexError("list index out of range")

    database.ask = raises  # type: ignore[method-assign, assignment]
    asyncio.get_running_loop().call_later(seconds, setattr, database, "ask", ask)
