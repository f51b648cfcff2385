"""Make the table of faults of the recipe `answers`: what its readers lose, or get twice.

Run `python -m tests.faults.answers`: five minutes. It prints a Markdown table.

Many readers read some answers, which are made by two servers on one Redis. They do as an
`EventSource` does; when their connection ends, they go on at the other server. In the end each must
have what everybody else has: all events, once, in order, up to the last.
"""

import itertools
import json
import random
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.support.answers import http, serve, words
from tests.support.event_sources import EventSource, EventSources, event_sources
from tests.support.processes import LIMIT, Process, starting, wait_for
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

    stack: ExitStack
    sources: EventSources
    servers: list[Process] = field(default_factory=list)
    redis: RedisServer | None = None
    lines: list[BadLine] = field(default_factory=list)
    made_by: dict[str, Process] = field(default_factory=dict)  # by the id of the answer
    readers: list[Reader] = field(default_factory=list)

    def start_redis(self) -> RedisServer:
        folder = self.stack.enter_context(tempfile.TemporaryDirectory())
        return self.stack.enter_context(running_redis(Path(folder)))

    def answers(self, count: int, readers: int, tokens: int) -> None:
        """Let so many answers be made, on each server in turn, and so many read each of them."""
        ports = [server.port for server in self.servers]
        body = {"model": "parrot", "input": words(tokens), "background": True}
        self.made_by, self.readers = {}, []
        for server in itertools.islice(itertools.cycle(self.servers), count):
            answer = http.post(f"{server.url}/v1/responses", json=body)
            self.made_by[answer.json()["id"]] = server
        for response_id, number in itertools.product(self.made_by, range(readers)):
            reader = Reader(ports[number % len(ports) :] + ports, response_id)
            self.readers.append(reader)
            self.sources.loop.call_soon_threadsafe(reader.open)
        wait_for(lambda: all(len(reader.events) > 10 for reader in self.readers), "events")
        # A server has one connection to Redis, however many answers and readers there are.
        assert all(len(line.open - line.silent) == 1 for line in self.lines)


@contextmanager
def setting(redis: bool = True) -> Iterator[Setting]:
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        start = stack.enter_context(starting(folder))
        it = Setting(stack, stack.enter_context(event_sources()))
        if redis:
            it.redis = it.start_redis()
            it.lines = [BadLine(it.redis.port) for _ in range(2)]
        urls = [f"redis://127.0.0.1:{line.port}" for line in it.lines]
        it.servers = [serve(start, url) for url in urls or [""]]
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
    assert told < 10 + 5  # the machine may be busy
    it.servers[0].start()
    return f"its readers were told within {told:.1f} s"


def hang_a_server(it: Setting) -> str:
    hanging, other = it.servers
    hanging.signal(signal.SIGSTOP)
    lost = [r for r in it.readers if it.made_by[r.id] is hanging and r.port == other.port]
    wait_for(lambda: all(reader.over for reader in lost), "its readers to be told")
    hanging.signal(signal.SIGCONT)
    return "until its readers were told"


def restart_one_after_the_other(it: Setting) -> str:
    for server in it.servers:
        server.signal(signal.SIGTERM)
        server.wait()
        server.start()
    return f"{sum(reader.cut for reader in it.readers)} streams cut without their proper end"


def refusals(it: Setting, rounds: int = 1) -> str:
    """Send each kind of request at once, some times: are all refused in time?"""
    made = f"/{it.readers[0].id}"
    kinds = [("POST", ""), ("GET", made), ("GET", f"{made}?stream=true")]
    kinds += [("POST", f"{made}/cancel"), ("DELETE", made)]
    body = {"model": "parrot", "input": "x"}
    longest = 0.0

    def ask(kind: tuple[str, str]) -> float:
        method, path = kind
        began = time.monotonic()
        answer = http.request(method, f"{it.servers[0].url}/v1/responses{path}", json=body)
        assert answer.status_code == 503, (kind, answer.text)
        assert answer.headers["Retry-After"]
        assert answer.json()["error"]["message"]
        return time.monotonic() - began

    with ThreadPoolExecutor(len(kinds)) as pool:
        for _ in range(rounds):
            longest = max(longest, *pool.map(ask, kinds))
    assert longest < 5 + 3  # the machine may be busy
    return f"{len(kinds) * rounds} requests, each 503 within {longest:.1f} s"


