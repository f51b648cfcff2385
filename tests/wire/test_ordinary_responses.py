"""The streams are ordinary responses: whatever people put around them works, live and whole."""

import re
from collections.abc import Callable

import pytest
import requests

from tests.support.browsers import Browser
from tests.support.processes import LIMIT, Process, Start, start_app, wait_for
from tests.support.raw_reader import RawReader, event_ids, read_until

STREAMS = ("/text", "/ndjson", "/sse")
OUTSIDE: dict[str, str] = {}
INSIDE = {"INSIDE": "1"}
in_both_orders = pytest.mark.parametrize("order", [OUTSIDE, INSIDE], ids=["outside", "inside"])

App = Callable[..., Process]


@pytest.fixture
def app(start: Start) -> App:
    """Start one of tests/support/apps.py."""

    def start_it(name: str, order: dict[str, str] = OUTSIDE) -> Process:
        return start_app(start, f"tests.support.apps:{name}", "--factory", **order)

    return start_it


def assert_live_and_whole(server: Process, paths: tuple[str, ...]) -> None:
    """Three events, half a second apart, the first before the last is made; a proper end."""
    readers = [RawReader(server.port, f"{path}?steps=3&interval=0.5") for path in paths]
    assert read_until(readers, lambda: all(reader.ended_at for reader in readers))
    for path, reader in zip(paths, readers, strict=True):
        assert reader.status == 200
        assert reader.ended_properly
        assert event_ids(f"/{path.rpartition('/')[2]}", bytes(reader.body)) == [0, 1, 2]
        assert reader.arrivals[-1] - reader.arrivals[0] > 0.4


def assert_ends_when_stopped(server: Process, paths: tuple[str, ...], headers: str = "") -> None:
    readers = [RawReader(server.port, f"{path}?interval=10", headers) for path in paths]
    assert read_until(readers, lambda: all(reader.arrivals for reader in readers))
    server.signal(15)
    assert read_until(readers, lambda: all(reader.ended_at for reader in readers))
    assert [reader.ended_properly for reader in readers] == [True] * len(paths)
    server.wait()
    assert not re.search("Traceback|ERROR", server.log), server.log


@in_both_orders
def test_cors(app: App, order: dict[str, str]) -> None:
    server = app("cors", order)
    assert_live_and_whole(server, STREAMS)
    for path in STREAMS:
        for last in ("", "3", "9"):  # a 200, a 200, a 204 where it can be resumed
            headers = {"Origin": "http://elsewhere"} | ({"Last-Event-ID": last} if last else {})
            answer = requests.get(f"{server.url}{path}?interval=0", headers=headers, timeout=LIMIT)
            assert answer.status_code == (204 if last == "9" and path != "/text" else 200)
            assert answer.headers["Access-Control-Allow-Origin"] == "*"
    assert_ends_when_stopped(server, STREAMS)


def test_a_page_of_another_origin_reads_them(
    browser: Browser, app: App, shared_server: Process
) -> None:
    other = app("cors")
    browser.open(f"{shared_server.url}/text?steps=1")  # without the page's policy
    browser.run(
        """
        window.seen = {sse: [], fetched: ""}
        const source = new EventSource(arguments[0] + "/sse?steps=3&interval=0.1")
        source.onmessage = (message) => seen.sse.push(JSON.parse(message.data).event_id)
        fetch(arguments[0] + "/ndjson?steps=3&interval=0.1", {headers: {"Last-Event-ID": "0"}})
            .then((answer) => answer.text()).then((text) => { seen.fetched = text })
        """,
        other.url,
    )
    wait_for(lambda: browser.run("return seen.sse.length == 3 && seen.fetched"), "both")
    assert browser.run("return seen.sse") == [0, 1, 2]
    assert re.findall(r'"event_id":(\d)', browser.run("return seen.fetched")) == ["1", "2"]
    wait_for(lambda: '"GET /sse?steps=3&interval=0.1 HTTP/1.1" 204' in other.log, "the 204")


