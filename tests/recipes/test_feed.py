"""recipes/feed.py in memory: each event to each reader, once and in order, or a gap says so."""

import itertools
import json
import signal
import sys
from collections.abc import Iterator

import psutil
import pytest
import requests

from recipes.feed import KEEP, SILENCE
from tests.support.event_sources import EventSource, EventSources, event_sources
from tests.support.feed import numbers, publish
from tests.support.processes import LIMIT, Process, Start, starting, wait_for
from tests.support.recipes import start_changed

NUMBERS = itertools.count()


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Process]:
    with starting(tmp_path_factory.mktemp("feed")) as start:
        yield start_changed(start, "feed", feed__SILENCE=1)


@pytest.fixture
def server(start: Start) -> Process:
    return start_changed(start, "feed")


@pytest.fixture
def path() -> str:
    """A channel that no other test has."""
    return f"/feed/goals:{next(NUMBERS)}"


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
    shared: Process, readers: EventSources, path: str
) -> None:
    crowd = readers.open(shared.port, 20, path=path)
    (other,) = readers.open(shared.port, path="/feed/user:7_a.B-c")
    # Each kind of line break is one; what only Python takes for one is none.
    text = " ☕ one\rtwo\r\n\nthree: \x0b\u2028four\n"
    large = ["☕" * 10_000, "\n" * 10_000]
    ids = publish(shared, "a", text, *large, path=path)
    publish(shared, "for one user", path="/feed/user:7_a.B-c")
    wait_for_data(crowd, "a", " ☕ one\ntwo\n\nthree: \x0b\u2028four\n", *large)
    wait_for_data([other], "for one user")
    wait_for(lambda: all(source.comments for source in crowd), "a comment in the silence")
    assert SILENCE == 10  # here it is a second
    for name in ("own goal", "", None):
        body = {"data": "1 : 0", "event": name}
        answer = requests.post(shared.url + path, json=body, timeout=LIMIT)
        ids.append(answer.json()["id"])
    wait_for(lambda: all(len(source.events) == 7 for source in crowd), "the events")
    for source in crowd:
        assert [event.id for event in source.events] == ids
        names = [event.name for event in source.events]
        assert names == [*["message"] * 4, "own goal", "message", "message"]


# Coming back --------------------------------------------------------------------------------------


def test_whoever_comes_back_gets_what_came_meanwhile(
    shared: Process, readers: EventSources, path: str
) -> None:
    ids = publish(shared, *numbers(0, 20), path=path)
    crowd = []
    for place in (0, 7, 18, 19):
        (header,) = readers.open(shared.port, path=path, last_event_id=ids[place])
        (address,) = readers.open(shared.port, path=f"{path}?lastEventId={ids[place]}")
        (last,) = readers.open(shared.port, path=f"{path}?last={19 - place}")
        wait_for_data([header, address, last], *numbers(place + 1, 20))
        assert [event.id for event in header.events] == ids[place + 1 :]
        crowd += [header, address, last]
    # What comes back has its old address still, but the header counts.
    old = f"{path}?lastEventId={ids[3]}"
    (both,) = readers.open(shared.port, path=old, last_event_id=ids[17])
    wait_for_data([both], "18", "19")
    assert not any(source.gaps for source in (*crowd, both))


@pytest.mark.parametrize("before", [[], ["before"]])
def test_a_reader_that_is_cut_off_before_its_first_event(
    shared: Process, readers: EventSources, path: str, before: list[str]
) -> None:
    publish(shared, *before, path=path)
    (source,) = readers.open(shared.port, path=path)
    wait_for(lambda: source.last_event_id, "an id to come back with")
    readers.close([source])
    publish(shared, "meanwhile", path=path)
    (again,) = readers.open(shared.port, path=path, last_event_id=source.last_event_id)
    wait_for_data([again], "meanwhile")
    assert not source.events + again.gaps


def test_the_last_1000_are_kept_and_a_gap_is_told_once(
    shared: Process, readers: EventSources, path: str
) -> None:
    count = KEEP + 2
    ids = publish(shared, *numbers(0, count), path=path)
    told, whole = (readers.open(shared.port, path=path, last_event_id=ids[i])[0] for i in (0, 1))
    wait_for_data([told, whole], *numbers(2, count))
    assert not whole.gaps
    assert told.events[0].name == "gap"  # it comes first
    assert json.loads(told.gaps[0])["reason"]
    assert len(told.gaps) == 1
    # Who is cut off right after it goes on with its id, and is not told again.
    (again,) = readers.open(shared.port, path=path, last_event_id=told.events[0].id)
    wait_for_data([again], *numbers(2, count))
    assert not again.gaps


