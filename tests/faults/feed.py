"""The faults of recipes/feed.py: what gets lost, comes twice, or in another order.

Run `python -m tests.faults.feed`: seven minutes. It prints a Markdown table.

Numbered events are posted all the time, in three channels and at both servers in turn. Readers do
as an EventSource does. Lost is an event whose POST was answered with 201, and that a reader neither
got nor was told of. An event whose POST failed may be there, but not twice.
"""

import argparse
import gc
import itertools
import random
import shutil
import signal
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import requests

from recipes.feed import KEEP
from tests.support.event_sources import EventSource, EventSources, event_sources
from tests.support.feed import publish
from tests.support.processes import ENVIRONMENT, LIMIT, Process, free_port, wait_for
from tests.support.proxies import command, deployed
from tests.support.raw_reader import many_descriptors
from tests.support.redis_server import BadLine, RedisServer, running_redis

SETTLE = 1.0  # seconds of posting before and after a fault
CHANNELS = ("scores", "user:7", "price.A")


# The servers, who publishes, and what the readers got ---------------------------------------------


@dataclass
class Setting:
    """Servers on one Redis, or one in memory; who reads, and who publishes."""

    folder: Path
    stack: ExitStack
    servers: list[Process]
    sources: EventSources
    redis: RedisServer | None = None
    lines: list[BadLine] = field(default_factory=list)  # of each server to Redis
    ports: list[int] = field(default_factory=list)  # where the readers and the publisher go
    crowd: list[EventSource] = field(default_factory=list)

    def read(self, readers: int, **options: int) -> None:
        """Let so many read, each one of the channels."""
        each = max(1, readers // len(self.ports) // len(CHANNELS))
        for port, channel in itertools.product(self.ports, CHANNELS):
            self.crowd += self.sources.open(port, each, path=f"/feed/{channel}", **options)
        wait_for(lambda: all(source.last_event_id for source in self.crowd), "the log")


def serve(folder: Path, redis_port: int = 0) -> Process:
    port = free_port()
    # With a middleware that fails for readers whose address has `?last=1`.
    words = [sys.executable, "-m", "uvicorn", "tests.support.feed_apps:limits", "--factory"]
    words.append("--no-access-log")
    environment = dict(ENVIRONMENT)
    if redis_port:
        environment["REDIS_URL"] = f"redis://127.0.0.1:{redis_port}"
    log = folder / f"server-{port}.log"
    return Process([*words, "--port", str(port)], log, port, env=environment)


@contextmanager
def setting(redis: bool = True, nginx: bool = False) -> Iterator[Setting]:
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        result = Setting(folder, stack, [], stack.enter_context(event_sources()))
        if redis:
            result.redis = stack.enter_context(running_redis(folder))
            result.lines = [BadLine(result.redis.port) for _ in range(2)]
        for port in [line.port for line in result.lines] or [0]:
            result.servers.append(serve(folder, port))
            stack.callback(result.servers[-1].kill)
        result.ports = [server.port for server in result.servers]
        if nginx:
            port = free_port()
            third = "        server 127.0.0.1:8003 max_fails=0;\n"
            config = deployed("nginx", port, result.ports, folder, {third: ""})
            proxy = Process(command("nginx", config), folder / "nginx.log", port)
            stack.callback(proxy.kill)
            result.ports = [port]
        yield result


class Publisher:
    """Posts numbers, all the time, until the end of its block."""

    def __init__(self, ports: list[int], rate: float, size: int) -> None:
        self.ports, self.rate, self.size = ports, rate, size
        self.ids: dict[str, str] = {}  # of what was answered with 201, by its text
        self.sent: dict[str, float] = {}  # when, by its text
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
                wait = start + number / self.rate - time.monotonic()
                if self.stopped.wait(max(0.0, wait)):
                    return
                self.posting.wait()
                text = f"{number} in {CHANNELS[number % 3]}".ljust(self.size, ".")
                pool.submit(self.publish, text, self.ports[number // 3 % len(self.ports)])

    def publish(self, text: str, port: int) -> None:
        url = f"http://127.0.0.1:{port}/feed/{channel_of(text)}"
        self.lives[text] = self.life
        self.sent[text] = time.monotonic()
        try:
            answer = requests.post(url, json={"data": text}, timeout=LIMIT)
        except requests.RequestException:
            return  # nobody listens there at the moment
        if answer.status_code == 201:
            self.ids[text] = answer.json()["id"]
        elif answer.status_code == 503:
            self.refused.append(time.monotonic() - self.sent[text])

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
    return text.rstrip(".").rpartition(" in ")[2]


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
    assert it.redis
    it.redis.kill()
    time.sleep(2)
    it.redis.start()
    return refused(it, publisher)


def stall_redis(it: Setting, publisher: Publisher) -> str:
    assert it.redis
    it.redis.signal(signal.SIGSTOP)
    time.sleep(10)
    it.redis.signal(signal.SIGCONT)
    return refused(it, publisher)


def refused(it: Setting, publisher: Publisher) -> str:
    """Publishing works again; how was it meanwhile?"""
    assert it.redis
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


def trim(it: Setting, publisher: Publisher) -> str:
    """A server is away from Redis while more is published than is kept."""
    it.lines[0].break_off()
    texts = [f"extra {number} in {CHANNELS[0]}" for number in range(KEEP + 500)]
    publisher.lives |= dict.fromkeys(texts, 0)
    ids = publish(it.servers[1], *texts, path=f"/feed/{CHANNELS[0]}")
    publisher.ids |= zip(texts, ids, strict=True)
    it.lines[0].mend()
    return ""


def fail_over(it: Setting, publisher: Publisher) -> str:
    """The address leads to the replica, which is the primary now. The old one keeps connections."""
    assert it.redis
    other = it.stack.enter_context(running_redis(it.folder))
    other.client.replicaof("127.0.0.1", it.redis.port)
    wait_for(lambda: other.client.info()["master_link_status"] == "up", "the replica")
    with publisher.losing_all():  # what the replica has not got yet would be lost
        publisher.life -= 1
        other.client.replicaof("NO", "ONE")
        for line in it.lines:
            line.to = other.port
        it.redis.client.replicaof("127.0.0.1", other.port)
    return refused(it, publisher)


def lose_the_data(it: Setting, publisher: Publisher) -> str:
    assert it.redis
    with publisher.losing_all():
        it.redis.kill()
        shutil.rmtree(it.folder / "appendonlydir")
        it.redis.start()
    return refused(it, publisher)


def turn_the_clock_back(it: Setting, publisher: Publisher) -> str:
    """All ids that were given are above those that will be."""
    assert it.redis
    for channel in CHANNELS:
        text = f"ahead in {channel}"
        event_id = f"{int(time.time() + 3600) * 1000}-0"
        publisher.lives[text] = 0
        publisher.ids[text] = it.redis.client.xadd(f"feed:{channel}", {"data": text}, id=event_id)
    time.sleep(2 * SETTLE)
    with publisher.losing_all():
        it.redis.client.flushall()
    return refused(it, publisher)


def take_nothing(it: Setting, publisher: Publisher) -> str:
    assert it.redis
    for setting, bad, good in (("min-replicas-to-write", 1, 0), ("maxmemory", 1, 0)):
        it.redis.client.config_set(setting, bad)
        time.sleep(3)
        it.redis.client.config_set(setting, good)
    return refused(it, publisher)


def fail_in_one_reader(it: Setting, publisher: Publisher) -> str:
    (bad,) = it.sources.open(it.ports[0], path=f"/feed/{CHANNELS[0]}?last=1")
    wait_for(lambda: bad.opened > 5, "the bad reader to fail five times")
    return f"it failed {bad.cut} times; {refused(it, publisher)}"


def trouble_readers(it: Setting, _: Publisher) -> str:
    """At random they read nothing for a while, short or long, or leave and come back."""
    dice = random.Random(1)
    paused: list[tuple[float, EventSource]] = []
    end = time.monotonic() + 8
    left = 0
    while time.monotonic() < end:
        for source in dice.sample(it.crowd, max(1, len(it.crowd) // 20)):
            if dice.random() < 0.5:
                it.sources.reset(source)
                left += 1
            else:
                it.sources.pause(source)
                paused.append((time.monotonic() + dice.choice([0.1, 1, 7]), source))
        time.sleep(0.1)
        for pause in [pause for pause in paused if pause[0] < time.monotonic()]:
            it.sources.pause(pause[1], False)
            paused.remove(pause)
    for pause in paused:
        it.sources.pause(pause[1], False)
    return f"{left} times a reader left"


def stop_reading(it: Setting, publisher: Publisher) -> str:
    """One reader reads nothing; are the others late?"""
    *others, slow = it.crowd

    def late(start: float, end: float) -> float:
        """p99 in ms, from publishing to delivery."""
        times = [
            came - publisher.sent[event.data]
            for source in others
            for event, came in zip(source.events, source.times, strict=True)
            if start < came < end
        ]
        return 1000 * statistics.quantiles(times, n=100)[-1]

    fill = KEEP / publisher.rate * len(CHANNELS)  # seconds
    time.sleep(fill)
    memory = psutil.Process(it.servers[0].pid).memory_info()
    then = time.monotonic()
    it.sources.pause(slow)
    time.sleep(2 * fill)
    now = time.monotonic()
    without, with_it = late(0, then), late(then, now)
    more = psutil.Process(it.servers[0].pid).memory_info().rss - memory.rss
    it.sources.pause(slow, False)
    return (
        f"to the others p99 {with_it:.0f} ms, before that {without:.0f} ms; "
        f"{more / 1e6:.1f} MB more memory"
    )


def count_connections(it: Setting, publisher: Publisher) -> str:
    assert it.redis
    most = 0
    texts = [f"side by side {number} in {CHANNELS[0]}" for number in range(500)]
    publisher.lives |= dict.fromkeys(texts, 0)
    with ThreadPoolExecutor(100) as pool:
        url = f"{it.servers[0].url}/feed/{CHANNELS[0]}"
        posts = [
            pool.submit(requests.post, url, json={"data": texts[number]}) for number in range(500)
        ]
        while not all(post.done() for post in posts):
            most = max(most, it.redis.connections())
            time.sleep(0.01)
    answers = {text: post.result() for text, post in zip(texts, posts, strict=True)}
    taken = {text: answer for text, answer in answers.items() if answer.status_code == 201}
    publisher.ids |= {text: answer.json()["id"] for text, answer in taken.items()}
    refused = len(texts) - len(taken)
    return f"{most} connections to Redis by two servers, {refused} refused"


@dataclass(frozen=True)
class Fault:
    name: str
    strike: Callable[[Setting, Publisher], str]
    redis: bool = True
    nginx: bool = False
    rate: float = 20.0
    size: int = 0  # of an event, in bytes
    most: int = 10_000  # readers
    receive_buffer: int = 0
    one_more: bool = False  # a reader with a small receive buffer


FAULTS = [
    Fault("`kill -9` of a server", kill_a_server),
    Fault("rolling restart behind nginx", restart_one_after_the_other, nginx=True),
    Fault("Redis killed, started again (`appendfsync always`)", kill_redis),
    Fault("Redis stalled for 10 s", stall_redis),
    Fault("the line from a server to Redis falls silent", silence),
    Fault("Redis trims what a server has not read", trim),
    Fault("failover behind one address, the old primary is read-only", fail_over),
    Fault("Redis comes back without its data", lose_the_data),
    Fault("the same, and its clock is behind", turn_the_clock_back),
    Fault("Redis is read-only for 3 s, then full for 3 s", take_nothing),
    Fault("an exception in one reader, again and again", fail_in_one_reader),
    Fault("500 POSTs, 100 side by side", count_connections),
    Fault(
        "readers leave, come back and read slowly",
        trouble_readers,
        redis=False,
        rate=200,
        size=8000,
        most=60,
        receive_buffer=4096,
    ),
    Fault(
        "a reader reads nothing",
        stop_reading,
        redis=False,
        rate=100,
        size=4000,
        most=60,
        one_more=True,
    ),
]


def run(fault: Fault, readers: int) -> Result:
    """Let the readers read, strike in mid-stream, and see what they got."""
    with setting(fault.redis, fault.nginx) as it:
        it.read(min(readers, fault.most), receive_buffer=fault.receive_buffer)
        if fault.one_more:
            it.read(1, receive_buffer=4096)
        with Publisher(it.ports, fault.rate, fault.size) as publisher:
            time.sleep(SETTLE)
            note = fault.strike(it, publisher)
            time.sleep(SETTLE)
        result = look(it, publisher)
        result.note = note
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
                seen = run(fault, arguments.readers)
                counts = (seen.readers, seen.events, seen.lost, seen.doubled, seen.disordered)
                print("|", " | ".join(map(str, (fault.name, *counts, seen.gaps, seen.note))), "|")
                sys.stdout.flush()
                failed = failed or seen.failed
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
