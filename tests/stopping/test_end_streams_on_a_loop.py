"""`EndStreams` on an event loop, where it is known what happens in which turn."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import anyio
import pytest
from starlette.requests import Request
from starlette.responses import StreamingResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from main import EndStreams
from tests.support.processes import LIMIT

T = TypeVar("T")

ASGI = {"version": "3.0", "spec_version": "2.3"}
HTTP: Scope = {"type": "http", "asgi": ASGI, "headers": []}
DISCONNECT: Message = {"type": "http.disconnect"}


def start_message(**headers: str) -> Message:
    raw = [(key.replace("_", "-").encode(), value.encode()) for key, value in headers.items()]
    return {"type": "http.response.start", "status": 200, "headers": raw}


SSE = start_message(content_type="text/event-stream; charset=utf-8")


class Server:
    """What a server does for one request: it keeps what is sent. The reader stays."""

    def __init__(self, app: ASGIApp, scope: Scope = HTTP) -> None:
        self.app, self.scope = app, scope
        self.sent: list[Message] = []

    async def receive(self) -> Message:
        return await asyncio.Future[Message]()

    async def send(self, message: Message) -> None:
        self.sent.append(message)

    @property
    def ends(self) -> int:
        return sum(
            message["type"] == "http.response.body" and not message.get("more_body")
            for message in self.sent
        )

    async def run(self) -> None:
        await self.app(self.scope, self.receive, self.send)


class Listener:
    """An app that begins a response, and keeps what it is told in `receive`."""

    def __init__(self, *messages: Message, patience: float = 0) -> None:
        self.messages = messages or (SSE,)
        self.patience = patience  # for how many seconds it goes on after that
        self.told: list[object] = []

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        for message in self.messages:
            await send(message)
        self.told.append(await receive())
        await asyncio.sleep(self.patience)


def on_a_loop(work: Coroutine[Any, Any, T]) -> T:
    """Run it in a thread: there no signal handlers are touched."""

    async def in_time() -> T:
        return await asyncio.wait_for(work, LIMIT)

    with ThreadPoolExecutor(1) as thread:
        return thread.submit(asyncio.run, in_time()).result()


async def turns(count: int) -> None:
    for _ in range(count):
        await asyncio.sleep(0)


async def begin(server: Server) -> asyncio.Task[None]:
    running = asyncio.create_task(server.run())
    await turns(5)
    return running


async def stopped(app: ASGIApp, scope: Scope = HTTP, turn: int = 0) -> Server:
    """Ask an app, stop the server some turns later; wait until the app has returned."""
    server = Server(EndStreams(app), scope)
    running = await begin(server)
    await turns(turn)
    EndStreams.stop()
    # Two signals may well come in one turn: from the terminal, and from a parent process.
    EndStreams.stop()
    await running
    assert running.cancelling() == 0
    return server


def test_a_stream_is_ended_once() -> None:
    app = Listener()
    assert on_a_loop(stopped(app)).ends == 1
    assert app.told == [DISCONNECT]


def test_several_tasks_listen() -> None:
    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await send(SSE)
        for message in (*await asyncio.gather(receive(), receive()), await receive()):
            assert message == DISCONNECT

    assert on_a_loop(stopped(app)).ends == 1


@pytest.mark.parametrize("turn", range(6))
def test_polling(turn: int) -> None:
    """`request.is_disconnected()` cancels its own `receive` again and again."""

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await send(SSE)
        while not await Request(scope, receive).is_disconnected():
            await turns(1)

    assert on_a_loop(stopped(app, turn=turn)).ends == 1


# The cancellations of others ----------------------------------------------------------------------

Cancel = Callable[[], object]
Strike = Callable[[Cancel], None]


async def task(server: Server, strike: Strike) -> None:
    running = asyncio.create_task(server.run())
    strike(running.cancel)
    await running


async def asyncio_timeout(server: Server, strike: Strike) -> None:
    async with asyncio.timeout(None) as timeout:
        strike(lambda: timeout.reschedule(0))
        await server.run()


async def anyio_scope(server: Server, strike: Strike) -> None:
    with anyio.CancelScope() as scope:
        strike(scope.cancel)
        await server.run()
    if scope.cancelled_caught:
        raise TimeoutError


async def task_group(server: Server, strike: Strike) -> None:
    async def fail() -> None:
        raise ZeroDivisionError

    async with asyncio.TaskGroup() as group:
        strike(lambda: group.create_task(fail()))
        await server.run()


@pytest.mark.parametrize("order", ["cancel", "cancel, stop", "stop, cancel"])
@pytest.mark.parametrize(
    ("cancelled_by", "raised"),
    [
        (task, asyncio.CancelledError),
        (asyncio_timeout, TimeoutError),
        (anyio_scope, TimeoutError),
        (task_group, ExceptionGroup),
    ],
)
def test_the_cancellations_of_others_are_not_swallowed(
    cancelled_by: Callable[[Server, Strike], Awaitable[None]],
    raised: type[BaseException],
    order: str,
) -> None:
    """Not even one that comes in the same turn as the server's stop."""

    async def main() -> None:
        def strike(cancel: Cancel) -> None:
            def now() -> None:
                for what in order.split(", "):
                    if what == "stop":
                        EndStreams.stop()  # in the next turn
                    else:
                        loop.call_soon(cancel)

            loop.call_later(0.01, now)

        loop = asyncio.get_running_loop()
        server = Server(EndStreams(Listener(patience=LIMIT)))
        with pytest.raises(raised):
            await cancelled_by(server, strike)
        assert server.ends == 0
        main_task = asyncio.current_task()
        assert main_task
        assert main_task.cancelling() == 0

    on_a_loop(main())


