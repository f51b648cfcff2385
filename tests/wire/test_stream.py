"""`Stream` in apps of other people: closed at once however it ends, and an ordinary response."""

import asyncio
import re
import socket
from collections.abc import AsyncIterator

import pytest
import requests
from starlette.testclient import TestClient, WebSocketDenialResponse
from starlette.types import Message

from main import Stream
from tests.support.processes import LIMIT, Process, Start, start_app
from tests.support.raw_reader import RawReader, read_until, wait_until_idle
from tests.support.stream_apps import app as its_app

WAYS = ("/stream/", "/logged/", "/plain/", "/mount/")


@pytest.fixture
def app(start: Start) -> Process:
    return start_app(start, "tests.support.stream_apps:app")


def begin(app: Process, target: str, receive_buffer: int = 0) -> RawReader:
    reader = RawReader(app.port, target, receive_buffer=receive_buffer)
    assert read_until([reader], lambda: reader.arrivals)
    return reader


def stop(app: Process, readers: list[RawReader]) -> None:
    """Stop the server; each body gets its proper end."""
    app.signal(15)
    assert read_until(readers, lambda: all(reader.ended_at for reader in readers))
    assert all(reader.ended_properly for reader in readers)
    app.wait()


def test_its_finally_awaits_however_it_ends(app: Process) -> None:
    """Because it ended or raised, its reader left, or the server stopped."""
    for count, way in enumerate(WAYS, start=1):
        with requests.get(f"{app.url}{way}ends", timeout=LIMIT) as answer:
            assert answer.text == "ends\n"
        app.wait_for_log("closed ends", count)

        raises = begin(app, f"{way}raises")
        assert read_until([raises], lambda: raises.ended_at)  # noqa: B023
        # Below `@app.middleware("http")`, Starlette writes the end that its app did not write.
        assert raises.ended_properly == (way == "/mount/")
        app.wait_for_log("closed raises", count)

        begin(app, f"{way}sleeps").close()
        app.wait_for_log("closed sleeps", count)

    stop(app, [begin(app, f"{way}stopped") for way in WAYS])
    assert app.log.count("closed stopped") == len(WAYS)
    assert app.log.count("ERROR") == app.log.count("\nZeroDivisionError") == len(WAYS), app.log
    # A generator that was put around its iterator is closed too.
    assert re.findall(r"sent \d+ \d+", app.log) == [f"sent 200 {n}" for n in (5, 7, 7, 8)]


def test_a_reader_leaves_before_the_answer_begins(app: Process) -> None:
    reader = RawReader(app.port, "/begun/sleeps")
    app.wait_for_log("first sleeps")
    reader.close()
    app.wait_for_log("closed sleeps")


def test_a_generator_that_swallows_its_cancellation(app: Process) -> None:
    """It is closed after its next chunk, or it would go on for nobody."""
    begin(app, "/stream/swallows").close()
    app.wait_for_log("closed swallows")
    stop(app, [begin(app, "/stream/swallows")])


def test_a_slow_reader_leaves(app: Process) -> None:
    """While `send` waits; and the generator never awaits, so that it could stop everybody else."""
    readers = [begin(app, f"{way}never_awaits", receive_buffer=4096) for way in WAYS]
    wait_until_idle(app)  # its `send` waits
    for reader in readers:
        reader.close()
    app.wait_for_log("closed never_awaits", len(WAYS))
    assert requests.get(f"{app.url}/stream/ends", timeout=LIMIT).text == "ends\n"


def test_a_generator_that_never_awaits_lets_others_run() -> None:
    """Also if its reader is so fast that `send` never waits."""

    async def chunks() -> AsyncIterator[bytes]:
        for _ in range(1000):
            yield b"x"

    async def count_turns() -> int:
        turns = 0

        async def take_turns() -> None:
            nonlocal turns
            while True:
                turns += 1
                await asyncio.sleep(0)

        others = asyncio.create_task(take_turns())
        assert len([chunk async for chunk in Stream(chunks()).body_iterator]) == 1000
        others.cancel()
        return turns

    assert asyncio.run(count_turns()) > 10


