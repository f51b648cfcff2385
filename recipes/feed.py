"""feed: channels with any number of readers. Each event goes to all readers of its channel.

Use it for a user's notifications, the scores of a match, the price of a share. For events with one
reader, use `long_task`. If events must survive a broken disk, write them to a database first.
Run it with `uvicorn recipes.feed:app --reload`, then open http://localhost:8000 in two tabs, or
read a channel with `curl -N localhost:8000/feed/goals`. The events are in memory, in one process.
With `REDIS_URL` (such as redis://localhost:6379) they are in Redis: see feed_redis.py.
"""

import asyncio
import gc
import os
import re
import time
from bisect import bisect_right
from collections.abc import AsyncGenerator, MutableMapping
from itertools import accumulate, islice
from typing import Annotated

from fastapi import FastAPI, Header, HTTPException, Path, Query, Response
from pydantic import BaseModel, Field

from main import EndStreams, Stream
from recipes.common import prepare

# 1. A channel -------------------------------------------------------------------------------------

KEEP = 1000  # events of each channel
FORGET = 3600  # seconds without a post and without a reader, after which a channel is forgotten
SILENCE = 10.0  # seconds without an event, after which a comment says that the stream is alive
KEEP_ALIVE = b": keep-alive\n\n"
GATHER = 0.002  # seconds; events that come within this time wake their readers once
GAP = '{"reason": "What came before this is no longer kept."}'
WRITE = 65_536  # bytes of several events that are sent in one write, at most


def to_sse(event_id: str, data: str, name: str = "") -> bytes:
    """Return the event as its readers get it. Each kind of line break begins a new `data` line."""
    event = "event: " + re.sub(r"[\r\n]", " ", name) + "\n" if name else ""
    lines = "".join(f"data: {line}\n" for line in re.split(r"\r\n|\r|\n", data))
    return f"id: {event_id}\n{event}{lines}\n".encode(errors="replace")


class Channel:
    """The last events of a channel, each as the bytes that all its readers get.

    Events are numbered: `first` is the oldest that is kept, `end` the next one. A reader has no
    queue, only a place: the number of its next event. If that is no longer kept, it gets a gap.
    """

    def __init__(self, name: str, floor: str = "") -> None:
        self.name = name
        self.floor = floor  # no event after this id is missing; empty: nothing was read yet
        self.ids: list[str] = []
        self.frames: list[bytes] = []
        self.first = self.end = self.unread = 1  # readers with a gap continue at `unread`
        self.readers, self.used = 0, time.monotonic()  # when it was last posted in or read
        self.chunk: dict[int, tuple[bytes, int]] = {}  # see `take`
        self.waiting: list[asyncio.Future[None]] = []
        self.timer: asyncio.TimerHandle | None = None

    def append(self, event_id: str, frame: bytes) -> None:
        self.ids.append(event_id)
        self.frames.append(frame)
        self.end += 1
        if len(self.ids) > KEEP:
            self.floor, self.first = self.ids.pop(0), self.first + 1
            del self.frames[0]
        self.wake_within(GATHER)

    def begin(self, floor: str) -> None:
        """Begin again after `floor`. All readers' places are now before it, so they get a gap."""
        self.floor, self.ids, self.frames = floor, [], []
        self.first = self.end = self.unread = self.end + 1
        self.wake_within(GATHER)

    def find(self, after: str, last: int) -> int:
        """Return the place after an id, or of the last few events. 0: the id is unknown here."""
        known = [self.floor, *self.ids]
        if after:
            return self.first + known.index(after) if after in known else 0
        return max(self.end - last, self.first) if self.floor else 0

    def take(self, place: int) -> tuple[bytes, int]:
        """Return the events at this place, joined, and the place after them."""
        if place not in self.chunk:  # most readers are at the same place, so make it once
            begin = max(place, self.first, self.unread if 0 < place < self.first else 0)
            frames = self.frames[begin - self.first :]
            if begin > place:
                # In one chunk with the next event: a cut between them would repeat the gap.
                gap = to_sse([self.floor, *self.ids][begin - self.first], GAP, "gap")
                frames[:1] = [gap + b"".join(frames[:1])]
            count = max(1, bisect_right(list(accumulate(map(len, frames))), WRITE))
            self.chunk = {place: (b"".join(frames[:count]), min(begin + count, self.end))}
        return self.chunk[place]

    def wake_within(self, seconds: float) -> None:
        """Wake the readers then, or earlier. They share one timer, for events and for silence."""
        self.chunk, loop = {}, asyncio.get_running_loop()
        if self.timer and self.timer.when() > loop.time() + seconds:
            self.timer.cancel()
            self.timer = None
        self.timer = self.timer or loop.call_later(seconds, self.wake)

    def wake(self) -> None:
        """Wake all waiting readers. Each goes on in its own task, so none can harm another."""
        waiting, self.waiting, self.timer = self.waiting, [], None
        for future in waiting:
            if not future.done():  # its reader has left
                future.set_result(None)

    def wait(self) -> asyncio.Future[None]:
        """Return what to await for an event, for at most ten seconds."""
        if not self.timer:
            self.wake_within(SILENCE)
        self.waiting.append(asyncio.get_running_loop().create_future())
        return self.waiting[-1]