@in_both_orders
def test_http_middleware(app: App, order: dict[str, str]) -> None:
    """`@app.middleware("http")`, which most apps have one of."""
    server = app("http", order)
    assert_live_and_whole(server, STREAMS)
    for path in STREAMS:
        answer = requests.get(f"{server.url}{path}?interval=0", timeout=LIMIT)
        assert answer.headers["X-Mark"] == "seen"
    answer = requests.get(f"{server.url}/sse", headers={"Last-Event-ID": "9"}, timeout=LIMIT)
    assert (answer.status_code, answer.headers["X-Mark"]) == (204, "seen")
    assert_ends_when_stopped(server, STREAMS)


@in_both_orders
def test_gzip(app: App, order: dict[str, str]) -> None:
    """Each event arrives at once, compressed or not; Starlette leaves SSE uncompressed."""
    server = app("gzip", order)
    for path in STREAMS:
        url = f"{server.url}{path}?steps=3&interval=0.5"
        with requests.get(url, stream=True, timeout=LIMIT) as answer:
            compressed = answer.headers.get("Content-Encoding") == "gzip"
            assert compressed == (path != "/sse")
            pieces = list(iter(lambda: answer.raw.read1(1000, decode_content=True), b""))
        assert event_ids(path, b"".join(pieces)) == [0, 1, 2]
        assert [event_ids(path, piece) for piece in pieces if piece] == [[0], [1], [2]]
    if order is OUTSIDE:  # from the outside nobody can end a compressed body
        assert_ends_when_stopped(server, STREAMS, "Accept-Encoding: gzip\r\n")


def test_router_and_sessions(app: App) -> None:
    """Nothing of main.py's is there but the streams: a cookie that is set, and comes back."""
    server = app("sessions")
    with requests.Session() as visitor:
        for visits, path in enumerate(STREAMS, start=1):
            assert visitor.get(f"{server.url}{path}?interval=0", timeout=LIMIT).ok
            assert visitor.cookies
            assert visitor.get(f"{server.url}/visits", timeout=LIMIT).json() == 2 * visits
    assert_live_and_whole(server, STREAMS)
    # A stream that nobody reads any more ends: the server has nothing left to wait for.
    readers = [RawReader(server.port, f"{path}?interval=10") for path in STREAMS]
    assert read_until(readers, lambda: all(reader.arrivals for reader in readers))
    for reader in readers:
        reader.close()
    server.signal(15)
    server.wait()
    assert not re.search("Traceback|ERROR", server.log), server.log


def test_mounted(app: App) -> None:
    """In an app with a middleware of its own. (Mounts below the app: test_stream.py.)"""
    server = app("mounted")
    paths = tuple(f"/sub{path}" for path in STREAMS)
    assert_live_and_whole(server, paths)
    for path in paths:
        answer = requests.get(f"{server.url}{path}?interval=0", timeout=LIMIT)
        assert answer.headers["X-Mark"] == "seen"
    assert_ends_when_stopped(server, paths)


def test_a_dependency_is_closed_after_the_stream(app: App) -> None:
    """And after its background task."""
    server = app("dependency")
    answer = requests.get(f"{server.url}/3", timeout=LIMIT)
    assert answer.text == "0\n1\n2\n100\n"
    server.wait_for_log("background True\nsession closed")

    # The reader leaves while the generator sleeps.
    reader = RawReader(server.port, "/4")
    assert read_until([reader], lambda: b"2" in reader.body)
    reader.close()
    server.wait_for_log("background True\nsession closed", count=2)

    # The generator raises: what came looks cut, and the session is closed all the same.
    reader = RawReader(server.port, "/raises/3")
    assert read_until([reader], lambda: reader.ended_at)
    assert (bytes(reader.body), reader.ended_properly) == (b"0\n1\n", False)
    server.wait_for_log("ZeroDivisionError")
