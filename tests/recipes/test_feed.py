"""recipes/feed.py in memory: each event to each reader, once and in order, or a gap says so."""

import json
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import requests

from recipes.feed import KEEP
from tests.support.event_sources import EventSource, EventSources, event_sources
from tests.support.feed import numbers, publish
from tests.support.processes import LIMIT, Process, Start, starting, wait_for
from tests.support.recipes import start_app, start_recipe


@pytest.fixture
def server(start: Start, tmp_path: Path) -> Process:
    return start_recipe(start, "recipes.feed", tmp_path)


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Process]:
    """One for all tests that post nothing in `goals`. Its REDIS_URL is set, to nothing."""
    directory = tmp_path_factory.mktemp("feed")
    with starting(directory) as start:
        yield start_recipe(start, "recipes.feed", directory, REDIS_URL="")


@pytest.fixture
def readers() -> Iterator[EventSources]:
    with event_sources() as sources:
        yield sources


def wait_for_data(sources: list[EventSource], *texts: str) -> None:
    """Wait until each of them has as many events as this, and then see that it has these."""
    wait_for(lambda: all(len(s.data) >= len(texts) for s in sources), f"{len(texts)} events")
    for source in sources:
        assert source.data == [*texts]


# What comes ---------------------------------------------------------------------------------------


def test_every_reader_gets_every_event_of_its_channel(
    server: Process, readers: EventSources
) -> None:
    crowd = readers.open(server.port, 20)
    (other,) = readers.open(server.port, path="/feed/user:7_a.B-c")
    # Each kind of line break is one; what only Python takes for one is none.
    text = " ☕ one\rtwo\r\n\nthree: \x0b\u2028four\n"
    ids = publish(server, "a", text, " b")
    publish(server, "for one user", path="/feed/user:7_a.B-c")
    wait_for_data(crowd, "a", " ☕ one\ntwo\n\nthree: \x0b\u2028four\n", " b")
    wait_for_data([other], "for one user")
    for source in crowd:
        assert [event.id for event in source.events] == ids
        assert not source.gaps


def test_an_event_may_be_large_and_have_a_name(server: Process, readers: EventSources) -> None:
    (source,) = readers.open(server.port)
    texts = ["☕" * 10_000, "\n" * 10_000, "x"]
    publish(server, *texts)
    wait_for_data([source], *texts)
    for name in ("goal", "own goal", "", None):
        body = {"data": "1 : 0", "event": name}
        answer = requests.post(f"{server.url}/feed/goals", json=body, timeout=LIMIT)
        assert answer.status_code == 201
    wait_for(lambda: len(source.events) == 7, "the events")
    names = [event.name for event in source.events[3:]]
    assert names == ["goal", "own goal", "message", "message"]


def test_headers(shared: Process) -> None:
    with requests.get(f"{shared.url}/feed/goals", stream=True, timeout=LIMIT) as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        assert answer.headers["cache-control"] == "no-cache, no-transform"
        assert answer.headers["x-accel-buffering"] == "no"


def test_a_comment_after_a_silence(server: Process, readers: EventSources) -> None:
    crowd = readers.open(server.port, 3)
    wait_for(lambda: all(source.comments for source in crowd), "a comment")
    assert not any(source.events for source in crowd)
    publish(server, "then an event")
    wait_for_data(crowd, "then an event")


# Coming back --------------------------------------------------------------------------------------


def test_whoever_comes_back_gets_what_came_meanwhile(
    server: Process, readers: EventSources
) -> None:
    ids = publish(server, *numbers(0, 20))
    for place, event_id in enumerate(ids):
        (header,) = readers.open(server.port, last_event_id=event_id)
        (address,) = readers.open(server.port, path=f"/feed/goals?lastEventId={event_id}")
        (last,) = readers.open(server.port, path=f"/feed/goals?last={19 - place}")
        wait_for_data([header, address, last], *numbers(place + 1, 20))
        assert [event.id for event in header.events] == ids[place + 1 :]
    # What comes back has its old address still, but the header counts.
    (both,) = readers.open(
        server.port, path=f"/feed/goals?lastEventId={ids[3]}", last_event_id=ids[17]
    )
    wait_for_data([both], "18", "19")
    assert not any(source.gaps for source in readers.all)


