"""The basics: a `StreamingResponse` sends what a generator yields, when it yields it.

Take it for a short stream that one reader waits for: a text that grows, a progress bar. Take
another recipe where a reader that lost its connection has to go on where it was: nothing here has
an id, so whoever comes again gets all of it again.

Run `uvicorn recipes.basics:app --reload`, then `curl -N localhost:8000/stream`.
"""

import asyncio
import time
from collections.abc import AsyncGenerator, Generator

from fastapi import FastAPI
from fastapi.responses import StreamingResponse
from starlette.background import BackgroundTask

from main import HEADERS, EndStreams

app = FastAPI(title="The basics of streaming")
# Without it a reload waits for open streams. Plain text cannot say that it was ended early: leave
# that out where somebody would take the part for the whole.
app.add_middleware(EndStreams, media_types=("text/event-stream", "text/plain"))


def send(chunks: Generator[str] | AsyncGenerator[str], media_type: str) -> StreamingResponse:
    """Answer with what the generator yields, and close it when the reader goes away.

    Starlette leaves the closing to Python's garbage collection: the `finally` of a sync generator
    would run some time, perhaps never. A background task runs when the response is over.
    """
    close = chunks.aclose if isinstance(chunks, AsyncGenerator) else chunks.close
    return StreamingResponse(
        chunks, media_type=media_type, headers=HEADERS, background=BackgroundTask(close)
    )


# A sync generator may block: each of its steps runs in a thread, of which there are 40 -----------


def chunks() -> Generator[str]:
    for i in range(1, 6):
        time.sleep(1)  # stands for work that blocks: a query, a file, a library without `await`
        yield f"chunk {i}\n"


@app.get("/stream", response_class=StreamingResponse)
def stream() -> StreamingResponse:
    """Five chunks of text, one a second."""
    return send(chunks(), "text/plain")


# An async generator must not block, because it shares one thread with everybody: it awaits --------


async def percentages() -> AsyncGenerator[str]:
    for percent in (25, 50, 75, 100):
        await asyncio.sleep(1)  # stands for what can be awaited: a model, a database, a server
        yield f"data: {percent}%\n\n"


@app.get("/progress", response_class=StreamingResponse)
async def progress() -> StreamingResponse:
    """Progress as server-sent events, one a second."""
    return send(percentages(), "text/event-stream")


# Server-sent events are text too: `data: `, and a blank line that ends the event ------------------


def three_events() -> Generator[str]:
    for i in range(1, 4):
        yield f"data: event {i}\n\n"


@app.get("/events", response_class=StreamingResponse)
def events() -> StreamingResponse:
    """Three events, for `EventSource` in a browser."""
    return send(three_events(), "text/event-stream")


# The exercises of recipes/README.md ---------------------------------------------------------------

LINES = ["alpha", "beta", "gamma"]


@app.get("/lines", response_class=StreamingResponse)
def lines() -> StreamingResponse:
    """A list, each of its items on a line."""
    return send((f"{line}\n" for line in LINES), "text/plain")


@app.get("/broken", response_class=StreamingResponse)
def broken() -> StreamingResponse:
    """The same as server-sent events, of which a browser sees none."""
    return send((f"data: {line}\n" for line in LINES), "text/event-stream")


@app.get("/mended", response_class=StreamingResponse)
def mended() -> StreamingResponse:
    """The same, and a browser sees all three."""
    return send((f"data: {line}\n\n" for line in LINES), "text/event-stream")
