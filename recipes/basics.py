"""The basics: a response sends what a generator yields, when it yields it.

Use it for a short stream that one reader waits for: a text that grows, a progress bar. Nothing here
has an id, so a reader that lost its connection starts again. If readers should resume, use another
recipe.

`Stream`, from main.py, is Starlette's `StreamingResponse`. It adds two things: it closes the
generator at once when the reader leaves, and it has the headers that proxies need.

Run `uvicorn recipes.basics:app --reload`, then `curl -N localhost:8000/stream`.
"""

import asyncio
import time
from collections.abc import AsyncGenerator, Generator

from fastapi import FastAPI

from main import EndStreams, Stream
from recipes.common import prepare

app = FastAPI(title="The basics of streaming")
prepare(app)
# Without it, a reload waits for open streams. Plain text cannot show that it was ended early: leave
# "text/plain" out if a reader could mistake a part for the complete text.
app.add_middleware(EndStreams, media_types=("text/event-stream", "text/plain"))


# A sync generator may block: each of its steps runs in one of 40 threads -------------------------


def chunks() -> Generator[str]:
    for i in range(1, 6):
        time.sleep(1)  # stands for work that blocks: a query, a file, a library without `await`
        yield f"chunk {i}\n"


@app.get("/stream", response_class=Stream)
def stream() -> Stream:
    """Five chunks of text, one a second."""
    return Stream(chunks(), media_type="text/plain")


# An async generator must not block: it shares one thread with all others, so it awaits ------------


async def percentages() -> AsyncGenerator[str]:
    for percent in (25, 50, 75, 100):
        await asyncio.sleep(1)  # stands for what can be awaited: a model, a database, a server
        yield f"data: {percent}%\n\n"


@app.get("/progress", response_class=Stream)
async def progress() -> Stream:
    """Progress as server-sent events, one a second."""
    return Stream(percentages(), media_type="text/event-stream")


# A server-sent event is text too: `data: `, and a blank line that ends it -------------------------


def three_events() -> Generator[str]:
    for i in range(1, 4):
        yield f"data: event {i}\n\n"


@app.get("/events", response_class=Stream)
def events() -> Stream:
    """Three events, for `EventSource` in a browser."""
    return Stream(three_events(), media_type="text/event-stream")


# The exercises of basics.md -----------------------------------------------------------------------

LINES = ["alpha", "beta", "gamma"]


@app.get("/lines", response_class=Stream)
def lines() -> Stream:
    """A list, one item per line."""
    return Stream((f"{line}\n" for line in LINES), media_type="text/plain")


@app.get("/broken", response_class=Stream)
def broken() -> Stream:
    """The same as server-sent events, but with a mistake: a browser sees none of them."""
    return Stream((f"data: {line}\n" for line in LINES), media_type="text/event-stream")


@app.get("/mended", response_class=Stream)
def mended() -> Stream:
    """The same, corrected: a browser sees all three."""
    return Stream((f"data: {line}\n\n" for line in LINES), media_type="text/event-stream")
