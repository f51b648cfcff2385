"""What the README says of libraries and of browsers, seen to be so."""

import asyncio
import time
from collections.abc import Callable
from typing import Any

import aiohttp
import pytest
import requests
from aiohttp.http_exceptions import LineTooLong

from tests.readme.test_readme import README
from tests.support.browsers import Browser
from tests.support.processes import LIMIT, Process, wait_for
from tests.support.wrong_servers import CHUNKED, CLOSED, END, Connection, chunk, event, wrong_server


def test_raw_readline_of_requests_asks_for_one_byte_at_a_time(
    shared_server: Process, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = f"{shared_server.url}/ndjson?steps=1&interval=0"
    with requests.get(url, stream=True, timeout=LIMIT) as response:
        sizes = []
        read: Callable[..., bytes] = response.raw.read

        def counted(size: int, *arguments: Any, **options: Any) -> bytes:
            sizes.append(size)
            return read(size, *arguments, **options)

        monkeypatch.setattr(response.raw, "read", counted)
        assert response.raw.readline().endswith(b"}\n")
        assert set(sizes) == {1}


@pytest.mark.parametrize("chunked", [True, False], ids=["chunked", "not chunked"])
def test_iter_lines_waits_for_512_bytes_where_the_answer_is_not_chunked(chunked: bool) -> None:
    def answer(connection: Connection) -> None:
        if chunked:
            connection.send(CHUNKED + chunk(event(0)) + chunk(event(1)))
        else:
            connection.send(CLOSED + event(0) + event(1))
        connection.wait_until_closed()

    with wrong_server(answer) as server:
        lines = requests.get(server.url, stream=True, timeout=(LIMIT, 2)).iter_lines()
        if chunked:
            assert next(lines) + b"\n" == event(0)
        else:
            with pytest.raises(requests.ConnectionError):  # a time-out: no line is shown
                next(lines)


def test_a_session_of_aiohttp_refuses_long_lines_and_ends_after_five_minutes() -> None:
    long = chunk(event(0, data="x" * 600_000)) + END

    async def read(url: str) -> None:
        async with aiohttp.ClientSession() as session, session.get(url) as response:
            assert session.timeout.total == 300
            await response.content.readline()

    with wrong_server(CHUNKED + long) as server, pytest.raises(LineTooLong):
        asyncio.run(read(server.url))


def test_an_eventsource_fails_for_good_on_a_503(browser: Browser, shared_server: Process) -> None:
    def answer(connection: Connection) -> None:
        connection.send(
            b"HTTP/1.1 503 Service Unavailable\r\nAccess-Control-Allow-Origin: *\r\n"
            b"Content-Length: 0\r\nConnection: close\r\n\r\n"
        )

    with wrong_server(answer) as server:
        browser.open(shared_server.url)
        browser.run("window.source = new EventSource(arguments[0])", server.url)
        wait_for(lambda: browser.run("return source.readyState") == 2, "the source to be closed")


def test_a_browser_opens_six_connections_to_a_host(
    browser: Browser, shared_server: Process
) -> None:
    browser.open(shared_server.url)
    browser.run(
        """window.sources = Array.from(Array(8), () => new EventSource("/sse?interval=10"))"""
    )

    def opened() -> int:
        return int(browser.run("return sources.filter((s) => s.readyState == 1).length"))

    wait_for(lambda: opened() == 6, "six to be open")
    time.sleep(1)
    assert opened() == 6
    browser.run("sources.find((s) => s.readyState == 1).close()")
    wait_for(lambda: opened() == 6, "the next to have its turn")
    # A page that one has left keeps its connections for a while, in the back/forward cache.
    browser.run("sources.forEach((s) => s.close())")


def test_two_lines_in_the_console_of_the_page_read_the_stream(
    browser: Browser, shared_server: Process
) -> None:
    browser.open(shared_server.url)
    browser.run("window.seen = []; console.log = (event) => seen.push(event.event_id)")
    end = '"GET /sse?interval=0.1 HTTP/1.1" 204'
    before = shared_server.log.count(end)
    browser.run(README.only("run: in a browser").replace("'/sse'", "'/sse?interval=0.1'"))
    wait_for(lambda: browser.run("return seen.length") == 10, "ten events")
    assert browser.run("return seen") == list(range(10))
    # It stops by itself, at the 204.
    wait_for(lambda: shared_server.log.count(end) == before + 1, "the 204")
