"""The faults of recipes/feed.py: what gets lost, comes twice, or in another order.

Run `python -m tests.faults.feed`: five minutes. It prints a Markdown table.

Numbered events are posted all the time, in three channels and at both servers in turn. Readers do
as an EventSource does. Lost is an event whose POST was answered with 201, and that a reader neither
got nor was told of. An event whose POST failed may be there, but not twice.
"""

import argparse
import gc
import itertools
import json
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import requests

from tests.support.event_sources import EventSource, EventSources, event_sources
from tests.support.processes import LIMIT, Process, free_port, start_app, starting, wait_for
from tests.support.proxies import command, deployed
from tests.support.raw_reader import many_descriptors
from tests.support.redis_server import BadLine, RedisServer, running_redis

RATE = 20.0  # events a second
SETTLE = 1.0  # seconds of posting before and after a fault
STALL, REFUSE = 10.0, 3.0  # seconds
CHANNELS = ("scores", "user:7", "price.A")


# The servers, who publishes, and what the readers got ---------------------------------------------


@dataclass
class Setting:
    """Two servers on one Redis; who reads, and who publishes."""

    folder: Path
    stack: ExitStack
    redis: RedisServer
    lines: list[BadLine]  # of each server to Redis
    servers: list[Process]
    ports: list[int]  # where the readers and the publisher go
    sources: EventSources
    crowd: list[EventSource] = field(default_factory=list)