def test_a_reader_that_is_cut_off_before_its_first_event(
    server: Process, readers: EventSources
) -> None:
    publish(server, "before")
    for path in ("/feed/goals", "/feed/where.nobody.posted"):
        (source,) = readers.open(server.port, path=path)
        wait_for(lambda: source.last_event_id, "an id to come back with")  # noqa: B023
        readers.close([source])
        publish(server, "meanwhile", path=path)
        (again,) = readers.open(server.port, path=path, last_event_id=source.last_event_id)
        wait_for_data([again], "meanwhile")
        assert not source.events + again.gaps


def test_the_last_1000_are_kept_and_a_gap_is_told_once(
    server: Process, readers: EventSources
) -> None:
    count = KEEP + 2
    ids = publish(server, *numbers(0, count))
    told, whole = (readers.open(server.port, last_event_id=ids[i])[0] for i in (0, 1))
    wait_for_data([told, whole], *numbers(2, count))
    assert not whole.gaps
    assert told.events[0].name == "gap"  # it comes first
    assert json.loads(told.gaps[0])["reason"]
    assert len(told.gaps) == 1
    # Who is cut off right after it goes on with its id, and is not told again.
    (again,) = readers.open(server.port, last_event_id=told.events[0].id)
    wait_for_data([again], *numbers(2, count))
    assert not again.gaps


def test_an_id_that_nobody_knows(server: Process, readers: EventSources) -> None:
    """Of another log, or of the future: where there is no other server, nobody can have made it."""
    publish(server, "kept")
    for event_id in ("0-0", "0000001-00001", "9" * 20 + "-" + "9" * 20):
        (source,) = readers.open(server.port, last_event_id=event_id)
        wait_for_data([source], "kept")
        assert [event.name for event in source.events] == ["gap", "message"]


def test_a_server_that_was_restarted_has_a_new_log(server: Process, readers: EventSources) -> None:
    crowd = readers.open(server.port, 5)
    publish(server, "old")
    wait_for_data(crowd, "old")
    server.kill()
    server.start()
    publish(server, "new")
    wait_for_data(crowd, "old", "new")
    assert all([event.name for event in s.events] == ["message", "gap", "message"] for s in crowd)


# Bad input ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("header", [True, False])
@pytest.mark.parametrize(
    "event_id", ["x", "1", "-", "1-", "-1", "1-1-1", "+1-1", "1-1 x", "9" * 21 + "-1", "٣-٣"]
)
def test_an_id_that_is_none(shared: Process, event_id: str, header: bool) -> None:
    headers = {"Last-Event-ID": event_id.encode()} if header else {}
    query = {} if header else {"lastEventId": event_id}
    answer = requests.get(f"{shared.url}/feed/goals", headers=headers, params=query, timeout=LIMIT)
    assert answer.status_code == 422
    where = ["header", "last-event-id"] if header else ["query", "lastEventId"]
    assert answer.json()["detail"][0]["loc"] == where


@pytest.mark.parametrize("name", ["a b", "ü", "a,b", "a%00", "x" * 101, "a\n"])
def test_a_name_that_no_channel_has(shared: Process, name: str) -> None:
    for method in ("GET", "POST"):
        answer = requests.request(
            method, f"{shared.url}/feed/{name}", json={"data": "x"}, timeout=LIMIT
        )
        assert answer.status_code == 422
        assert answer.json()["detail"][0]["loc"] == ["path", "channel"]


BAD = [
    *(
        "{}",
        '{"data": ""}',
        '{"data": 5}',
        '{"data": "\\ud800"}',
        json.dumps({"data": "x" * 10_001}),
    ),
    *('{"data": "x", "event": "a\\nb"}', json.dumps({"data": "x", "event": "x" * 101})),
]


@pytest.mark.parametrize("body", BAD)
def test_bad_input(shared: Process, body: str) -> None:
    headers = {"Content-Type": "application/json"}
    url = f"{shared.url}/feed/goals"
    answer = requests.post(url, data=body.encode(), headers=headers, timeout=LIMIT)
    assert answer.status_code == 422, answer.text
    (detail,) = answer.json()["detail"]
    assert detail["loc"][0] == "body"
    assert detail["msg"]


