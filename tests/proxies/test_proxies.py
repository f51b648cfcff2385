"""Behind stock proxies that compress: live, never from a cache, and why that needs the headers."""

import itertools
import json
import shlex
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import pytest
import requests

from tests.support.processes import (
    LIMIT,
    LOG_CONFIG,
    UVICORN,
    Process,
    Start,
    run_client,
    start_app,
    starting,
    wait_for,
)
from tests.support.proxies import STOCK, Reading, read, start_stock
from tests.support.readme import Readme, commands, shows

STREAMS = ("text", "ndjson", "sse")
INTERVAL = 1.0


def read_all(*requests: tuple[str, bool]) -> list[Reading]:
    """Read several streams at the same time, compressed or not."""
    with ThreadPoolExecutor(len(requests)) as pool:
        return list(pool.map(lambda request: read(*request), requests))


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Process]:
    """One server for all proxies, whose log shows its generators' ends."""
    tmp = tmp_path_factory.mktemp("server")
    (tmp / "log.json").write_text(json.dumps(LOG_CONFIG))
    with starting(tmp) as start:
        yield start(*UVICORN, "--log-config", str(tmp / "log.json"))


@pytest.fixture(
    scope="module", params=[pytest.param(n, marks=pytest.mark.xdist_group(n)) for n in STOCK]
)
def proxy(
    request: pytest.FixtureRequest, server: Process, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Process]:
    """One of the stock proxies in front of the server."""
    name = request.param
    process = start_stock(name, server.port, tmp_path_factory.mktemp(name))
    yield process
    process.kill()


@pytest.fixture
def stock(tmp_path: Path) -> Iterator[Callable[..., Process]]:
    """Start stock proxies: `stock("nginx", server)`."""
    with ExitStack() as stack:

        def start_it(name: str, server: Process, extra: str = "") -> Process:
            directory = tmp_path / f"{name}-{server.port}-{bool(extra)}"
            directory.mkdir()
            proxy = start_stock(name, server.port, directory, extra)
            stack.callback(proxy.kill)
            return proxy

        yield start_it


# Servers that lack a header.
WITHOUT_CACHE_CONTROL = "tests.support.proxies:without_cache_control"
WITHOUT_X_ACCEL_BUFFERING = "tests.support.proxies:without_x_accel_buffering"


def test_every_format_arrives_live(proxy: Process) -> None:
    urls = [f"{proxy.url}/{stream}?steps=2&interval={INTERVAL}" for stream in STREAMS]
    for reading in read_all(*itertools.product(urls, (False, True))):
        assert len(reading.events) == 2
        assert reading.is_live(INTERVAL), reading
        assert "☕\n" in reading.body.decode() or '☕",' in reading.body.decode()


def test_no_reader_gets_the_stream_of_another(proxy: Process) -> None:
    url = f"{proxy.url}/sse?steps=2&interval={INTERVAL}&cache"
    at_the_same_time = read_all((url, False), (url, False))
    afterwards = read(url)
    for reading in [*at_the_same_time, afterwards]:
        assert len(reading.events) == 2
        assert reading.is_live(INTERVAL), reading


@pytest.mark.parametrize("stream", ["ndjson", "sse"])
def test_no_reader_gets_the_answer_to_another_request(proxy: Process, stream: str) -> None:
    """The same URL all the time: only the method and `Last-Event-ID` differ."""
    url = f"{proxy.url}/{stream}?steps=3&interval=0"
    assert read(url, last_event_id=2).status == 204
    assert len(read(url).events) == 3
    assert len(read(url, last_event_id=0).events) == 2
    assert read(url, last_event_id=2).status == 204
    requests.head(url, timeout=10)
    assert len(read(url).events) == 3
    assert requests.get(url, headers={"Last-Event-ID": "x"}, timeout=10).status_code == 422
    assert len(read(url).events) == 3


def test_a_reader_that_leaves_ends_its_stream(proxy: Process, server: Process) -> None:
    """Varnish, Apache and HAProxy notice it only when they cannot pass on an event."""
    # A number of steps that no other test has.
    response = requests.get(f"{proxy.url}/sse?steps=777&interval=0.2", stream=True, timeout=LIMIT)
    assert response.raw.read1(10)
    response.close()
    server.wait_for_log(r"generator closed at event \d+ of 777")


def test_haproxy_delays_events_unless_told_not_to(
    stock: Callable[..., Process], server: Process
) -> None:
    """Without `option http-no-delay` every event but the last is 0.2 s late; live otherwise."""
    path = "/sse?steps=3&interval=1"
    late = read(stock("haproxy", server).url + path).events
    assert late[0] > 0.15
    assert late[1] > 1.15
    prompt = stock("haproxy", server, "option http-no-delay")
    # Half of the delay; however busy the machine is, some stream will do it.
    wait_for(lambda: read(f"{prompt.url}/sse?steps=2&interval=0.3").events[0] < 0.1, "no delay")


def test_without_x_accel_buffering_nginx_holds_a_compressed_stream_back(
    start: Start, stock: Callable[..., Process]
) -> None:
    proxy = stock("nginx", start_app(start, WITHOUT_X_ACCEL_BUFFERING))
    urls = [f"{proxy.url}/{stream}?steps=3&interval=1" for stream in STREAMS]
    for reading in read_all(*((url, False) for url in urls)):
        assert reading.is_live(1)
    for reading in read_all(*((url, True) for url in urls)):
        assert reading.encoding == "gzip"
        assert reading.events[0] > 2  # when the last one was due


def test_without_cache_control_varnish_replays_a_stream(
    start: Start, stock: Callable[..., Process]
) -> None:
    proxy = stock("varnish", start_app(start, WITHOUT_CACHE_CONTROL))
    url = f"{proxy.url}/sse?steps=3&interval=0.5"
    assert read(url).events[-1] >= 1.0
    assert read(url).events[-1] < 0.5  # before the second one was due: all at once
    # And a reader that wants all of it gets 204, because another reader had all of it.
    url = f"{proxy.url}/sse?steps=3&interval=0"
    assert read(url, last_event_id=2).status == 204
    assert read(url).status == 204


def test_without_cache_control_haproxy_compresses(
    start: Start, stock: Callable[..., Process], server: Process
) -> None:
    path = "/sse?steps=1"
    assert read(stock("haproxy", server).url + path, gzip=True).encoding is None
    proxy = stock("haproxy", start_app(start, WITHOUT_CACHE_CONTROL))
    assert read(proxy.url + path, gzip=True).encoding == "gzip"


def test_client_says_that_the_stream_was_held_back(
    start: Start, stock: Callable[..., Process], server: Process
) -> None:
    ((shell, shown),) = commands(Readme("deploy/README.md").tested("held back"))
    *_, url = shlex.split(shell)
    path = url.removeprefix("http://localhost:8080")
    proxy = stock("nginx", start_app(start, WITHOUT_X_ACCEL_BUFFERING))
    held = run_client("client.py", proxy.url + path)
    assert held.returncode == 0
    # How it is cut into pieces is nginx's affair; what counts is the last line.
    summary = shown.splitlines(keepends=True)[-1].replace("6 pieces", "… pieces")
    assert shows("...\n" + summary, held.stdout + held.stderr)
    live = run_client("client.py", stock("nginx", server).url + path)
    assert live.returncode == 0
    assert "held" not in live.stderr
