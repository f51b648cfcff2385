"""recipes/feed.py without a network: readers that are slow, leave and come back, in any order."""

# ruff: noqa: ASYNC110
# The turns of the event loop are what is played with.

import asyncio
import random
import re
from contextlib import aclosing

import pytest

from recipes import feed


class Client:
    """Reads a channel as slowly and as inconstantly as the dice say."""

    def __init__(self, log: feed.Log, dice: random.Random) -> None:
        self.log, self.dice = log, dice
        self.after = ""
        self.got: list[int | None] = []  # the numbers of its events; None: a gap
        self.patient = False

    async def read(self) -> None:
        """Read for a while, leave, and come back, until the last event is there."""
        while self.got[-1:] != [199]:
            channel, fresh = await self.log.open("goals")
            async with aclosing(feed.read(channel, fresh, self.after, 0)) as chunks:
                async for chunk in chunks:
                    self.take(chunk.decode())
                    if self.got[-1:] == [199] or (not self.patient and self.dice.random() < 0.03):
                        break
                    if not self.patient and self.dice.random() < 0.3:
                        for _ in range(self.dice.choice([1, 2, 30])):
                            await asyncio.sleep(0)

    def take(self, chunk: str) -> None:
        for frame in chunk.split("\n\n"):
            if found := re.search("^id: (.*)$", frame, re.MULTILINE):
                self.after = found[1]
            if "event: gap" in frame:
                self.got.append(None)
            elif found := re.search("^data: (.*)$", frame, re.MULTILINE):
                self.got.append(int(found[1]))


@pytest.mark.parametrize("seed", range(100))
def test_nothing_is_lost_doubled_or_out_of_order(
    seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(feed, "KEEP", 25)
    monkeypatch.setattr(feed, "WRITE", 100)

    async def publish_while_they_read() -> list[Client]:
        dice = random.Random(seed)
        log = feed.Log()
        clients = [Client(log, dice) for _ in range(6)]
        reading = [asyncio.create_task(client.read()) for client in clients]
        while not all(client.after for client in clients):
            await asyncio.sleep(0)
        for number in range(200):
            await log.publish("goals", str(number), "")
            if dice.random() < 0.5:
                for _ in range(dice.choice([1, 1, 3, 10])):
                    await asyncio.sleep(0)
        for client in clients:
            client.patient = True
        async with asyncio.timeout(60):
            await asyncio.gather(*reading)
        assert log.channels["goals"].readers == 0
        return clients

    for client in asyncio.run(publish_while_they_read()):
        before = -1
        told = False
        for number in client.got:
            if number is None:
                assert not told, "told twice for nothing"
            else:
                assert number > before
                assert told or number == before + 1
                before = number
            told = number is None
