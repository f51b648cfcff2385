"""Make the table of faults of the recipe `answers`: what its readers lose, or get twice.

Run `python -m tests.faults.answers`: five minutes. It prints a Markdown table.

Many readers read some answers, which are made by two servers on one Redis. They do as an
`EventSource` does; when their connection ends, they go on at the other server. In the end each must
have what everybody else has: all events, once, in order, up to the last.
"""

import argparse
import itertools
import json
import random
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import requests

from tests.support.answers import Ask, words
from tests.support.event_sources import EventSource, EventSources, event_sources
from tests.support.processes import LIMIT, Process, wait_for
from tests.support.redis_server import BadLine, RedisServer, running_redis

ENDS = ("response.completed", "response.incomplete", "response.failed")


class Reader(EventSource):
    """Goes on at another server when its connection ends."""

    def __init__(self, ports: list[int], response_id: str) -> None:
        super().__init__(ports[0], f"/v1/responses/{response_id}?stream=true")
        self.id = response_id
        self.ports = itertools.cycle(ports)

    async def connect(self) -> Any:
        self.port = next(self.ports)
        return await super().connect()

    @property
    def over(self) -> bool:
        return bool(self.events) and self.events[-1].name in ENDS


@dataclass
class Setting:
    """Two servers, each with a line of its own to Redis; or one, without Redis."""

    folder: Path
    ask: Ask
    sources: EventSources
    servers: list[Process] = field(default_factory=list)
    redis: RedisServer | None = None
    lines: list[BadLine] = field(default_factory=list)
    made_by: dict[str, Process] = field(default_factory=dict)  # by the id of the answer
    readers: list[Reader] = field(default_factory=list)

    def answers(self, count: int, readers: int, tokens: int) -> None:
        """Let so many answers be made, on each server in turn, and so many read each of them."""
        ports = [server.port for server in self.servers]
        body = {"model": "parrot", "input": words(tokens), "background": True}
        for number in range(count):
            server = self.servers[number % len(self.servers)]
            answer = requests.post(f"{server.url}/v1/responses", json=body, timeout=LIMIT)
            self.made_by[answer.json()["id"]] = server
        for response_id, number in itertools.product(self.made_by, range(readers)):
            reader = Reader(ports[number % len(ports) :] + ports, response_id)
            self.readers.append(reader)
            self.sources.loop.call_soon_threadsafe(reader.open)
        wait_for(lambda: all(len(reader.events) > 10 for reader in self.readers), "events")


@contextmanager
def setting(redis: bool = True) -> Iterator[Setting]:
    with tempfile.TemporaryDirectory() as name, Ask(Path(name)) as ask:
        it = Setting(Path(name), ask, ask.enter_context(event_sources()))
        if redis:
            it.redis = ask.enter_context(running_redis(it.folder))
            it.lines = [BadLine(it.redis.port) for _ in range(2)]
        for port in [line.port for line in it.lines] or [0]:
            it.servers.append(ask.serve(port))
        yield it


@dataclass
class Result:
    readers: int
    events: int = 0
    lost: int = 0
    doubled: int = 0
    disordered: int = 0
    waiting: int = 0  # readers that wait in vain
    completed: int = 0  # answers
    failed: int = 0
    note: str = ""

    @property
    def bad(self) -> bool:
        return bool(self.lost or self.doubled or self.disordered or self.waiting)


def look(it: Setting, tokens: int) -> Result:
    """Wait until all readers have the end, and see what each of them got."""
    end = time.monotonic() + LIMIT
    while not all(reader.over for reader in it.readers) and time.monotonic() < end:
        time.sleep(0.05)
    result = Result(len(it.readers))
    for response_id in it.made_by:
        readers = [reader for reader in it.readers if reader.id == response_id]
        # What anybody got is what everybody should have.
        everything = {event for reader in readers for event in reader.events}
        result.events += len(everything)
        for reader in readers:
            numbers = [json.loads(event.data)["sequence_number"] for event in reader.events]
            top = max(int(event.id) for event in everything)
            result.lost += len(set(range(top + 1)) - set(numbers))
            result.doubled += len(numbers) - len(set(numbers))
            result.disordered += sum(a > b for a, b in itertools.pairwise(numbers))
            result.waiting += not reader.over
        # Two events of one number would be two truths.
        result.doubled += len(everything) - len({event.id for event in everything})
        last = next((event for event in everything if event.name in ENDS), None)
        if last and last.name == "response.completed":
            result.completed += 1
            message = json.loads(last.data)["response"]["output"][0]
            assert message["content"][0]["text"] == words(tokens)
        result.failed += bool(last and last.name == "response.failed")
    return result


# The faults ---------------------------------------------------------------------------------------


def kill_a_server(it: Setting) -> str:
    it.servers[0].kill()
    killed = time.monotonic()
    lost = [r for r in it.readers if it.made_by[r.id] is it.servers[0]]
    wait_for(lambda: all(reader.over for reader in lost), "its readers to be told")
    told = max(reader.times[-1] for reader in lost) - killed
    it.servers[0].start()
    return f"its readers were told within {told:.1f} s"


def hang_a_server(it: Setting) -> str:
    it.servers[0].signal(signal.SIGSTOP)
    time.sleep(12)
    it.servers[0].signal(signal.SIGCONT)
    return "12 s"


