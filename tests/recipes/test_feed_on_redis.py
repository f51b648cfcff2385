"""recipes/feed.py on Redis: two servers, one log; Redis, or the way to it, breaks in every way."""

import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import count
from pathlib import Path

import psutil
import pytest
import requests

from recipes.common import connect_to_redis
from recipes.feed import KEEP
from tests.support.event_sources import EventSource, event_sources
from tests.support.event_sources import EventSources as Readers
from tests.support.feed import numbers, publish
from tests.support.processes import LIMIT, Process, Start, free_port, need, wait_for
from tests.support.recipes import start_changed
from tests.support.redis_server import BadLine, running_redis
from tests.support.redis_server import RedisServer as Redis

KEY = "feed:goals"


@pytest.fixture
def redis(tmp_path: Path) -> Iterator[Redis]:
    with running_redis(tmp_path) as server:
        yield server


@pytest.fixture
def readers() -> Iterator[Readers]:
    with event_sources() as sources:
        yield sources


Serve = Callable[..., Process]


@pytest.fixture
def serve(start: Start) -> Serve:
    """`serve(port)` starts a server whose Redis is called at that port, or at that address."""

    def serve(redis: int | str, **constants: float) -> Process:
        url = redis if isinstance(redis, str) else f"redis://127.0.0.1:{redis}"
        return start_changed(start, "feed", REDIS_URL=url, **constants)

    return serve


def wait_for_data(sources: Iterable[EventSource], count: int) -> None:
    wait_for(lambda: all(len(source.data) >= count for source in sources), f"{count} events")


def post(server: Process, text: str) -> requests.Response:
    return requests.post(f"{server.url}/feed/goals", json={"data": text}, timeout=LIMIT)


def test_many_posts_when_redis_is_far_away(serve: Serve, redis: Redis, readers: Readers) -> None:
    """One after the other, they would take 25 seconds; Redis has four. None is put in twice."""
    line = BadLine(redis.port)
    server = serve(line.port)
    crowd = readers.open(server.port, 3)
    line.cut_answer_to = b"XADD"
    assert post(server, "no answer").status_code == 503
    line.delay = 0.25
    with ThreadPoolExecutor(50) as pool:
        answers = [*pool.map(lambda number: post(server, str(number)), range(50))]
    assert {answer.status_code for answer in answers} == {201}
    wait_for_data(crowd, 51)
    published = [fields["data"] for _, fields in redis.client.xrange(KEY) if "data" in fields]
    assert sorted(published) == sorted([*numbers(0, 50), "no answer"])
    # None of them has seen a gap, or the end of its connection.
    assert all((s.data, s.gaps, s.opened) == (published, [], 1) for s in crowd)
    assert redis.connections() <= 3


@pytest.mark.parametrize(("published", "left"), [(KEEP, KEEP), (KEEP + 1, KEEP), (20, 0)])
def test_what_redis_trimmed_meanwhile(
    serve: Serve, redis: Redis, readers: Readers, published: int, left: int
) -> None:
    """While a server is away from Redis, more is published than is kept, or somebody trims it."""
    line = BadLine(redis.port)
    cut_off, other = (serve(port) for port in (line.port, redis.port))
    crowd = readers.open(cut_off.port, 5)
    publish(cut_off, "a", "b")
    wait_for_data(crowd, 2)
    line.break_off()
    publish(other, *numbers(0, published))
    if left < KEEP:
        redis.client.xtrim(KEY, maxlen=left, approximate=False)
    line.mend()
    wait_for(lambda: all(len(s.data) == 2 + left or s.gaps for s in crowd), "what was missed")
    publish(cut_off, "z")
    wait_for(lambda: all("z" in source.data for source in crowd), "the last event")
    for source in crowd:
        assert source.data == ["a", "b", *numbers(published - left, published), "z"]
        assert len(source.gaps) == (0 if left == published else 1)
        assert source.opened == 1
    # A new reader with an id from before gets the gap, too.
    (source,) = readers.open(cut_off.port, last_event_id=crowd[0].events[1].id)
    wait_for(lambda: "z" in source.data, "the last event")
    assert source.events[0].name == "gap"


def test_an_id_that_is_ahead_of_this_server(serve: Serve, redis: Redis, readers: Readers) -> None:
    line = BadLine(redis.port)
    behind, other = (serve(port) for port in (line.port, redis.port))
    (waiting,) = readers.open(behind.port)
    publish(behind, "0")
    wait_for(lambda: waiting.data, "an event")
    line.break_off()
    ids = publish(other, *numbers(1, 5))
    places = (2, 5)
    moved = [readers.open(behind.port, last_event_id=ids[place - 2])[0] for place in places]
    line.mend()
    publish(other, *numbers(5, 7))
    for place, source in zip(places, moved, strict=True):
        wait_for_data([source], 7 - place)
        assert source.data == numbers(place, 7)
        assert not source.gaps
    wait_for(lambda: "6" in waiting.data, "the last event")
    assert waiting.data == numbers(0, 7)


