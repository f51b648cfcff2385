"""recipes/long_task, but its work is on record, and goes wrong where a test wants it to.

The environment says how. `WORK_LOG` is the file that each part writes a line to when it begins and
one when it ends. A task with `FAILING` seconds for each part raises in its third. `PAUSE` is how
many seconds the workflow waits between the event of its last part and its end. `GRACE` and
`KEEP_ALIVE` are the recipe's.
"""

import asyncio
import os
import time
from pathlib import Path
from typing import Any

from dbos import DBOS

from recipes import long_task
from recipes.long_task import app

__all__ = ["app"]

WORK_LOG = Path(os.environ["WORK_LOG"])
FAILING = float(os.environ["FAILING"])
PAUSE = float(os.environ.get("PAUSE", "0"))
write_stream_async = DBOS.write_stream_async


def note(what: str, part: int) -> None:
    with WORK_LOG.open("a") as file:
        file.write(f"{DBOS.workflow_id} {what} {part} {time.time()} {os.getpid()}\n")


async def work(part: int, seconds: float) -> float:
    note("begin", part)
    await asyncio.sleep(seconds)
    if seconds == FAILING and part == 2:
        raise ValueError("no space left on the disk")
    note("end", part)
    return seconds


async def write_and_pause(key: str, value: Any, **options: Any) -> None:
    await write_stream_async(key, value, **options)
    if PAUSE and value["done"] == value["parts"]:
        await asyncio.sleep(PAUSE)


long_task.work = work
long_task.GRACE = int(os.environ.get("GRACE", long_task.GRACE))
long_task.KEEP_ALIVE = int(os.environ.get("KEEP_ALIVE", long_task.KEEP_ALIVE))
DBOS.write_stream_async = write_and_pause  # type: ignore[method-assign]


@app.get("/watches")
async def watches() -> int:
    """How many streams this process reads."""
    return len(long_task.watches)
