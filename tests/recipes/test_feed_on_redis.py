"""recipes/feed.py on Redis: two servers, one log; Redis, or the way to it, breaks in every way."""

import signal
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import requests

from recipes.feed import KEEP, RedisLog
from tests.support.event_sources import EventSource, EventSources, event_sources
from tests.support.feed import numbers, publish
from tests.support.processes import LIMIT, Process, Start, wait_for
from tests.support.recipes import start_recipe
from tests.support.redis_server import BadLine, RedisServer, running_redis


@pytest.fixture
def redis(tmp_path: Path) -> Iterator[RedisServer]:
    with running_redis(tmp_path) as server:
        yield server


@pytest.fixture
def readers() -> Iterator[EventSources]:
    with event_sources() as sources:
        yield sources


def serve(start: Start, tmp_path: Path, port: int) -> Process:
    """Start a server whose Redis is called at `port`."""
    return start_recipe(start, "recipes.feed", tmp_path, REDIS_URL=f"redis://127.0.0.1:{port}")


def wait_for_data(sources: Iterable[EventSource], count: int) -> None:
    wait_for(lambda: all(len(source.data) >= count for source in sources), f"{count} events")


def post(server: Process, text: str) -> requests.Response:
    return requests.post(f"{server.url}/feed", json={"data": text}, timeout=LIMIT)


def test_two_servers_have_one_log(
    start: Start, tmp_path: Path, redis: RedisServer, readers: EventSources
) -> None:
    servers = [serve(start, tmp_path, redis.port) for _ in range(2)]
    crowd = [source for server in servers for source in readers.open(server.port, 10)]
    ids = [publish(servers[number % 2], str(number))[0] for number in range(20)]
    wait_for_data(crowd, 20)
    for source in crowd:
        assert source.data == numbers(0, 20)
        assert [event.id for event in source.events] == ids
    # Whoever was on one goes on with the other, and with one that has just been started.
    for server in (*servers, serve(start, tmp_path, redis.port)):
        (source,) = readers.open(server.port, last_event_id=ids[9])
        wait_for_data([source], 10)
        assert [event.id for event in source.events] == ids[10:]


def test_two_connections_for_each_server(
    start: Start, tmp_path: Path, redis: RedisServer, readers: EventSources
) -> None:
    server = serve(start, tmp_path, redis.port)
    crowd = readers.open(server.port, 100)
    with ThreadPoolExecutor(100) as pool:
        posts = [pool.submit(post, server, str(number)) for number in range(100)]
        while not all(p.done() for p in posts):
            assert redis.connections() <= 2
            time.sleep(0.01)
    assert {p.result().status_code for p in posts} == {201}
    wait_for_data(crowd, 100)
    assert redis.connections() == 2
    for source in crowd:
        assert source.data == crowd[0].data
        assert sorted(source.data) == sorted(numbers(0, 100))


def test_redis_is_killed_and_started_again(
    start: Start, tmp_path: Path, redis: RedisServer, readers: EventSources
) -> None:
    servers = [serve(start, tmp_path, redis.port) for _ in range(2)]
    crowd = [source for server in servers for source in readers.open(server.port, 10)]
    publish(servers[0], *numbers(0, 5))
    publish(servers[1], *numbers(5, 10))
    redis.kill()
    for server in servers:
        answer = post(server, "lost")
        assert answer.status_code == 503
        assert answer.json() == {
            "detail": "The log is away: not known to be published, it may still appear."
        }
        assert answer.headers["retry-after"] == "1"
        server.wait_for_log("Redis is away, the readers wait for it: .")
    redis.start()
    # Each has a connection that broke while nobody used it.
    publish(servers[0], "10")
    publish(servers[1], "11")
    wait_for_data(crowd, 12)
    for source in crowd:
        assert source.data == numbers(0, 12)
        assert not source.gaps
        assert source.opened == 1


def test_redis_is_stalled(
    start: Start, tmp_path: Path, redis: RedisServer, readers: EventSources
) -> None:
    server = serve(start, tmp_path, redis.port)
    crowd = readers.open(server.port, 10)
    publish(server, "before")
    redis.signal(signal.SIGSTOP)
    with ThreadPoolExecutor(20) as pool:
        answers = [*pool.map(lambda number: post(server, f"stalled {number}"), range(20))]
    assert {answer.status_code for answer in answers} == {503}  # and not a word from Redis yet
    server.wait_for_log("Redis is away")
    redis.signal(signal.SIGCONT)
    server.wait_for_log("Redis is back")
    publish(server, "after")
    wait_for(lambda: all("after" in source.data for source in crowd), "the last event")
    published = [fields["data"] for _, fields in redis.client.xrange(RedisLog.KEY)]
    for source in crowd:
        assert source.data == published
        assert source.opened == 1
        assert not source.gaps
    assert len(set(published)) == len(published)


def test_the_line_to_redis_falls_silent(
    start: Start, tmp_path: Path, redis: RedisServer, readers: EventSources
) -> None:
    line = BadLine(redis.port)
    cut_off, other = (serve(start, tmp_path, port) for port in (line.port, redis.port))
    crowd = readers.open(cut_off.port, 10)
    publish(cut_off, "1")
    publish(other, "2")
    line.silence()
    publish(other, "3")
    assert post(cut_off, "lost").status_code == 503
    publish(cut_off, "4")
    wait_for_data(crowd, 4)
    assert all(source.data == numbers(1, 5) for source in crowd)
    assert all(source.opened == 1 for source in crowd)