@contextmanager
def setting(readers: int, nginx: bool, constants: dict[str, float]) -> Iterator[Setting]:
    """Let so many read, each one of the channels."""
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        start = stack.enter_context(starting(folder))
        redis = stack.enter_context(running_redis(folder))
        lines = [BadLine(redis.port) for _ in range(2)]
        servers = [
            start_app(
                start,
                # Its middleware fails for readers whose address has `?last=1`.
                "tests.support.feed_apps:app",
                "--no-access-log",
                REDIS_URL=f"redis://127.0.0.1:{line.port}",
                CONSTANTS=json.dumps(constants),
            )
            for line in lines
        ]
        ports = [server.port for server in servers]
        if nginx:
            port = free_port()
            third = "        server 127.0.0.1:8003 max_fails=0;\n"
            config = deployed("nginx", port, ports, folder, {third: ""})
            ports = [start(*command("nginx", config), port=port).port]
        sources = stack.enter_context(event_sources())
        it = Setting(folder, stack, redis, lines, servers, ports, sources)
        each = max(1, readers // len(ports) // len(CHANNELS))
        for port, channel in itertools.product(ports, CHANNELS):
            it.crowd += sources.open(port, each, path=f"/feed/{channel}")
        wait_for(lambda: all(source.last_event_id for source in it.crowd), "the log")
        yield it


class Publisher:
    """Posts numbers, all the time, until the end of its block."""

    def __init__(self, ports: list[int]) -> None:
        self.ports = ports
        self.ids: dict[str, str] = {}  # of what was answered with 201, by its text
        self.lives: dict[str, int] = {}  # how often the log had lost its data by then
        self.life = 0
        self.refused: list[float] = []  # seconds until a POST was answered with 503
        self.stopped, self.posting = threading.Event(), threading.Event()
        self.posting.set()
        self.thread = threading.Thread(target=self.run)

    def __enter__(self) -> "Publisher":
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stopped.set()
        self.posting.set()
        self.thread.join()

    def run(self) -> None:
        start = time.monotonic()
        with ThreadPoolExecutor(100) as pool:
            for number in itertools.count():
                wait = start + number / RATE - time.monotonic()
                if self.stopped.wait(max(0.0, wait)):
                    return
                self.posting.wait()
                text = f"{number} in {CHANNELS[number % 3]}"
                pool.submit(self.publish, text, self.ports[number // 3 % len(self.ports)])

    def publish(self, text: str, port: int) -> None:
        url = f"http://127.0.0.1:{port}/feed/{channel_of(text)}"
        self.lives[text] = self.life
        sent = time.monotonic()
        try:
            answer = requests.post(url, json={"data": text}, timeout=LIMIT)
        except requests.RequestException:
            return  # nobody listens there at the moment
        if answer.status_code == 201:
            self.ids[text] = answer.json()["id"]
        elif answer.status_code == 503:
            self.refused.append(time.monotonic() - sent)

    @contextmanager
    def losing_all(self) -> Iterator[None]:
        """Nothing is posted while the log loses its data. What comes then is in a new life."""
        self.posting.clear()
        time.sleep(1)
        yield
        self.life += 1
        self.posting.set()

    def order(self, text: str, event_id: str) -> tuple[int, ...]:
        """Ids are in order as long as the log is not lost."""
        return (self.lives[text], *map(int, event_id.split("-")))


def channel_of(text: str) -> str:
    return text.rpartition(" in ")[2]


@dataclass
class Result:
    readers: int
    events: int
    lost: int = 0
    doubled: int = 0
    disordered: int = 0
    gaps: int = 0
    note: str = ""

    @property
    def failed(self) -> bool:
        return bool(self.lost or self.doubled or self.disordered)


def look(it: Setting, publisher: Publisher) -> Result:
    """Wait until all have the last event, and see what each of them got."""
    order, known = publisher.order, {**publisher.ids}
    of = {
        name: {order(text, known[text]): text for text in known if channel_of(text) == name}
        for name in CHANNELS
    }
    end = time.monotonic() + LIMIT
    while time.monotonic() < end and not all(
        of[source.path.rpartition("/")[2]][max(of[source.path.rpartition("/")[2]])]
        in source.data[-200:]
        for source in it.crowd
    ):
        time.sleep(0.05)
    result = Result(len(it.crowd), len(known))
    for source in it.crowd:
        missing, told = {*of[source.path.rpartition("/")[2]]}, False
        before: tuple[int, ...] = (-1,)
        for event in source.events:
            if event.name == "gap":
                result.gaps += 1
                told = True
                continue
            place = order(event.data, event.id)
            if told:
                missing = {each for each in missing if not before < each < place}
            result.disordered += place < before
            missing.discard(place)
            before, told = place, False
        result.lost += len(missing)
        result.doubled += len(source.data) - len(set(source.data))
    return result


# The faults ---------------------------------------------------------------------------------------


def kill_a_server(it: Setting, _: Publisher) -> str:
    it.servers[0].kill()
    time.sleep(1)
    it.servers[0].start()
    return ""


def restart_one_after_the_other(it: Setting, _: Publisher) -> str:
    for server in it.servers:
        server.signal(signal.SIGTERM)
        server.wait()
        server.start()
    cut = sum(source.cut for source in it.crowd)
    return f"{cut} streams cut without their proper end"


def kill_redis(it: Setting, publisher: Publisher) -> str:
    it.redis.kill()
    time.sleep(2)
    it.redis.start()
    return refused(it, publisher)


def stall_redis(it: Setting, publisher: Publisher) -> str:
    it.redis.signal(signal.SIGSTOP)
    time.sleep(STALL)
    it.redis.signal(signal.SIGCONT)
    return refused(it, publisher)


def refused(it: Setting, publisher: Publisher) -> str:
    """Publishing works again; how was it meanwhile?"""
    known = len(publisher.ids)
    wait_for(lambda: len(publisher.ids) > known + 5, "events to be published again")
    stayed = sum(source.opened == 1 for source in it.crowd)
    slowest = max(publisher.refused, default=0)
    return f"{stayed} readers stayed; each 503 within {slowest:.1f} s"


def silence(it: Setting, publisher: Publisher) -> str:
    """The line between one server and Redis passes nothing; a new connection would work."""
    crowd = it.crowd[: len(it.crowd) // 2]
    it.lines[0].silence()
    time.sleep(0.2)  # what is on its way
    then = time.monotonic()
    wait_for(
        lambda: all(source.times and source.times[-1] > then for source in crowd),
        "events on the new connection",
    )
    noticed = time.monotonic() - then
    return f"its readers went on after {noticed:.1f} s; {refused(it, publisher)}"


def fail_over(it: Setting, publisher: Publisher) -> str:
    """The address leads to the replica, which is the primary now. The old one keeps connections."""
    other = it.stack.enter_context(running_redis(it.folder))
    other.client.replicaof("127.0.0.1", it.redis.port)
    wait_for(lambda: other.client.info()["master_link_status"] == "up", "the replica")
    with publisher.losing_all():  # what the replica has not got yet would be lost
        publisher.life -= 1
        other.client.replicaof("NO", "ONE")
        for line in it.lines:
            line.to = other.port
        it.redis.client.replicaof("127.0.0.1", other.port)
    bells = len(it.servers)
    wait_for(lambda: len(other.client.client_list(_type="pubsub")) == bells, "the bells to move")
    return refused(it, publisher)


def lose_the_data(it: Setting, publisher: Publisher) -> str:
    with publisher.losing_all():
        it.redis.kill()
        shutil.rmtree(it.folder / "appendonlydir")
        it.redis.start()
    return refused(it, publisher)


def turn_the_clock_back(it: Setting, publisher: Publisher) -> str:
    """All ids that were given are above those that will be."""
    for channel in CHANNELS:
        text = f"ahead in {channel}"
        event_id = f"{int(time.time() + 3600) * 1000}-0"
        publisher.lives[text] = publisher.life
        publisher.ids[text] = it.redis.client.xadd(f"feed:{channel}", {"data": text}, id=event_id)
    time.sleep(2 * SETTLE)
    with publisher.losing_all():
        it.redis.client.flushall()
    return refused(it, publisher)


def take_nothing(it: Setting, publisher: Publisher) -> str:
    for setting, bad, good in (("min-replicas-to-write", 1, 0), ("maxmemory", 1, 0)):
        it.redis.client.config_set(setting, bad)
        time.sleep(REFUSE)
        it.redis.client.config_set(setting, good)
    return refused(it, publisher)


def fail_in_one_reader(it: Setting, publisher: Publisher) -> str:
    (bad,) = it.sources.open(it.ports[0], path=f"/feed/{CHANNELS[0]}?last=1")
    wait_for(lambda: bad.opened > 5, "the bad reader to fail five times")
    it.sources.close([bad])
    return f"it failed {bad.cut} times; {refused(it, publisher)}"


Strike = Callable[[Setting, Publisher], str]


@dataclass(frozen=True)
class Fault:
    name: str
    strike: Strike
    nginx: bool = False


FAULTS = [
    Fault("`kill -9` of a server", kill_a_server),
    Fault("rolling restart behind nginx", restart_one_after_the_other, nginx=True),
    Fault("Redis killed, started again (`appendfsync always`)", kill_redis),
    Fault("Redis stalled for 10 s", stall_redis),
    Fault("the line from a server to Redis falls silent", silence),
    Fault("failover behind one address, the old primary is read-only", fail_over),
    Fault("Redis comes back without its data", lose_the_data),
    Fault("the same, and its clock is behind", turn_the_clock_back),
    Fault("Redis is read-only for 3 s, then full for 3 s", take_nothing),
    Fault("an exception in one reader, again and again", fail_in_one_reader),
]


def run(readers: int, *faults: Fault, **constants: float) -> Result:
    """Let the readers read, strike in mid-stream, and see what they got."""
    nginx = any(fault.nginx for fault in faults)
    with setting(readers, nginx, constants) as it:
        with Publisher(it.ports) as publisher:
            notes = []
            for fault in faults:
                time.sleep(SETTLE)
                notes.append(fault.strike(it, publisher))
            time.sleep(SETTLE)
        result = look(it, publisher)
        result.note = "; ".join(notes)
        return result


HEAD = (
    "| fault | readers | events | lost | doubled | out of order | gaps told | also seen |\n"
    "| --- | ---: | ---: | ---: | ---: | ---: | ---: | --- |"
)


def main() -> int:
    """Print the table; return 1 if an event was lost, doubled or out of order."""
    parser = argparse.ArgumentParser(description="Make the table of faults of recipes/feed.py.")
    parser.add_argument("--readers", type=int, default=1000, help="on both servers together")
    parser.add_argument("--only", default="", help="only faults whose name has this in it")
    arguments = parser.parse_args()
    failed = False
    gc.disable()  # it would look through millions of events, and who looks does not read
    print(HEAD)
    with many_descriptors(4 * arguments.readers + 200):
        for fault in FAULTS:
            if arguments.only in fault.name:
                seen = run(arguments.readers, fault)
                counts = (seen.readers, seen.events, seen.lost, seen.doubled, seen.disordered)
                print("|", " | ".join(map(str, (fault.name, *counts, seen.gaps, seen.note))), "|")
                sys.stdout.flush()
                failed = failed or seen.failed
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