def test_a_page_from_elsewhere_cannot_publish(shared: Process) -> None:
    """Without asking first it can send JSON only as another type: that is what CORS allows."""
    for media_type, status in {
        "text/plain": 422,
        "Application/Json; charset=utf-8": 201,
    }.items():
        answer = requests.post(
            f"{shared.url}/feed/elsewhere",
            data=b'{"data": "x"}',
            headers={"Content-Type": media_type},
            timeout=LIMIT,
        )
        assert answer.status_code == status


# Readers are slow, leave, fail; channels come and go ----------------------------------------------


def test_a_reader_that_does_not_read(server: Process, readers: EventSources) -> None:
    slow, *others = readers.open(server.port, 4)
    readers.pause(slow)
    texts = numbers(0, 6 * KEEP, size=8000)
    for begin in (0, 2 * KEEP):  # twice, until the allocator has what it needs
        publish(server, *texts[begin : begin + 2 * KEEP])
        wait_for_data(others, *texts[: begin + 2 * KEEP])
    memory = psutil.Process(server.pid).memory_info().rss
    publish(server, *texts[4 * KEEP :])
    wait_for_data(others, *texts)  # nobody waits for the one
    # Those that are no longer kept are 16 MB.
    assert psutil.Process(server.pid).memory_info().rss < memory + 8e6
    readers.pause(slow, False)
    publish(server, "the last")
    wait_for(lambda: "the last" in slow.data, "the last event")
    # What it had before the gap, then what was kept.
    place = [event.name for event in slow.events].index("gap")
    assert len(slow.gaps) == 1
    assert slow.data[:place] == texts[:place]
    assert slow.data[place:-1] == texts[-len(slow.data[place:-1]) :]
    assert len(slow.data) - 1 < len(texts)


def test_whoever_leaves_is_forgotten(server: Process, readers: EventSources) -> None:
    (stays,) = readers.open(server.port)
    process = psutil.Process(server.pid)

    def many_come_and_go() -> int:
        for _ in range(5):
            crowd = readers.open(server.port, 200)
            publish(server, "x" * 5000)
            wait_for(lambda: all(source.events for source in readers.all), "an event")
            readers.close(crowd)
            readers.all.clear()
        wait_for(lambda: len(process.net_connections("tcp")) <= 2, "the connections to end")
        return int(process.memory_info().rss)

    memory = many_come_and_go()
    assert many_come_and_go() < memory + 4e6  # 1,000 readers that stay are 28 MB
    assert len(stays.data) == 10


def test_a_channel_is_forgotten(start: Start, readers: EventSources) -> None:
    server = start_app(start, "tests.support.feed_apps:impatient", "--factory")
    (stays,) = readers.open(server.port, path="/feed/read")
    old = publish(server, "old", path="/feed/read") + publish(server, "old", path="/feed/unread")
    memory = 0
    for round_ in range(3):
        for number in range(500):
            publish(server, "x" * 10_000, path=f"/feed/{round_}.{number}")
        memory = memory or psutil.Process(server.pid).memory_info().rss
    # 1,000 channels that stay are 10 MB.
    assert psutil.Process(server.pid).memory_info().rss < memory + 5e6
    # One that has a reader is kept. The ids of the other are a gap.
    back = [
        readers.open(server.port, path=f"/feed/{name}", last_event_id=event_id)[0]
        for name, event_id in zip(("read", "unread"), old, strict=True)
    ]
    for source, name in zip((stays, *back), ("read", "read", "unread"), strict=True):
        publish(server, name, path=f"/feed/{name}")
        wait_for(lambda: name in source.data, "the event")  # noqa: B023
    assert [len(source.gaps) for source in (stays, *back)] == [0, 0, 1]


def test_a_server_that_is_stopped(start: Start, readers: EventSources) -> None:
    command = (sys.executable, "-m", "uvicorn", "recipes.feed:app", "--port", "{port}")
    server = start(*command, "--timeout-graceful-shutdown", "1")
    slow, *others = readers.open(server.port, 20)
    readers.pause(slow)
    texts = numbers(0, 1000, size=9000)
    publish(server, *texts)
    wait_for_data(others, *texts)
    server.signal(signal.SIGTERM)
    server.wait()
    wait_for(lambda: all(s.connection and s.connection.complete for s in others), "the end")
    assert not any(source.cut for source in others)
    assert "destroyed" not in server.log