def kill_redis(it: Setting) -> str:
    assert it.redis
    it.redis.kill()
    refused = refusals(it)
    it.redis.start()
    return refused


def stall_redis(it: Setting) -> str:
    assert it.redis
    it.redis.signal(signal.SIGSTOP)
    refused = refusals(it, 3)  # longer than until a server counts as gone
    it.redis.signal(signal.SIGCONT)
    return refused


def refuse_writes(it: Setting) -> str:
    assert it.redis
    for spoil, mend in (
        ("REPLICAOF 127.0.0.1 1", "REPLICAOF NO ONE"),
        ("CONFIG SET maxmemory 1", "CONFIG SET maxmemory 0"),
        ("ACL SETUSER default -xadd -set", "ACL SETUSER default +@all"),
    ):
        it.redis.client.execute_command(spoil)
        refused = refusals(it)
        it.redis.client.execute_command(mend)
    return refused


def spoil_lines(it: Setting) -> str:
    it.lines[0].silence()
    it.lines[1].cut_answer_to = b"XADD"
    return ""


def fail_over(it: Setting, replica: bool = True, demote: bool = False) -> str:
    """Another Redis is at the same address, as a replica or empty."""
    assert it.redis
    old, it.redis = it.redis, it.start_redis()
    new = it.redis.client
    if replica:
        new.replicaof("127.0.0.1", old.port)
        link = "master_link_status"
        wait_for(lambda: new.info("replication").get(link) == "up", "the replica")
    for line in it.lines:
        line.to = it.redis.port
    new.replicaof("NO", "ONE")
    if demote:  # nobody closes the connections to the old one
        old.client.replicaof("127.0.0.1", it.redis.port)
    else:
        old.kill()
    return ""


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


OF_SERVERS = [
    Fault("`kill -9` of a server", kill_a_server),
    Fault("a server hangs, and wakes", hang_a_server),
    Fault("both servers restarted, one after the other", restart_one_after_the_other),
]
OF_REDIS = [
    Fault("Redis killed, started again (`appendfsync always`)", kill_redis),
    Fault("Redis stalled for 12 s", stall_redis),
    Fault("Redis is read-only, then full, then denies writes", refuse_writes),
    Fault("one line to Redis falls silent, one breaks after a write", spoil_lines),
    Fault("failover: a replica is behind the same address", fail_over),
    Fault("failover: the old one stays, read-only", lambda it: fail_over(it, demote=True)),
    Fault("another Redis is there, an empty one", lambda it: fail_over(it, replica=False)),
]
OF_READERS = [
    Fault("readers leave and come back", trouble_readers),
    Fault("in memory: readers leave and come back", trouble_readers, redis=False),
]
FAULTS = OF_SERVERS + OF_REDIS + OF_READERS


def run(it: Setting, fault: Fault, answers: int, readers: int, tokens: int = 500) -> Result:
    """Let the readers read, strike in mid-answer, and see what they got."""
    it.answers(answers, readers, tokens)
    note = fault.strike(it)
    result = look(it, tokens)
    result.note = note
    if result.bad:
        for server in it.servers:
            print(server.log[-3000:], file=sys.stderr)
    it.sources.close(it.readers)
    return result


COLUMNS = ["fault", "readers", "events", "lost", "doubled", "out of order", "waiting"]
COLUMNS += ["completed", "failed", "also seen"]
HEAD = f"| {' | '.join(COLUMNS)} |\n| --- |{' ---: |' * (len(COLUMNS) - 2)} --- |"


def main() -> int:
    """Print the table; return 1 if an event was lost, doubled or out of order."""
    bad = False
    print(HEAD)
    for fault in FAULTS:
        with setting(fault.redis) as it:
            r = run(it, fault, answers=30, readers=10)
        counts = (r.readers, r.events, r.lost, r.doubled, r.disordered, r.waiting)
        cells = (fault.name, *counts, r.completed, r.failed, r.note)
        print("|", " | ".join(map(str, cells)), "|", flush=True)
        bad = bad or r.bad
    return int(bad)


if __name__ == "__main__":
    sys.exit(main())
