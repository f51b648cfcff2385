"""recipes/basics.py: what it sends, and what basics.md teaches with it."""

import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import requests

from main import HEADERS
from tests.support.browsers import Browser
from tests.support.processes import LIMIT, Process, Start, starting, wait_for
from tests.support.raw_reader import RawReader, read_until
from tests.support.readme import Readme
from tests.support.recipes import start_app

README = Readme("recipes/basics.md")
FACTS = "tests.recipes.facts:app"
BODIES = {
    "/stream": "chunk 1\nchunk 2\nchunk 3\nchunk 4\nchunk 5\n",
    "/events": "data: event 1\n\ndata: event 2\n\ndata: event 3\n\n",
    "/progress": "data: 25%\n\ndata: 50%\n\ndata: 75%\n\ndata: 100%\n\n",
    "/lines": "alpha\nbeta\ngamma\n",
    "/broken": "data: alpha\ndata: beta\ndata: gamma\n",
    "/mended": "data: alpha\n\ndata: beta\n\ndata: gamma\n\n",
}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Process]:
    with starting(tmp_path_factory.mktemp("basics")) as start:
        yield start_app(start, "recipes.basics:app")


def test_what_each_path_sends_and_when(server: Process) -> None:
    readers = {path: RawReader(server.port, path) for path in BODIES}
    assert read_until(readers.values(), lambda: all(r.ended_at for r in readers.values()))
    for path, reader in readers.items():
        assert reader.body.decode() == BODIES[path]
        assert reader.ended_properly
    for path in ("/stream", "/progress"):  # bit by bit, over three seconds or more
        arrivals = readers[path].arrivals
        assert arrivals[-1] - arrivals[0] > 1
        with requests.get(server.url + path, stream=True, timeout=LIMIT) as response:
            text = path in ("/stream", "/lines")
            media_type = "text/plain" if text else "text/event-stream"
            assert response.headers["Content-Type"] == f"{media_type}; charset=utf-8"
            assert HEADERS.items() <= response.headers.items()


def test_streams_end_properly_when_the_reader_leaves_or_the_server_stops(start: Start) -> None:
    server = start_app(start, "tests.recipes.facts:basics_app")
    for path, what in (("/stream", "chunks"), ("/progress", "percentages")):
        reader = RawReader(server.port, path)
        assert read_until([reader], lambda: reader.arrivals)  # noqa: B023
        reader.close()
        server.wait_for_log(f"{what} closed")

    readers = [RawReader(server.port, path) for path in ("/stream", "/progress")]
    assert read_until(readers, lambda: all(reader.status for reader in readers))
    server.signal(signal.SIGTERM)
    assert read_until(readers, lambda: all(reader.ended_at for reader in readers))
    for reader in readers:
        assert reader.ended_properly
        body = reader.body.decode()
        assert BODIES[reader.path].startswith(body)
        assert body != BODIES[reader.path]
    server.wait()
    assert "ERROR" not in server.log


# Sync or async ------------------------------------------------------------------------------------


def sixty(server: Process, path: str, **expected: int) -> list[RawReader]:
    """Let 60 readers come; wait until as many of their generators run, or wait, as expected."""

    def are_there() -> bool:
        counts = requests.get(f"{server.url}/wait", timeout=LIMIT).json()
        return bool(expected.items() <= counts.items())

    readers = [RawReader(server.port, path) for _ in range(60)]
    wait_for(are_there, f"60 readers of {path}: {expected}")
    return readers


def release(readers: list[RawReader], file: Path) -> None:
    file.touch()
    assert read_until(readers, lambda: all(reader.ended_at for reader in readers))
    assert all(reader.body == b"released\n" for reader in readers)


def test_of_sixty_sync_streams_twenty_wait_and_sixty_async_ones_all_run(
    start: Start, tmp_path: Path
) -> None:
    file = tmp_path / "release"
    server = start_app(start, FACTS, RELEASE=str(file))
    release(sixty(server, "/wait/sync", run=40, wait=20), file)
    file.unlink()
    release(sixty(server, "/wait/async", run_async=60), file)


def test_more_threads(start: Start, tmp_path: Path) -> None:
    (tmp_path / "more.py").write_text(
        "from contextlib import asynccontextmanager\n"
        "import anyio.to_thread\n"
        "from fastapi import FastAPI\n"
        "from tests.recipes.facts import router\n"
        + README.tested("more threads")
        + "app.include_router(router)\n"
    )
    file = tmp_path / "release"
    server = start_app(start, "more:app", PYTHONPATH=str(tmp_path), RELEASE=str(file))
    release(sixty(server, "/wait/sync", run=60, wait=0), file)


def test_one_blocking_call_in_an_async_generator_stops_everybody(
    start: Start, tmp_path: Path
) -> None:
    """With the README's generator, whose `time.sleep` lasts until the test lets it go on."""
    (tmp_path / "wrong.py").write_text(
        "from types import SimpleNamespace\n"
        "from recipes import basics\n"
        "from tests.recipes.facts import wait\n"
        "time = SimpleNamespace(sleep=wait)\n"
        + README.tested("one blocking call")
        + "basics.percentages = percentages\n"
        "app = basics.app\n"
    )
    file = tmp_path / "release"
    server = start_app(start, "wrong:app", PYTHONPATH=str(tmp_path), RELEASE=str(file))
    reader = RawReader(server.port, "/progress")
    assert read_until([reader], lambda: reader.status)
    with pytest.raises(requests.ReadTimeout):
        requests.get(f"{server.url}/lines", timeout=(LIMIT, 1))
    file.touch()
    assert requests.get(f"{server.url}/lines", timeout=LIMIT).text == BODIES["/lines"]
    assert read_until([reader], lambda: reader.ended_properly)


def test_how_to_test_a_stream() -> None:
    tests: dict[str, Any] = {}
    exec(README.tested("how to test a stream"), tests)
    tests["test_what_is_sent"]()
    tests["test_that_it_is_live"]()


# In a browser -------------------------------------------------------------------------------------


def test_a_browser_sees_no_event_without_the_blank_lines(browser: Browser, server: Process) -> None:
    read = README.tested("in a browser")
    browser.open(f"{server.url}/lines")
    for path, seen in (
        ("/broken", []),
        ("/mended", ["alpha", "beta", "gamma"]),
        ("/events", ["event 1", "event 2", "event 3"]),
    ):
        browser.run(
            "window.seen = []; window.console.log = (data) => seen.push(data);"
            + read.replace("/broken", path)
            + "; source.onerror = () => { source.close(); window.ended = true }"
            + "; window.ended = false"
        )
        # The end of a stream is an error to it: it means to come again.
        wait_for(lambda: browser.run("return ended"), f"the end of {path}")
        assert browser.run("return seen") == seen