def test_a_server_that_starts_before_redis(serve: Serve, redis: Redis, readers: Readers) -> None:
    first = serve(redis.port)
    ids = publish(first, *numbers(0, 3))
    redis.kill()
    server = serve(redis.port)
    (new,) = readers.open(server.port)
    (back,) = readers.open(server.port, last_event_id=ids[0])
    server.wait_for_log("feed: Redis: ConnectionError")
    redis.start()
    wait_for(lambda: new.last_event_id, "the log")
    publish(first, "3")
    wait_for(lambda: new.data and len(back.data) == 3, "all events")
    assert new.data == ["3"]
    assert back.data == numbers(1, 4)
    assert not new.gaps + back.gaps


def test_an_id_that_redis_has_lost(serve: Serve, redis: Redis, readers: Readers) -> None:
    """A server that has just started cannot know what else was lost."""
    for event_id in ("1-0", "2-0", "4-0"):
        redis.client.xadd(KEY, {"data": event_id}, id=event_id)
    server = serve(redis.port)
    ids = ("1-0", "2-0", "3-0", "4-0", "9999999999999-0")
    asked = [readers.open(server.port, last_event_id=event_id)[0] for event_id in ids]
    publish(server, "new")
    wait_for(lambda: all("new" in source.data for source in asked), "the last event")
    everything = ["1-0", "2-0", "4-0"]
    assert [source.data[:-1] for source in asked] == [
        *(["2-0", "4-0"], ["4-0"], everything, [], everything)
    ]
    assert [len(source.gaps) for source in asked] == [0, 0, 1, 0, 1]
    # There is one gap, and its id is good on every server.
    gap = next(event for event in asked[2].events if event.name == "gap")
    (again,) = readers.open(serve(redis.port).port, last_event_id=gap.id)
    wait_for_data([again], 4)
    assert not again.gaps


@pytest.mark.parametrize(
    ("clock", "new"),
    [("as it is", ["new"]), ("ahead", ["new"]), ("ahead", ["new", "with the last id"])],
)
def test_redis_comes_back_with_older_data(
    serve: Serve, tmp_path: Path, redis: Redis, readers: Readers, clock: str, new: list[str]
) -> None:
    """Readers that stayed get a gap, and nothing twice; also if new events get the lost ids."""
    if clock == "ahead":  # then each id is the last one plus one
        redis.client.xadd(KEY, {"data": "first"}, id=f"{int(time.time() + 3600) * 1000}-0")
    server = serve(redis.port)
    crowd = readers.open(server.port, 3)
    ids = publish(server, "a", "b")
    wait_for_data(crowd, 2)
    log, copy = tmp_path / "appendonlydir", tmp_path / "copy"
    shutil.copytree(log, copy)
    publish(server, "lost 1", "lost 2")
    wait_for_data(crowd, 4)
    server.signal(signal.SIGSTOP)  # it shall find the new events
    redis.kill()
    shutil.rmtree(log)
    copy.rename(log)
    redis.start()
    for text in new:
        redis.client.xadd(KEY, {"data": text})
    server.signal(signal.SIGCONT)
    wait_for(lambda: all(source.data[-1] == new[-1] for source in crowd), "the new events")
    assert publish(server, "z")
    wait_for(lambda: all(source.data[-1] == "z" for source in crowd), "the last event")
    for source in crowd:
        shown = [event.data if event.name == "message" else "gap" for event in source.events]
        assert shown == ["a", "b", "lost 1", "lost 2", "gap", *new, "z"]
        assert source.opened == 1
    # What is still there is good to resume from, and so is the gap.
    for event_id, expected in ((ids[0], ["b", *new, "z"]), (crowd[0].events[4].id, [*new, "z"])):
        (back,) = readers.open(server.port, last_event_id=event_id)
        wait_for_data([back], len(expected))
        assert back.data == expected
        assert not back.gaps