def test_nothing_is_put_in_twice(start: Start, tmp_path: Path, redis: RedisServer) -> None:
    line = BadLine(redis.port)
    server = serve(start, tmp_path, line.port)
    publish(server, "1")
    line.cut_answer_to = b"XADD"
    assert post(server, "2").status_code == 503
    publish(server, "3")
    published = [fields["data"] for _, fields in redis.client.xrange(RedisLog.KEY)]
    assert published == ["1", "2", "3"]


@pytest.mark.parametrize(("published", "left"), [(KEEP, KEEP), (KEEP + 1, KEEP), (20, 5), (20, 0)])
def test_what_redis_trimmed_meanwhile(
    start: Start,
    tmp_path: Path,
    redis: RedisServer,
    readers: EventSources,
    published: int,
    left: int,
) -> None:
    """While a server is away from Redis, more is published than is kept, or somebody trims it."""
    line = BadLine(redis.port)
    cut_off, other = (serve(start, tmp_path, port) for port in (line.port, redis.port))
    crowd = readers.open(cut_off.port, 5)
    publish(cut_off, "a", "b")
    wait_for_data(crowd, 2)
    line.break_off()
    publish(other, *numbers(0, published))
    if left < KEEP:
        redis.client.xtrim(RedisLog.KEY, maxlen=left, approximate=False)
    line.mend()
    cut_off.wait_for_log("Redis is back")
    publish(cut_off, "z")
    wait_for(lambda: all("z" in source.data for source in crowd), "the last event")
    for source in crowd:
        assert source.data == ["a", "b", *numbers(published - left, published), "z"]
        assert len(source.gaps) == (0 if left == published else 1)
        assert source.opened == 1
    # Who comes now with an id from before is told as well.
    (source,) = readers.open(cut_off.port, last_event_id=crowd[0].events[1].id)
    wait_for(lambda: "z" in source.data, "the last event")
    assert source.events[0].name == "gap"


def test_an_id_that_is_ahead_of_this_server(
    start: Start, tmp_path: Path, redis: RedisServer, readers: EventSources
) -> None:
    line = BadLine(redis.port)
    behind, other = (serve(start, tmp_path, port) for port in (line.port, redis.port))
    (waiting,) = readers.open(behind.port)
    publish(behind, "0")
    wait_for(lambda: waiting.data, "an event")
    line.break_off()
    ids = publish(other, *numbers(1, 5))
    moved = [readers.open(behind.port, last_event_id=event_id)[0] for event_id in ids]
    line.mend()
    publish(other, *numbers(5, 7))
    for place, source in enumerate(moved, 2):
        wait_for_data([source], 7 - place)
        assert source.data == numbers(place, 7)
        assert not source.gaps
    wait_for(lambda: "6" in waiting.data, "the last event")
    assert waiting.data == numbers(0, 7)


def test_a_server_that_starts_before_redis(
    start: Start, tmp_path: Path, redis: RedisServer, readers: EventSources
) -> None:
    first = serve(start, tmp_path, redis.port)
    ids = publish(first, *numbers(0, 3))
    redis.kill()
    server = serve(start, tmp_path, redis.port)
    (new,) = readers.open(server.port)
    (back,) = readers.open(server.port, last_event_id=ids[0])
    server.wait_for_log("Redis is away")
    redis.start()
    wait_for(lambda: new.last_event_id, "the log")
    publish(first, "3")
    wait_for(lambda: new.data and len(back.data) == 3, "all events")
    assert new.data == ["3"]
    assert back.data == numbers(1, 4)
    assert not new.gaps + back.gaps


def test_an_id_that_redis_has_lost(
    start: Start, tmp_path: Path, redis: RedisServer, readers: EventSources
) -> None:
    """A server that has just started cannot know what else was lost."""
    for event_id in ("1-0", "2-0", "4-0"):
        redis.client.xadd(RedisLog.KEY, {"data": event_id}, id=event_id)
    server = serve(start, tmp_path, redis.port)
    asked = [readers.open(server.port, last_event_id=f"{n}-0")[0] for n in range(1, 5)]
    publish(server, "new")
    wait_for(lambda: all("new" in source.data for source in asked), "the last event")
    assert [source.data[:-1] for source in asked] == [["2-0", "4-0"], ["4-0"], ["4-0"], []]
    assert [len(source.gaps) for source in asked] == [0, 0, 1, 0]


def test_what_others_put_into_the_stream(
    start: Start, tmp_path: Path, redis: RedisServer, readers: EventSources
) -> None:
    server = serve(start, tmp_path, redis.port)
    (source,) = readers.open(server.port)
    for fields in ({"data": b"\xff\r\nid: 5"}, {"other": "field"}, {"data": "fine", "more": "x"}):
        redis.client.xadd(RedisLog.KEY, fields)
    wait_for(lambda: "fine" in source.data, "the last event")
    assert source.data == ["\ufffd\nid: 5", "", "fine"]


def test_redis_has_something_else_there(
    start: Start, tmp_path: Path, redis: RedisServer, readers: EventSources
) -> None:
    redis.client.set(RedisLog.KEY, "text")
    server = serve(start, tmp_path, redis.port)
    (source,) = readers.open(server.port)
    server.wait_for_log("Redis is away, the readers wait for it: .*WRONGTYPE")
    assert post(server, "x").status_code == 503
    redis.client.delete(RedisLog.KEY)
    wait_for(lambda: source.last_event_id, "the log")
    publish(server, "y")
    wait_for(lambda: source.data, "an event")
