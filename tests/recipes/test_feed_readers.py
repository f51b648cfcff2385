"""recipes/feed.py without a network: readers that are slow, leave and come back, in any order."""

# ruff: noqa: ASYNC110
# The turns of the event loop are what is played with.

import asyncio
import random
import re
from typing import Any

import pytest

from recipes import feed
from recipes.feed import EventId, Log, Reader


class Client:
    """Reads a log over ASGI, as slowly and as inconstantly as the dice say."""

    def __init__(self, log: Log, dice: random.Random) -> None:
        self.log, self.dice = log, dice
        self.after: EventId | None = None
        self.got: list[int | None] = []  # the numbers of its events; None: a gap
        self.left = asyncio.Event()
        self.patient = False
        self.done = asyncio.Event()

    async def receive(self) -> dict[str, Any]:
        await self.left.wait()
        return {"type": "http.disconnect"}

    async def send(self, message: Any) -> None:
        assert asyncio.current_task()
        if not self.patient and self.dice.random() < 0.3:
            for _ in range(self.dice.choice([1, 2, 30])):
                await asyncio.sleep(0)
        if self.left.is_set():
            return  # as uvicorn does
        for frame in message.get("body", b"").decode().split("\n\n"):
            if found := re.match(r"(?:retry: \d+\n)?id: (.*)(?:\ndata: (\d+))?$", frame):
                self.after = EventId.parse(found[1])
                if found[2]:
                    self.got.append(int(found[2]))
            elif frame.startswith("event: gap\n"):
                self.got.append(None)

    async def read(self) -> None:
        """Read for a while, leave, and come back, until all is published; then until the end."""
        while not self.done.is_set():
            self.left.clear()
            reader = Reader(self.log, self.after)
            reading = asyncio.create_task(reader.send_events(self.receive, self.send))
            while not self.patient and self.dice.random() > 0.03:
                await asyncio.sleep(0)
            if self.patient:
                await self.done.wait()
            self.left.set()
            await reading


@pytest.mark.parametrize("seed", range(100))
def test_nothing_is_lost_doubled_or_out_of_order(
    seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(feed, "KEEP", 25)
    monkeypatch.setattr(feed, "WRITE", 100)

    async def publish_while_they_read() -> list[Client]:
        dice = random.Random(seed)
        log = Log()
        clients = [Client(log, dice) for _ in range(6)]
        reading = [asyncio.create_task(client.read()) for client in clients]
        while not all(client.after for client in clients):
            await asyncio.sleep(0)
        for number in range(200):
            await log.publish(str(number))
            if dice.random() < 0.5:
                for _ in range(dice.choice([1, 1, 3, 10])):
                    await asyncio.sleep(0)
        for client in clients:
            client.patient = True
        async with asyncio.timeout(60):
            while not all(client.got[-1:] == [199] for client in clients):
                await asyncio.sleep(0)
        for client in clients:
            client.done.set()
        await asyncio.gather(*reading)
        assert not log.waiting
        return clients

    for client in asyncio.run(publish_while_they_read()):
        before = -1
        told = False
        for number in client.got:
            if number is not None:
                assert number > before
                assert told or number == before + 1
                before = number
            told = number is None
