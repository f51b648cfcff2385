"""The answers of the recipe `answers`: their events, and where they are, in memory or in Redis.

In Redis an answer is a stream, and the id of an event is its sequence number. Redis refuses an id
that is not higher than all before it (https://redis.io/docs/latest/commands/xadd/). So of two
servers that put the same event, one is refused, and learns that the other one has ended the answer:
somebody cancelled it, or took this server for dead. It takes neither a lock nor a script.
"""

import asyncio
import json
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, NamedTuple
from uuid import uuid4

from redis.asyncio import BlockingConnectionPool, Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import ReadOnlyError, ResponseError, WatchError

from recipes.common import keep_going

KEEP = 3600  # seconds that an answer is kept after its end
DELTA = "response.output_text.delta"
ENDS = ("response.completed", "response.incomplete", "response.failed")


class Refused(Exception):
    """Somebody else was quicker to put this event, or the answer is over."""


class Away(Exception):
    """The answers can neither be read nor written now."""


class Event(NamedTuple):
    number: int
    type: str
    data: str  # JSON


class Answer:
    """The events of an answer, as far as this server knows them."""

    def __init__(self, response_id: str) -> None:
        self.id = response_id
        self.events: list[Event] = []
        self.newest = -1  # the highest number that is taken, perhaps by an event that is not here
        self.over = self.deleted = False
        self.news: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.readers, self.used = 0, time.monotonic()
        self.maker: asyncio.Task[None] | None = None  # while this server makes it
        self.stop: dict[str, Any] = {"status": "cancelled"}  # how it ends if that is cancelled
        self.server, self.missed = "", 0  # who makes it; how often in a row that gave no sign of it

    def event(self, kind: str, **fields: Any) -> Event:
        """Return what would be the next event."""
        data = {"type": kind, "sequence_number": self.newest + 1, **fields}
        return Event(self.newest + 1, kind, json.dumps(data, separators=(",", ":")))

    def end(self, status: str, **fields: Any) -> Event:
        """Return what would be the last event. The API has no type of its own for `cancelled`."""
        kind = "incomplete" if status == "cancelled" else status
        return self.event(f"response.{kind}", response=self.response(status, **fields))

    def add(self, event: Event) -> None:
        """Take in the next event, and wake the readers.

        After a hole only the end of an answer that is not complete is taken in: what is missing
        still comes, or never.
        """
        self.newest = max(self.newest, event.number)
        last = self.events[-1].number if self.events else -1
        fits = event.number == last + 1 or (event.number > last and event.type in ENDS[1:])
        if fits and not self.over:
            self.events.append(event)
            self.over = event.type in ENDS
            news, self.news = self.news, self.news.get_loop().create_future()
            news.set_result(None)

    def item(self, status: str, text: str = "") -> dict[str, Any]:
        """Return the one item of its output: a message."""
        part = {"type": "output_text", "text": text, "annotations": [], "logprobs": []}
        status = status if status in ("in_progress", "completed") else "incomplete"
        message = {"id": self.id.replace("resp", "msg"), "type": "message", "role": "assistant"}
        return {**message, "status": status, "content": [part]}

    def text(self) -> str:
        return "".join(json.loads(e.data)["delta"] for e in self.events if e.type == DELTA)

    def response(self, status: str = "in_progress", **fields: Any) -> dict[str, Any]:
        """Return the response as it stands now, or as it would end."""
        response: dict[str, Any] = json.loads(self.events[-1 if self.over else 0].data)["response"]
        if self.over:
            return response
        output = [self.item(status, self.text())] if len(self.events) > 2 else []
        return {**response, "status": status, "output": output, **fields}