# What servers and apps may do, by the standard ----------------------------------------------------


@pytest.mark.parametrize("version", ["2.0", "2.3", "2.4", "2.5"])
def test_asgi_versions(version: str) -> None:
    """From ASGI 2.4 on, Starlette does not listen for its reader to leave."""

    async def events() -> AsyncIterator[str]:
        while True:
            yield ":\n\n"
            await asyncio.sleep(0)

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        response = StreamingResponse(events(), media_type="text/event-stream")
        await response(scope, receive, send)

    scope = {**HTTP, "asgi": {"version": "3.0", "spec_version": version}}
    assert on_a_loop(stopped(app, scope)).ends == 1


@pytest.mark.parametrize(
    ("messages", "told_so", "ended"),
    [
        ([start_message(content_type="Text/Event-Stream")], True, True),
        ([{"type": "http.response.early_hint", "links": []}, SSE], True, True),
        ([{**SSE, "headers": [*SSE["headers"], (b"content-length", b"1000")]}], False, False),
        ([{**SSE, "headers": [*SSE["headers"], (b"content-encoding", b"gzip")]}], True, False),
        ([start_message(content_type="application/octet-stream")], False, False),
        ([start_message()], False, False),
        ([{"type": "http.response.start", "status": 200}], False, False),
        ([], False, False),
    ],
)
def test_which_responses_are_ended(messages: list[Message], told_so: bool, ended: bool) -> None:
    """What was compressed is told so too, but only its compressor could end it: it stays cut."""

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        for message in messages:
            await send(message)
        told.append(await receive())

    async def main() -> None:
        server = Server(EndStreams(app))
        running = await begin(server)
        EndStreams.stop()
        await turns(5)
        assert running.done() == told_so
        running.cancel()
        assert server.ends == ended
        assert told == [DISCONNECT] * told_so

    told: list[Message] = []
    on_a_loop(main())


LAST_WORDS: Message = {"type": "http.response.body", "body": b"data: bye\n\n"}
END: Message = {"type": "http.response.body"}
JSON = start_message(content_type="application/json")


@pytest.mark.parametrize(
    ("more", "passed_on"),
    [
        ([LAST_WORDS], [LAST_WORDS]),
        # The MCP SDK answers again, and what is built on it may even send a JSON `null`.
        ([JSON, {**END, "body": b"null"}], [END]),
        ([JSON, {**END, "body": b"null", "more_body": True}], [END]),
    ],
)
def test_what_an_app_sends_after_it_was_told(more: list[Message], passed_on: list[Message]) -> None:
    """The end of its body, or a second answer, which nobody could read."""

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await Listener()(scope, receive, send)
        for message in more:
            await send(message)

    assert on_a_loop(stopped(app)).sent == [SSE, *passed_on]