def restart_one_after_the_other(it: Setting) -> str:
    for server in it.servers:
        server.signal(signal.SIGTERM)
        server.wait()
        server.start()
    return f"{sum(reader.cut for reader in it.readers)} streams cut without their proper end"


def kill_redis(it: Setting) -> str:
    assert it.redis
    it.redis.kill()
    refused = refusals(it)
    time.sleep(2)
    it.redis.start()
    return refused


def refusals(it: Setting) -> str:
    """How long does a request take while Redis is away?"""
    start = time.monotonic()
    for method, path in (("POST", ""), ("GET", f"/{it.readers[0].id}")):
        url = f"{it.servers[0].url}/v1/responses{path}"
        body = {"model": "parrot", "input": "x"} if method == "POST" else None
        began = time.monotonic()
        answer = requests.request(method, url, json=body, timeout=LIMIT)
        assert answer.status_code == 503, answer.text
        assert answer.headers["retry-after"]
        assert time.monotonic() - began < 5 + 1  # the machine may be busy
    return f"a POST and a GET: 503 after {time.monotonic() - start:.1f} s together"


def stall_redis(it: Setting) -> str:
    assert it.redis
    it.redis.signal(signal.SIGSTOP)
    refused = refusals(it)
    time.sleep(3)
    it.redis.signal(signal.SIGCONT)
    return refused


def silence(it: Setting) -> str:
    it.lines[0].silence()
    return ""


def fail_over(it: Setting, replica: bool = True, demote: bool = False) -> str:
    """Another Redis is at the same address, as a replica or empty."""
    assert it.redis
    folder = it.folder / "other"
    folder.mkdir()
    other = it.ask.enter_context(running_redis(folder))
    if replica:
        other.client.replicaof("127.0.0.1", it.redis.port)
        link = "master_link_status"
        wait_for(lambda: other.client.info("replication").get(link) == "up", "the replica")
    for line in it.lines:
        line.to = other.port
    other.client.replicaof("NO", "ONE")
    if demote:  # nobody closes the connections to the old one
        it.redis.client.replicaof("127.0.0.1", other.port)
    else:
        it.redis.kill()
    return ""


def fail_over_to_an_empty_one(it: Setting) -> str:
    return fail_over(it, replica=False)


def demote(it: Setting) -> str:
    return fail_over(it, demote=True)


def trouble_readers(it: Setting) -> str:
    dice = random.Random(1)
    end = time.monotonic() + 6
    left = 0
    while time.monotonic() < end:
        for reader in dice.sample(it.readers, max(1, len(it.readers) // 20)):
            it.sources.reset(reader)
            left += 1
        time.sleep(0.1)
    return f"{left} times a reader left"


@dataclass(frozen=True)
class Fault:
    name: str
    strike: Callable[[Setting], str]
    redis: bool = True


FAULTS = [
    Fault("`kill -9` of a server", kill_a_server),
    Fault("a server hangs, and wakes", hang_a_server),
    Fault("both servers restarted, one after the other", restart_one_after_the_other),
    Fault("Redis killed, started again (`appendfsync always`)", kill_redis),
    Fault("Redis stalled for 10 s", stall_redis),
    Fault("the line from a server to Redis falls silent", silence),
    Fault("failover: a replica is behind the same address", fail_over),
    Fault("failover: the old one stays, read-only", demote),
    Fault("another Redis is there, an empty one", fail_over_to_an_empty_one),
    Fault("readers leave and come back", trouble_readers),
    Fault("in memory: readers leave and come back", trouble_readers, redis=False),
]


def run(fault: Fault, answers: int, readers: int, tokens: int = 500) -> Result:
    """Let the readers read, strike in mid-answer, and see what they got."""
    with setting(fault.redis) as it:
        it.answers(answers, readers, tokens)
        note = fault.strike(it)
        result = look(it, tokens)
        result.note = note
        if result.bad:
            for server in it.servers:
                print(server.log[-3000:], file=sys.stderr)
        return result


COLUMNS = ["fault", "readers", "events", "lost", "doubled", "out of order", "waiting"]
COLUMNS += ["completed", "failed", "also seen"]
HEAD = f"| {' | '.join(COLUMNS)} |\n| --- |{' ---: |' * (len(COLUMNS) - 2)} --- |"


def main() -> int:
    """Print the table; return 1 if an event was lost, doubled or out of order."""
    parser = argparse.ArgumentParser(description="Make the table of faults of the recipe answers.")
    parser.add_argument("--answers", type=int, default=30)
    parser.add_argument("--readers", type=int, default=10, help="of each answer")
    parser.add_argument("--only", default="", help="only faults whose name has this in it")
    arguments = parser.parse_args()
    bad = False
    print(HEAD)
    for fault in FAULTS:
        if arguments.only in fault.name:
            r = run(fault, arguments.answers, arguments.readers)
            counts = (r.readers, r.events, r.lost, r.doubled, r.disordered, r.waiting)
            cells = (fault.name, *counts, r.completed, r.failed, r.note)
            print("|", " | ".join(map(str, cells)), "|", flush=True)
            bad = bad or r.bad
    return int(bad)


if __name__ == "__main__":
    sys.exit(main())