class Answers:
    """In memory, in one process."""

    def __init__(self) -> None:
        self.here: dict[str, Answer] = {}

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Whatever has to run as long as the server does."""
        yield

    async def create(self, answer: Answer) -> None:
        """Take in a new answer, with its first event."""
        self.here[answer.id] = answer

    async def look(self, response_id: str) -> Answer | None:
        """Return an answer as it stands now."""
        return self.here.get(response_id)

    async def put(self, answer: Answer, event: Event) -> None:
        """Put the next event. Raises `Refused`, and `Away`."""
        if answer.over:
            raise Refused
        answer.add(event)
        if answer.over:
            asyncio.get_running_loop().call_later(KEEP, self.here.pop, answer.id, None)

    async def check(self, answer: Answer) -> None:
        """See to it that no event of an answer is missing which this server makes."""

    async def finish(self, answer: Answer, **end: Any) -> None:
        """Put the last event, if there is none yet: any server can end any answer."""
        while not answer.over:
            try:
                await self.put(answer, answer.end(**end))
            except Refused:
                await self.look(answer.id)

    async def delete(self, answer: Answer) -> None:
        await self.finish(answer, status="cancelled")
        self.here.pop(answer.id, None)


class RedisAnswers(Answers):
    """In Redis. `here` has copies: of what is made here, and of what is read here."""

    BEAT = 1.5  # seconds between two signs of life of a server
    LIFE = 3.5  # seconds that one lasts; a server that missed three in a row is gone
    SPARE = 15  # seconds that a copy is kept which nobody uses
    PAUSE = 0.01  # seconds between two looks for new events: many come at once, for less CPU
    PATIENCE = 3  # seconds until a connection that does not answer is given up
    DELETED = 2**64 - 2  # the number of the entry after which Redis takes no other

    def __init__(self, url: str) -> None:
        super().__init__()
        self.name = f"answers:server:{uuid4().hex}"
        self.asked: list[tuple[tuple[Any, ...], asyncio.Future[Any]]] = []
        self.asking: asyncio.Task[None] | None = None
        self.connection_id = 0  # of the connection that waits for events
        try:
            pool = BlockingConnectionPool.from_url(
                url,
                max_connections=2,  # one waits for events, one does all else
                timeout=None,
                socket_timeout=self.PATIENCE,
                retry=Retry(NoBackoff(), 0),  # whoever asks knows whether to ask again
                protocol=2,  # with 3 a connection that broke is not noticed before its use
                decode_responses=True,
                encoding_errors="replace",
            )
            pool.make_connection()  # type: ignore[no-untyped-call]
        except Exception:  # what it says may contain a part of the password
            example = "redis://[user:password@]host[:port][/database]"
            raise SystemExit(f"REDIS_URL is not the address of a Redis server: {example}") from None
        self.redis: Any = Redis.from_pool(pool)

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        work = {"reading answers": self.follow, "a sign of life": self.beat}
        tasks = [asyncio.create_task(keep_going(what, do, 0.5)) for what, do in work.items()]
        yield
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)
        await self.redis.connection_pool.disconnect()

    async def ask(self, *command: Any) -> Any:
        """Send a command, in one round trip with all others that wait."""
        result: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self.asked.append((command, result))
        if not self.asking or self.asking.done():
            self.asking = asyncio.create_task(self.send_asked())
        return await result

    async def send_asked(self) -> None:
        while batch := [asked for asked in self.asked if not asked[1].done()]:
            self.asked = []
            pipeline = self.redis.pipeline(transaction=False)
            for command, _ in batch:
                pipeline.execute_command(*command)
            results: list[Any]
            try:
                results = await pipeline.execute(raise_on_error=False)
                if any(isinstance(result, ReadOnlyError) for result in results):
                    # After a failover another server is behind the same address.
                    await self.redis.connection_pool.disconnect()
            except Exception as error:
                results = [error] * len(batch)
            for (_, future), result in zip(batch, results, strict=True):
                if future.done():
                    continue  # whoever asked has given up
                if isinstance(result, ResponseError) and "equal or smaller" in str(result):
                    future.set_exception(Refused())
                elif isinstance(result, Exception):
                    future.set_exception(Away(f"{type(result).__name__}: {result}"))
                else:
                    future.set_result(result)

    async def create(self, answer: Answer) -> None:
        answer.server = self.name
        await self.write(answer)
        self.here[answer.id] = answer
        await self.sign()

    async def sign(self) -> None:
        """Give a sign of life: it names the answers that are made here."""
        mine = [a.id for a in self.here.values() if a.server == self.name and not a.over]
        await self.ask("SET", self.name, " ".join(mine), "PX", int(self.LIFE * 1000))

    async def write(self, answer: Answer) -> None:
        """Write all events: the first one, and all of them when Redis came back without some."""
        key, mine = f"answers:{answer.id}", {event.data for event in answer.events}
        try:
            async with self.redis.pipeline() as pipeline:
                await pipeline.watch(key)
                there = await pipeline.xrange(key)
                if any(fields.get("data") not in mine for _, fields in there):
                    return self.extend(answer, there)  # somebody else has put one
                pipeline.multi()
                pipeline.delete(key)
                for event in answer.events:
                    fields = {"type": event.type, "data": event.data, "server": answer.server}
                    pipeline.xadd(key, fields, id=f"0-{event.number + 1}")
                pipeline.expire(key, KEEP)
                results = await pipeline.execute(raise_on_error=False)
            if failed := [result for result in results if isinstance(result, Exception)]:
                raise failed[0]
        except WatchError:
            return None  # somebody else was quicker; whoever needs it looks again
        except Exception as error:
            raise Away(f"{type(error).__name__}: {error}") from error
        return None

    async def put(self, answer: Answer, event: Event) -> None:
        key, entry = f"answers:{answer.id}", f"0-{event.number + 1}"
        fields = ("type", event.type, "data", event.data)
        try:
            while not await self.ask("XADD", key, "NOMKSTREAM", entry, *fields):
                if not answer.maker:
                    break  # Redis has lost it: at least the readers here are told
                await self.write(answer)
        except Refused:  # or it is there from a try before, whose result did not get here
            there = await self.ask("XRANGE", key, entry, entry)
            if not there or there[0][1].get("data") != event.data:
                raise
        answer.add(event)

    async def look(self, response_id: str) -> Answer | None:
        key, answer = f"answers:{response_id}", self.here.get(response_id) or Answer(response_id)
        exists, entries = await asyncio.gather(
            self.ask("EXISTS", key), self.ask("XRANGE", key, f"(0-{len(answer.events)}", "+")
        )
        self.extend(answer, entries)
        if answer.deleted or not answer.events or not (exists or answer.maker):
            return None
        new = response_id not in self.here
        answer = self.here.setdefault(response_id, answer)
        answer.used = time.monotonic()
        if new and not answer.over:
            await self.ask("CLIENT", "UNBLOCK", self.connection_id)  # it is to wait for this, too
        return answer

    def extend(self, answer: Answer, entries: Any) -> None:
        """Take in entries of its stream."""
        for entry, fields in entries:
            number = int(entry.partition("-")[2]) - 1
            answer.server = fields.get("server", answer.server)
            if number == self.DELETED:
                answer.deleted = True
                if answer.events:
                    answer.add(answer.end("cancelled"))
            elif "data" in fields and entry.startswith("0-"):  # and not what others put there
                answer.add(Event(number, fields["type"], fields["data"]))

    async def follow(self) -> None:
        """Read what is made elsewhere and waited for here, as long as one connection holds."""
        async with self.redis.client() as connection:
            self.connection_id = await connection.client_id()
            while True:
                waited_for = [a for a in self.here.values() if not (a.over or a.maker)]
                after = {f"answers:{a.id}": f"0-{len(a.events)}" for a in waited_for}
                # One more, which never comes: so it is noticed early that a connection is dead.
                after["answers:none"] = "0"
                for key, entries in await connection.xread(after, block=500):
                    if answer := self.here.get(key.removeprefix("answers:")):
                        self.extend(answer, entries)
                await asyncio.sleep(self.PAUSE)

    async def beat(self) -> None:
        """Give a sign of life, look after the answers made here, and whether other servers live."""
        here, now = list(self.here.values()), time.monotonic()
        made = [answer for answer in here if answer.server == self.name]
        waited_for = [answer for answer in here if answer.server != self.name and not answer.over]
        try:
            async with asyncio.timeout(self.PATIENCE):
                await self.sign()
                await asyncio.gather(*(self.check(answer) for answer in made))
                signs = await asyncio.gather(*(self.ask("GET", a.server) for a in waited_for))
        except Exception:
            for answer in waited_for:
                answer.missed = 0  # nobody can give a sign of life now
            raise
        for answer, sign in zip(waited_for, signs, strict=True):
            answer.missed = 0 if sign and answer.id in sign else answer.missed + 1
            if answer.missed >= 3:
                error = {"code": "server_error", "message": "The server that made it is gone."}
                await self.finish(answer, status="failed", error=error)
        for answer in here:
            if not (answer.readers or answer.maker) and answer.used + self.SPARE < now:
                self.here.pop(answer.id, None)
        await asyncio.sleep(self.BEAT)

    async def check(self, answer: Answer) -> None:
        key, known = f"answers:{answer.id}", len(answer.events)
        _, there = await asyncio.gather(self.ask("EXPIRE", key, KEEP), self.ask("XLEN", key))
        if there < known:
            await self.write(answer)
        elif there > known:
            await self.look(answer.id)
        if answer.over and answer.maker:
            answer.maker.cancel()  # somebody else has ended it

    async def delete(self, answer: Answer) -> None:
        """Forget all that was said; a last entry keeps its maker from putting it there again."""
        key = f"answers:{answer.id}"
        await asyncio.gather(
            self.ask("XADD", key, "NOMKSTREAM", f"0-{self.DELETED + 1}", "deleted", "1"),
            self.ask("XTRIM", key, "MAXLEN", 1),
            self.ask("EXPIRE", key, KEEP),
        )
        self.extend(answer, [(f"0-{self.DELETED + 1}", {})])
        self.here.pop(answer.id, None)