def test_a_time_limit_of_a_middleware(app: Process) -> None:
    """AnyIO cancels every `await` of a task, but the cleanup still runs to its end, and before."""
    reader = begin(app, "/stream/time_limit")
    assert read_until([reader], lambda: reader.ended_at)
    assert not reader.ended_properly
    app.wait_for_log("closed time_limit\ntime is up")


def test_cancelled_again_while_it_closes(caplog: pytest.LogCaptureFixture) -> None:
    """By a time limit after its reader left: the cleanup runs to its end all the same."""

    async def run() -> None:
        closed = asyncio.Event()

        async def chunks() -> AsyncIterator[str]:
            try:
                yield "x"
                await asyncio.sleep(600)
            finally:
                await asyncio.sleep(0.1)
                closed.set()

        async def receive() -> Message:
            await asyncio.sleep(600)
            return {"type": "http.disconnect"}

        async def send(_: Message) -> None:
            pass

        request = asyncio.create_task(Stream(chunks())({"type": "http"}, receive, send))
        for _ in range(2):
            await asyncio.sleep(0.02)
            request.cancel()
        await closed.wait()
        await asyncio.sleep(0.01)
        assert request.cancelled()

    asyncio.run(run())
    assert not caplog.text


def test_a_sync_generator_is_closed_in_a_thread(app: Process) -> None:
    """When its reader leaves, and when the server stops: after the step that it is in."""
    readers = [begin(app, f"/sync/left-{number}") for number in range(5)]
    for reader in readers:
        reader.close()
    app.wait_for_log(r"closed left-\d", count=5)
    stop(app, [begin(app, "/sync/stopped")])
    assert "closed stopped" in app.log
    assert not re.search("Traceback|ERROR", app.log), app.log


def test_a_head_of_it_does_not_hold_up_the_server(app: Process) -> None:
    with socket.create_connection(("127.0.0.1", app.port), LIMIT) as connection:
        connection.sendall(b"HEAD /plain/sleeps HTTP/1.1\r\nHost: x\r\n\r\n")
        assert b" 200 OK" in connection.recv(4096)
        app.signal(15)
        app.wait()
    app.wait_for_log("closed sleeps")


def test_it_is_an_ordinary_response(app: Process) -> None:
    """Its arguments are those of `StreamingResponse`; the headers of every stream are added."""
    answer = requests.get(f"{app.url}/options", timeout=LIMIT)
    assert (answer.status_code, answer.text) == (203, "ends\n")
    expected = {
        "X-Own": "1",
        "Cache-Control": "private",
        "X-Accel-Buffering": "no",
        "Content-Type": "text/plain; charset=utf-8",
    }
    assert {name: answer.headers[name] for name in expected} == expected
    app.wait_for_log("closed ends\nbackground")
    assert requests.get(f"{app.url}/mount/ends", timeout=LIMIT).headers["X-Mark"] == "seen"
    plain = requests.get(f"{app.url}/plain/ends", timeout=LIMIT)
    assert plain.headers["Cache-Control"] == "no-cache, no-transform"

    # A middleware may give the app a body that it has read itself, each time that the app asks.
    assert requests.get(f"{app.url}/repeated", timeout=LIMIT).text == "ends\n"
    # A database's cursor is no generator: its `close()`, a coroutine, is its owner's business.
    assert requests.get(f"{app.url}/cursor", timeout=LIMIT).text == "row\nrow\n"
    assert "never awaited" not in app.log


def test_in_a_test_client() -> None:
    with TestClient(its_app) as client:
        assert client.get("/stream/ends").text == "ends\n"
        with pytest.raises(ZeroDivisionError):
            client.get("/stream/raises")


def test_it_refuses_a_websocket() -> None:
    """As any response does: https://asgi.readthedocs.io/en/latest/extensions.html#websocket-denial-response"""
    with TestClient(its_app) as client, pytest.raises(WebSocketDenialResponse) as refusal:
        client.websocket_connect("/refused").__enter__()
    assert (refusal.value.status_code, refusal.value.text) == (403, "ends\n")