# 2. A reader --------------------------------------------------------------------------------------


async def read(channel: Channel, fresh: bool, after: str, last: int) -> AsyncGenerator[bytes]:
    """Yield the events after the id `after`, or the last few, and then all new ones."""
    channel.readers += 1
    try:
        while not (place := channel.find(after, last)) and not fresh:
            yield KEEP_ALIVE  # the log cannot be read now; it may contain the id
            await asyncio.sleep(1)
            channel, fresh = await log.open(channel.name)
        # An id without an event, to resume from if the connection breaks before the first event.
        last_id = after or [channel.floor, *channel.ids][place - channel.first]
        yield f"retry: 1000\nid: {last_id}\n\n".encode()
        while True:
            if place == channel.end:
                await channel.wait()
            chunk, place = channel.take(place)
            yield chunk or KEEP_ALIVE
    finally:
        channel.readers -= 1
        channel.used = time.monotonic()


# 3. The log ---------------------------------------------------------------------------------------


class LogIsAway(HTTPException):
    def __init__(self) -> None:
        detail = "The log is not available. The event may have been published or not."
        super().__init__(503, detail, {"Retry-After": "1"})


class Log:
    """The channels in memory, for one process. Another log has the same two methods."""

    def __init__(self) -> None:
        self.channels: MutableMapping[str, Channel] = {}
        self.count = 0

    async def open(self, name: str) -> tuple[Channel, bool]:
        """Return the channel, and whether it contains all that was posted until now."""
        # Two others are checked as well, in turn, so that each unused one is removed in time.
        for each in (name, *islice(self.channels, 2)):
            channel = self.channels.pop(each, None)
            if channel and (channel.readers or channel.used + FORGET > time.monotonic()):
                self.channels[each] = channel
        channel = self.channels.setdefault(name, Channel(name, f"{time.time_ns() // 1_000_000}-0"))
        channel.used = time.monotonic()
        return channel, True

    async def publish(self, name: str, data: str, event: str) -> str:
        """Put an event into a channel; return its id. Raises `LogIsAway`."""
        channel, _ = await self.open(name)
        self.count += 1
        event_id = f"{time.time_ns() // 1_000_000}-{self.count}"
        channel.append(event_id, to_sse(event_id, data, event))
        return event_id


log = Log()
if url := os.environ.get("REDIS_URL"):
    import recipes.feed_redis  # here, because it imports what is above

    log = recipes.feed_redis.RedisLog(url)


# 4. The endpoints ---------------------------------------------------------------------------------

Name = Annotated[str, Path(pattern=r"^[A-Za-z0-9._:-]{1,100}$")]
EVENT = re.compile(r"^(?!gap$)[^\x00-\x1f\x7f-\x9f]{0,100}$(?!\n)")  # a `gap` means a loss
ID = r"^([0-9]{1,20}-[0-9]{1,20})?$"
# The garbage collector scans what thousands of readers hold, so let it run less often.
gc.set_threshold(50_000, 20, 50)
app = FastAPI(title="Channels, and any number of readers")
prepare(app, page="feed.html")
app.add_middleware(EndStreams)


class Event(BaseModel):
    data: Annotated[str, Field(min_length=1, max_length=10_000)]
    event: Annotated[str, Field(pattern=EVENT)] | None = None


@app.post("/feed/{channel}", status_code=201)
async def publish(channel: Name, event: Event) -> dict[str, str]:
    """Post an event in a channel, for all its readers."""
    return {"id": await log.publish(channel, event.data, event.event or "")}


@app.get("/feed/{channel}", response_class=Response)
async def feed(
    channel: Name,
    last_event_id: Annotated[str, Header(pattern=ID)] = "",
    since: Annotated[str, Query(alias="lastEventId", pattern=ID)] = "",
    last: Annotated[int, Query(ge=0, le=KEEP, description="Begin with the last few events.")] = 0,
) -> Response:
    """All events from now on, or all after an id, as server-sent events."""
    found = await log.open(channel)
    # When an `EventSource` reconnects, it sends the header, and the same URL again.
    return Stream(read(*found, last_event_id or since, last), media_type="text/event-stream")
