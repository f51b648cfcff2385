"""The answers of answers.py in Redis: any number of servers make, read and stop them.

An answer is a Redis Stream of its parts. About 30 times a second, a server does a round: it puts
the parts that were made here, and reads the new parts of all answers that are made or read here.
The server that makes an answer reads it like the others, so all readers can see what one has seen.

Parts have the ids 0-1, 0-2, and so on. The end has the id 1-0, so any server can put it. There is
no second end, and nothing follows it. A server that only hung finds the end when it wakes up, and
stops its model.
"""

import asyncio
import json
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI

from recipes import answers, common

END = "1-0"
ROUND = 0.03  # seconds between two rounds
MANY = 10_000  # parts that a round trip reads at most, so that they arrive in time
PATIENCE = 2.0  # seconds that a round trip may take; a request waits for twice as long
BEAT, GONE = 1.5, 6.0  # after so many seconds of silence: put an empty delta; give the answer up
FINISH = 5.0  # seconds for which a stopping server continues its answers
# Put parts if Redis has as many as expected. If it has fewer, it has lost some in a failover: the
# next round puts all from there on, so there is never a hole. If the expected number is negative,
# put the end after all parts (-1), or replace them with it (-2).
PUT = """
local expected = tonumber(ARGV[2])
if expected == -2 then redis.call('DEL', KEYS[1]) end
local over = redis.call('XRANGE', KEYS[1], '1-0', '1-0')[1]
if not over and (expected < 0 or expected == redis.call('XLEN', KEYS[1])) then
    for i = 3, #ARGV, 2 do
        redis.call('XADD', KEYS[1], ARGV[i], 'part', ARGV[i + 1])
    end
    redis.call('EXPIRE', KEYS[1], ARGV[1])
end
return redis.call('XLEN', KEYS[1])
"""


class Answer(answers.Answer):
    def __init__(self, response_id: str) -> None:
        super().__init__(response_id)
        self.place, self.silent = "0-0", 0.0  # the id of the last part read; seconds since then
        self.more = True  # whether there may be more than the last round has read
        self.parts: list[str] = []  # what is put here: id, part, id, part, …
        self.there = -1  # how many parts Redis has; negative: see PUT
        self.asked = 0.0  # when somebody last asked for it

    def add_part(self, kind: str, value: Any = None) -> None:
        """Put a part in the next round. Readers get it when it has been read from Redis."""
        if END not in self.parts[-2:]:
            number = f"0-{len(self.parts) // 2 + 1}" if kind in ("response", "delta") else END
            self.parts += (number, json.dumps([kind, value]))


class RedisStore(answers.Store):
    """The answers in Redis; `here` are those that are made, read or asked for in this process."""

    def __init__(self, url: str) -> None:
        self.here: dict[str, Any] = {}
        self.redis = common.connect_to_redis(url, connections=1, retries=1)
        self.last_round = 0.0  # when it began

    @asynccontextmanager
    async def lifespan(self, _: FastAPI) -> AsyncIterator[None]:
        """Do the rounds. At shutdown, continue for a while with the answers that are made here."""
        rounds = asyncio.create_task(common.keep_going("answers", self.go_round, 0.5))
        yield
        end, made = time.monotonic() + FINISH, [a for a in self.here.values() if a.maker]
        while not all(a.over for a in made) and time.monotonic() < end:  # noqa: ASYNC110
            await asyncio.sleep(ROUND)
        rounds.cancel()

    async def begin(self, response: answers.Json) -> Answer:
        answer = Answer(response["id"])
        answer.there = 0
        answer.add_part("response", response)
        await self.sync(answer)
        return answer

    async def find(self, response_id: str) -> Answer | None:
        answer = self.here.get(response_id) or Answer(response_id)
        await self.sync(answer)
        if answer.frames:
            return answer
        self.here.pop(response_id, None)
        return None

    async def put(self, answer: Any, kind: str, value: Any = None) -> None:
        answer.add_part(kind, value)
        while kind == "delta" and len(answer.parts) > 2 * answer.there + 40:
            await answer.news.wait()  # the model waits until Redis keeps up

    async def sync(self, answer: Any) -> None:
        """Wait for a round that begins after this call."""
        called = answer.asked = time.monotonic()
        self.here.setdefault(answer.id, answer)
        try:
            async with asyncio.timeout(2 * PATIENCE):
                while self.last_round < called or answer.more:  # noqa: ASYNC110
                    await asyncio.sleep(ROUND / 3)
        except TimeoutError:
            raise common.openai_error(503, "The answers cannot be reached. Try again.") from None

    async def delete(self, answer: Any) -> None:
        self.here[answer.id] = answer
        answer.parts, answer.there = [], -2
        answer.add_part("cancelled")
        await self.sync(answer)
        self.here.pop(answer.id, None)

    async def go_round(self) -> None:
        began = time.monotonic()
        for answer in list(self.here.values()):
            if not answer.frames and answer.asked < began - 2 * PATIENCE:
                del self.here[answer.id]  # it does not exist, and nobody waits for it
        made_or_read = list(self.here.values())
        for start in range(0, len(made_or_read), 100):  # so that a round trip never takes long
            await self.exchange({f"answers:{a.id}": a for a in made_or_read[start : start + 100]})
        for answer in made_or_read:
            # While Redis is away, nobody can put a part: at most half a second of that counts.
            answer.silent += min(began - self.last_round, 0.5)
            if answer.maker and answer.silent > BEAT:
                answer.add_part("delta", "")
            elif answer.silent > GONE:
                answer.add_part("failed", "The server that made it is gone.")
        self.last_round = began
        await asyncio.sleep(ROUND)

    async def exchange(self, some: dict[str, Any]) -> None:
        """Do a round trip for some answers, by their keys: put what was made, read what is new."""
        puts = {key: a.parts[2 * a.there : 2 * a.there + 200] for key, a in some.items()}
        puts = {key: parts for key, parts in puts.items() if parts}
        async with asyncio.timeout(PATIENCE), self.redis.pipeline(transaction=False) as pipeline:
            # This write fails if Redis accepts none, because it is a replica or full. Its key has
            # no id in it, or a request for that id would make each round fail.
            pipeline.set("answers:", "", px=1)
            for key, parts in puts.items():
                pipeline.eval(PUT, 1, key, answers.KEEP, some[key].there, *parts)
            many = MANY // max(1, sum(answer.more for answer in some.values()))
            for answer in some.values():
                answer.more = True  # until it has been read
            pipeline.xread({key: answer.place for key, answer in some.items()}, count=many)
            _, *counts, news = await pipeline.execute()
        for key, there in zip(puts, counts, strict=True):
            some[key].there = there if some[key].there > -2 else -2
        new = dict(news)
        for key, answer in some.items():
            for place, fields in new.get(key, ()):
                answer.place, answer.silent = place, 0
                answer.take(*json.loads(fields.get("part", '["delta", ""]')))
            answer.more = len(new.get(key, ())) == many and not answer.over
            if answer.over:  # it may be deleted, so the next request reads it again
                self.here.pop(answer.id, None)
