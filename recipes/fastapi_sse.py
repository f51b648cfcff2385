"""FastAPI's own server-sent events: an endpoint yields items, FastAPI makes events of them.

Use it for tens or hundreds of readers: you write no frames by hand, the items are checked and
described in /docs, and a silent stream is kept alive. For thousands, use `main.py`'s `/sse`, which
needs a tenth of the CPU.

Run `uvicorn recipes.fastapi_sse:app --reload`, then `curl -N localhost:8000/items/events`.
"""

import asyncio
import time
from collections.abc import AsyncIterable, Callable, Coroutine, Iterable, Iterator
from dataclasses import dataclass
from enum import Enum
from typing import Annotated, Any

from fastapi import Depends, FastAPI, Header, HTTPException, Request, Response
from fastapi.routing import APIRoute
from fastapi.sse import EventSourceResponse, ServerSentEvent
from pydantic import BaseModel, Field

from main import HEADERS, EndStreams
from recipes.common import prepare

# What FastAPI leaves to you -----------------------------------------------------------------------


class StreamRoute(APIRoute):
    """Sends a stream's headers. FastAPI's own lack `no-transform`, so HAProxy would compress it."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handler = super().get_route_handler()

        async def with_headers(request: Request) -> Response:
            response = await handler(request)
            response.headers.update(HEADERS)
            return response

        return with_headers


app = FastAPI(title="FastAPI's own server-sent events")
app.router.route_class = StreamRoute
app.add_middleware(EndStreams)  # without it, a reload waits for open streams
prepare(app)


class Name(Enum):
    CUP = "cup"
    POT = "pot"
    SPOON = "spoon"


class Item(BaseModel):
    name: Name
    price: float


@dataclass
class Shelf:
    room: str
    number: int


ITEMS = [Item(name=n, price=p) for n, p in ((Name.CUP, 2.5), (Name.POT, 19), (Name.SPOON, 1.2))]


def first_left(last_event_id: Annotated[str, Header(pattern="^[0-9]{0,18}$")] = "") -> int:
    """Return where to resume, or answer 204. In an endpoint that yields, a 204 would be too late.

    An empty `Last-Event-ID` counts as absent.
    """
    first = int(last_event_id) + 1 if last_event_id else 0
    if first >= len(ITEMS):
        raise HTTPException(204, headers=HEADERS)  # an `EventSource` stops only at a 204
    return first


def catalogue() -> Iterator[list[Item]]:
    """Open a resource, such as a database session, and close it when the reader leaves.

    The endpoint's own `finally` may run late: FastAPI leaves a sync generator, and an async one
    with a slow reader, to Python's garbage collector.
    """
    yield ITEMS


Catalogue = Annotated[list[Item], Depends(catalogue)]


# What FastAPI does --------------------------------------------------------------------------------


@app.get("/items/stream", response_class=EventSourceResponse)
async def stream_items(items: Catalogue) -> AsyncIterable[Item]:
    """Items without event fields. The annotation checks each item, and is its schema in /docs."""
    for item in items:
        yield item
        await asyncio.sleep(0.5)


@app.get("/items/sync", response_class=EventSourceResponse)
def stream_items_sync(items: Catalogue) -> Iterable[Item]:
    """The same from a sync generator. It may block, because it runs in a thread."""
    for item in items:
        yield item
        time.sleep(0.5)


@app.get(
    "/items/events",
    response_class=EventSourceResponse,
    responses={204: {"description": "No event is left after `Last-Event-ID`."}},
)
async def stream_events(
    first: Annotated[int, Depends(first_left)], items: Catalogue
) -> AsyncIterable[ServerSentEvent]:
    """Items as events with a name and an id, so that a reader can resume after its last event."""
    yield ServerSentEvent(comment="come again after a second", retry=1000)
    for i in range(first, len(items)):
        yield ServerSentEvent(event="item", id=str(i), data=items[i])
        await asyncio.sleep(0.5)


@app.get("/items/raw", response_class=EventSourceResponse)
async def stream_raw() -> AsyncIterable[ServerSentEvent]:
    """`raw_data` is sent unchanged; `data` would be JSON, with quotes around a text."""
    yield ServerSentEvent(raw_data="text, on\ntwo lines")
    yield ServerSentEvent(raw_data="<p>A <b>cup</b></p>", event="html")
    yield ServerSentEvent(raw_data="cup,2.50")


@app.get("/items/mixed", response_class=EventSourceResponse)
async def stream_mixed() -> AsyncIterable[ServerSentEvent]:
    """A pydantic model, a dataclass and an enum in one event."""
    yield ServerSentEvent(data={"item": ITEMS[0], "shelf": Shelf("kitchen", 3), "next": Name.POT})


@app.get("/items/slow", response_class=EventSourceResponse)
async def stream_slowly() -> AsyncIterable[Item]:
    """Two items, 20 seconds apart. After 15, FastAPI sends `: ping`, so that no proxy hangs up."""
    yield ITEMS[0]
    await asyncio.sleep(20)
    yield ITEMS[1]


class Order(BaseModel):
    names: Annotated[list[Name], Field(min_length=1, max_length=100)]


@app.post("/items/stream", response_class=EventSourceResponse)
async def stream_ordered(order: Order, items: Catalogue) -> AsyncIterable[Item]:
    """The items that the body names. `EventSource` cannot post; `fetch` can."""
    for name in order.names:
        yield next(item for item in items if item.name == name)
        await asyncio.sleep(0.5)