def test_a_user_without_a_right(serve: Serve, redis: Redis, readers: Readers) -> None:
    """Redis gives a new user no right to the bell: its events are late, but they arrive."""
    allow = ("ACL", "SETUSER", "feed")
    redis.client.execute_command(*allow, "on", ">s3cret", "~feed:*", "+@all")
    url = f"redis://feed:s3cret@127.0.0.1:{redis.port}"
    server = serve(url, feed_redis__CHECK=0.5)
    (source,) = readers.open(server.port)
    publish(server, "0", "1")
    wait_for_data([source], 2)
    redis.client.execute_command(*allow, "-xadd")
    assert post(server, "refused").status_code == 503
    redis.client.execute_command("ACL", "DELUSER", "feed")
    assert post(server, "refused").status_code == 503
    redis.client.execute_command(*allow, "on", ">s3cret", "~feed:*", "&*", "+@all")
    publish(server, "2")
    wait_for_data([source], 3)
    assert source.data == numbers(0, 3)
    assert source.opened == 1
    assert "s3cret" not in server.log


def test_redis_takes_no_new_connections(serve: Serve, redis: Redis, readers: Readers) -> None:
    """The bell often has a new one. Without it, events are late, but they arrive."""
    line = BadLine(redis.port)
    server = serve(line.port, feed_redis__CHECK=0.5)
    (source,) = readers.open(server.port)
    publish(server, "0")
    wait_for_data([source], 1)
    line.dead = True
    server.wait_for_log("feed: Redis: ConnectionError")
    publish(server, "1")
    wait_for_data([source], 2)
    assert source.data == numbers(0, 2)


def test_what_others_put_into_the_stream(serve: Serve, redis: Redis, readers: Readers) -> None:
    """Nobody rings the bell for it, so it waits for the next read of all channels."""
    redis.client.xadd(KEY, {"data": "x"})
    redis.client.xtrim(KEY, maxlen=0, approximate=False)  # a stream, but an empty one
    server = serve(redis.port, feed_redis__CHECK=0.5)
    (source,) = readers.open(server.port)
    wait_for(lambda: source.last_event_id, "an id to go on from")
    for fields in (
        {"data": b"\xff\r\nid: 5", "event": "a\r\nid: 6"},
        {"other": "field"},
        {"data": "fine", "more": "x"},
    ):
        redis.client.xadd(KEY, fields)
    wait_for(lambda: "fine" in source.data, "the last event")
    assert [(event.data, event.name) for event in source.events] == [
        *(("\ufffd\nid: 5", "a  id: 6"), ("fine", "message"))
    ]


def test_something_else_in_the_place_of_one_channel(
    serve: Serve, redis: Redis, readers: Readers
) -> None:
    """It is read again and again, but not more and more often."""
    redis.client.set(KEY, "text")
    server = serve(redis.port, feed_redis__CHECK=0.05)
    (source,) = readers.open(server.port)
    (other,) = readers.open(server.port, path="/feed/other")
    server.wait_for_log("feed: cannot read channel goals: .*WRONGTYPE")
    assert post(server, "x").status_code == 503
    publish(server, "y", path="/feed/other")
    wait_for_data([other], 1)

    def calls(command: str) -> int:
        return int(redis.client.info("commandstats")[f"cmdstat_{command}"]["calls"])

    wait_for(lambda: calls("subscribe") > 40, "all channels to be read 40 times")
    assert calls("eval") < 3 * calls("subscribe")  # there are two, and a new reader each second
    redis.client.delete(KEY)
    wait_for(lambda: source.last_event_id, "the log")
    publish(server, "z")
    wait_for_data([source], 1)
    assert not source.gaps + other.gaps


def test_many_channels_that_are_full(serve: Serve, redis: Redis, readers: Readers) -> None:
    """What Redis has no time to answer at once is read piece by piece."""
    redis.client.config_set("appendonly", "no")
    pipeline = redis.client.pipeline()
    for number in range(20 * KEEP):
        pipeline.xadd(f"feed:{number % 20}", {"data": "x" * 6000})
    pipeline.execute()
    server = serve(redis.port, feed_redis__PATIENCE=0.4)
    paths = [f"/feed/{number}" for number in range(20)]
    with ThreadPoolExecutor(20) as pool:
        crowd = [*pool.map(lambda path: readers.open(server.port, path=path)[0], paths)]
    wait_for(lambda: all(source.last_event_id for source in crowd), "the log")


def test_a_channel_is_kept_while_it_is_read_and_forgotten_an_hour_later(
    serve: Serve, redis: Redis, readers: Readers
) -> None:
    server = serve(redis.port, feed_redis__CHECK=0.5)
    (reader,) = readers.open(server.port)
    (id_before,) = publish(server, "posted only", path="/feed/unread")
    for key in (KEY, "feed:unread"):
        assert 3500 < redis.client.ttl(key) <= 3600
        redis.client.expire(key, 10)
    wait_for(lambda: redis.client.ttl(KEY) > 3500, "the read one to be kept")
    assert redis.client.ttl("feed:unread") <= 10
    redis.client.delete("feed:unread")
    (back,) = readers.open(server.port, path="/feed/unread", last_event_id=id_before)
    wait_for(lambda: back.gaps, "the gap")
    # A place in a channel in which nobody has posted is as good as any other.
    (again,) = readers.open(server.port, last_event_id=reader.last_event_id)
    publish(server, "x")
    wait_for_data([again, reader], 1)
    assert not again.gaps


