"""The log of feed.py in Redis: a stream for each channel, any number of processes and machines.

Pub/Sub is only a bell. If it is lost, the event is late: all channels are read every five seconds.

There are three connections, however many readers and channels: one posts, one reads, one hears the
bell. After any error on a connection, even in an answer, the next command opens a new one: after a
failover, the old primary may keep its connections and answer READONLY to every command.
"""

import asyncio
from contextlib import suppress
from typing import Any
from weakref import WeakValueDictionary

from recipes.common import connect_to_redis, in_one_line, keep_going, logger
from recipes.feed import FORGET, KEEP, Channel, Log, LogIsAway, to_sse

CHECK = 5.0  # seconds between two reads of all channels
PATIENCE = 4.0  # seconds that Redis has for an answer

# Return the event ARGV[1] and all after it; if it is gone, return all events. An empty stream gets
# an entry without an event: an id to resume from. A replica refuses this script, since it writes.
READ = f"""
if redis.call('XLEN', KEYS[1]) == 0 then redis.call('XADD', KEYS[1], '*', 'begins', '') end
redis.call('EXPIRE', KEYS[1], {FORGET})
local new = redis.call('XREVRANGE', KEYS[1], '+', ARGV[1], 'COUNT', {KEEP + 1})
if #new > 0 and new[#new][1] == ARGV[1] then return new end
return redis.call('XREVRANGE', KEYS[1], '+', '-', 'COUNT', {KEEP + 1})
"""


async def ask(client: Any, *commands: tuple[object, ...]) -> Any:
    """Send commands in one pipeline; return their answers. Each may be an exception."""
    pipeline = client.pipeline(transaction=False)
    for command in commands:
        pipeline.execute_command(*command)
    answers: list[Any] = [Exception()]
    try:
        async with asyncio.timeout(PATIENCE):
            return (answers := await pipeline.execute(raise_on_error=False))
    finally:
        if any(isinstance(answer, Exception) for answer in answers):
            await client.connection_pool.disconnect()


class RedisLog(Log):
    """The streams in Redis, and what this process has read of those that have readers here."""

    def __init__(self, url: str) -> None:
        self.channels = WeakValueDictionary()  # a reader keeps its channel alive
        self.poster, self.reader, self.bell = (connect_to_redis(url, 1) for _ in range(3))
        self.posts: list[tuple[Any, asyncio.Future[Any]]] = []  # not yet sent
        self.posting: asyncio.Task[None] | None = None
        self.rang: dict[str, asyncio.Event] = {}  # channels to read; set when that is done
        self.ringing = asyncio.Event()
        self.tasks: list[asyncio.Task[None]] = []

    async def publish(self, name: str, data: str, event: str) -> str:
        add = ("XADD", f"feed:{name}", "MAXLEN", "~", KEEP + 1, "*", "data", data, "event", event)
        expire, ring = ("EXPIRE", f"feed:{name}", FORGET), ("PUBLISH", "feed", name)
        posted = asyncio.get_running_loop().create_future()
        self.posts.append(((add, expire, ring), posted))
        if not self.posting or self.posting.done():
            self.posting = asyncio.create_task(self.post())
        try:
            answer = await asyncio.wait_for(posted, PATIENCE)
            if not isinstance(answer, str):
                raise answer if isinstance(answer, Exception) else TypeError(f"no id: {answer}")
            return answer
        except Exception as error:
            logger.error("feed: perhaps not published: %s", in_one_line(error))
            raise LogIsAway from error

    async def post(self) -> None:
        """Send all waiting posts in one pipeline, so that a hundred take as long as one."""
        while self.posts:
            some, self.posts = [each for each in self.posts if not each[1].done()], []
            try:
                answers = await ask(self.poster, *[each for three, _ in some for each in three])
            except Exception as error:
                answers = [error] * 3 * len(some)
            for (_, posted), answer in zip(some, answers[::3], strict=True):
                if not posted.done():  # somebody still waits for it
                    posted.set_result(answer)

    async def open(self, name: str) -> tuple[Channel, bool]:
        if not self.tasks or self.tasks[0].done():
            loops = [keep_going("feed: Redis", loop) for loop in (self.listen, self.follow)]
            self.tasks = [asyncio.create_task(loop) for loop in loops]
        channel = self.channels.setdefault(name, Channel(name))
        read = self.ring(name)
        with suppress(TimeoutError):
            await asyncio.wait_for(read.wait(), 1)
        return channel, read.is_set()

    def ring(self, name: str) -> asyncio.Event:
        self.rang[name] = read = self.rang.pop(name, asyncio.Event())
        self.ringing.set()
        return read

    async def listen(self) -> None:
        """Ask for a read of all channels, then listen to the bell for CHECK seconds."""
        with suppress(TimeoutError):
            async with self.bell.pubsub() as bell, asyncio.timeout(CHECK):
                try:
                    await bell.subscribe("feed")
                finally:  # also if only the other connections work
                    for name in list(self.channels):
                        self.ring(name)
                async for message in bell.listen():
                    if message["data"] in self.channels:
                        self.ring(message["data"])

    async def follow(self) -> None:
        """Append the new events of channels that rang, the latest first: bells before checks."""
        await self.ringing.wait()
        rang: list[tuple[Channel, asyncio.Event]] = []
        # Up to 20 at once, but none after a channel that was never read: that may have 30 MB.
        while self.rang and len(rang) < 20 and all(channel.floor for channel, _ in rang):
            name, read = self.rang.popitem()
            if channel := self.channels.get(name):
                rang.append((channel, read))
        if not self.rang:
            self.ringing.clear()
        pairs = [(channel.name, channel.ids[-1] if channel.floor else "-") for channel, _ in rang]
        answers = await ask(self.reader, *(("EVAL", READ, 1, f"feed:{n}", id_) for n, id_ in pairs))
        for (channel, read), entries in zip(rang, answers, strict=True):
            try:
                if isinstance(entries, Exception):
                    raise entries
                new = []
                for event_id, words in reversed(entries):
                    event = dict(zip(words[::2], words[1::2], strict=True))
                    text, kind = event.get("data"), event.get("event", "")
                    new.append((event_id, b"" if text is None else to_sse(event_id, text, kind)))
                gap = not channel.floor or new[0][0] != channel.ids[-1]
                if not gap and new[0][1] != channel.frames[-1]:
                    channel.floor = ""  # so that all of it is read
                    raise ValueError("Redis lost events, and gave their ids to others")
                known = {*filter(None, channel.frames)} if gap else set()
                if gap:  # begin right before the first id
                    ms, number = map(int, new[0][0].split("-"))
                    channel.begin(f"{ms}-{number - 1}" if number else f"{ms - 1}-{2**64 - 1}")
                for event_id, frame in new[not gap :]:
                    channel.append(event_id, frame)
                    if frame in known:  # Redis came back with older data
                        channel.unread = channel.end
                read.set()
            except Exception as error:
                logger.error("feed: cannot read channel %s: %s", channel.name, in_one_line(error))