def test_an_id_that_nobody_knows(shared: Process, readers: EventSources, path: str) -> None:
    """Of another log, or of the future: where there is no other server, nobody can have made it."""
    publish(shared, "kept", path=path)
    for event_id in ("0000001-00001", "9" * 20 + "-" + "9" * 20):
        (source,) = readers.open(shared.port, path=path, last_event_id=event_id)
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


@pytest.mark.parametrize("event_id", ["1", "1-", "-1", "+1-1", "9" * 21 + "-1", "٣-٣"])
def test_an_id_that_is_none(shared: Process, event_id: str) -> None:
    url = f"{shared.url}/feed/goals"
    header = requests.get(url, headers={"Last-Event-ID": event_id.encode()}, timeout=LIMIT)
    address = requests.get(url, params={"lastEventId": event_id}, timeout=LIMIT)
    for answer, loc in (
        (header, ["header", "last-event-id"]),
        (address, ["query", "lastEventId"]),
    ):
        assert answer.status_code == 422
        assert answer.json()["detail"][0]["loc"] == loc


@pytest.mark.parametrize("name", ["a b", "ü", "x" * 101, "a\n"])
def test_a_name_that_no_channel_has(shared: Process, name: str) -> None:
    url = f"{shared.url}/feed/{name}"
    for answer in (
        requests.get(url, timeout=LIMIT),
        requests.post(url, json={"data": "x"}, timeout=LIMIT),
    ):
        assert answer.status_code == 422
        assert answer.json()["detail"][0]["loc"] == ["path", "channel"]


JSON = "Application/Json; charset=utf-8"


@pytest.mark.parametrize(
    ("body", "media_type", "status"),
    [
        ({"data": "x"}, JSON, 201),
        # A page of another site may send this without asking first: that is what CORS allows.
        ({"data": "x"}, "text/plain", 422),
        ({}, JSON, 422),
        ({"data": ""}, JSON, 422),
        ({"data": "\ud800"}, JSON, 422),
        ({"data": "x" * 10_001}, JSON, 422),
        ({"data": "x", "event": "a\nb"}, JSON, 422),
        ({"data": "x", "event": "a\n"}, JSON, 422),
        ({"data": "x", "event": "gap"}, JSON, 422),  # readers would think that events are missing
        ({"data": "x", "event": "x" * 101}, JSON, 422),
    ],
)
def test_what_may_be_posted(
    shared: Process, body: dict[str, str], media_type: str, status: int
) -> None:
    data, headers = json.dumps(body), {"Content-Type": media_type}
    answer = requests.post(f"{shared.url}/feed/any", data, headers=headers, timeout=LIMIT)
    assert answer.status_code == status
    if status == 422:
        assert answer.json()["detail"][0]["loc"][0] == "body"


# Readers are slow, leave, fail; channels come and go ----------------------------------------------


def test_a_reader_that_does_not_read(server: Process, readers: EventSources) -> None:
    slow, *others = readers.open(server.port, 3)
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
            wait_for(lambda: all(source.events for source in crowd), "an event")  # noqa: B023
            readers.close(crowd)
        wait_for(lambda: len(process.net_connections("tcp")) <= 2, "the connections to end")
        return int(process.memory_info().rss)

    memory = many_come_and_go()
    assert many_come_and_go() < memory + 4e6  # 1,000 readers that stay are 28 MB
    assert len(stays.data) == 10


def test_a_channel_is_forgotten(start: Start, readers: EventSources) -> None:
    server = start_changed(start, "feed", feed__FORGET=0.1)
    (stays,) = readers.open(server.port, path="/feed/read")
    old = publish(server, "old", path="/feed/read") + publish(server, "old", path="/feed/unread")
    memory = 0
    for round_ in range(3):
        for number in range(150):
            publish(server, "☕" * 10_000, path=f"/feed/{round_}.{number}")
        memory = memory or psutil.Process(server.pid).memory_info().rss
    # 300 channels that stay are 9 MB.
    assert psutil.Process(server.pid).memory_info().rss < memory + 4.5e6
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
    slow, *others = readers.open(server.port, 5)
    readers.pause(slow)
    texts = numbers(0, 1000, size=9000)
    publish(server, *texts)
    wait_for_data(others, *texts)
    server.signal(signal.SIGTERM)
    server.wait()
    wait_for(lambda: all(s.connection and s.connection.complete for s in others), "the end")
    assert not any(source.cut for source in others)
    assert "destroyed" not in server.log