def test_channels_that_come_and_go(serve: Serve, redis: Redis, readers: Readers) -> None:
    """They are there until the timer of their silence ends."""
    server = serve(redis.port, feed__SILENCE=1)
    channels, memory = count(), [0]

    def come_and_go() -> bool:
        """100 channels in turn, with events so large that it would show if they stayed."""
        names = [str(next(channels)) for _ in range(100)]
        pipeline = redis.client.pipeline()
        for name in names:
            pipeline.xadd(f"feed:{name}", {"data": "x" * 50_000})
        pipeline.execute()
        with ThreadPoolExecutor(50) as pool:
            opened = pool.map(lambda name: readers.open(server.port, path=f"/feed/{name}"), names)
            readers.close([source for sources in opened for source in sources])
        memory.append(psutil.Process(server.pid).memory_info().rss)
        return bool(memory[-1] < memory[-2] + 100 * 50_000 / 2)

    wait_for(come_and_go, "memory that does not grow")
    assert redis.connections() <= 3


def test_an_address_with_a_password(
    serve: Serve, start: Start, tmp_path: Path, readers: Readers
) -> None:
    """TLS with a password, and Sentinel. Nothing of the password is in the log, whatever fails."""
    password = "s3cret/%40"
    options = ["req", "-x509", "-newkey", "rsa:2048", "-nodes", "-subj", "/CN=localhost"]
    cert, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    alternative = ["-addext", "subjectAltName=IP:127.0.0.1"]
    openssl = [need("openssl", "openssl"), *options, *alternative, "-keyout", str(key)]
    subprocess.run([*openssl, "-out", str(cert)], check=True, capture_output=True)
    tls_port, sentinel_port = free_port(), free_port()
    tls = ["--tls-port", str(tls_port), "--tls-cert-file", str(cert), "--tls-key-file", str(key)]
    tls += ["--tls-auth-clients", "no", "--requirepass", "s3cret/@"]
    with running_redis(tmp_path, *tls, password="s3cret/@") as redis:
        config = tmp_path / "sentinel.conf"
        config.write_text(
            f"port {sentinel_port}\nsentinel monitor goals-db 127.0.0.1 {redis.port} 1\n"
            "sentinel auth-pass goals-db s3cret/@\n"
        )
        start(need("redis-server", "redis-server"), str(config), "--sentinel", port=sentinel_port)
        quoted = password.replace("/", "%2F")
        silent = socket.create_server(("127.0.0.1", 0))  # a sentinel that hangs
        hangs = silent.getsockname()[1]
        addresses = {
            "tls": f"rediss://:{quoted}@127.0.0.1:{tls_port}?ssl_ca_certs={cert}",
            "sentinel": f"redis+sentinel://:{quoted}@127.0.0.1:{hangs},127.0.0.1:{sentinel_port}/goals-db",
        }
        for address in addresses.values():
            server = serve(f" {address} ")
            (source,) = readers.open(server.port)
            publish(server, "x")
            wait_for_data([source], 1)
            wrong = address.replace("s3cret", "s3cret-wrong")
            bad = serve(wrong)
            assert post(bad, "x").status_code == 503
            assert "s3cret" not in server.log + bad.log


@pytest.mark.parametrize(
    "address",
    [
        "localhost:6379",
        "redis://localhost:x",
        "redis://localhost/x",
        "redis://localhost?retry=3",
        "redis://localhost?protocol=4",
        "rediss://localhost?ssl_cert_reqs=some",
        "redis://:s3/cret@localhost",
        "redis://:1?s3@localhost",
        "redis+sentinel://localhost:26379",
    ],
)
def test_an_address_that_is_wrong(address: str) -> None:
    with pytest.raises(SystemExit) as raised:
        connect_to_redis(address, 1)
    assert str(raised.value) == "REDIS_URL should be like redis://:P%40SSWORD@HOST:6379."


def test_a_file_that_is_not_there() -> None:
    with pytest.raises(SystemExit, match="a file that cannot be read"):
        connect_to_redis("rediss://:s3cret@localhost?ssl_ca_certs=/no/such/file", 1)
