"""A server that stops in one way or another: `python main.py WAY PORT`.

The tests copy this file, as main.py, into a folder with the end_streams.py that they cut out of
our main.py. The app is plain ASGI. It never asks whether its reader has left.
"""

import asyncio
import importlib.util
import signal
import sys
from typing import Any

import end_streams  # type: ignore[import-not-found]
import uvicorn


async def app(scope: Any, receive: Any, send: Any) -> None:
    if scope["type"] == "lifespan":
        while True:
            message = await receive()
            await send({"type": f"{message['type']}.complete"})
    if scope["path"] == "/now" and way in LATER:
        LATER[way]()
    if scope["path"] == "/stop":
        server.should_exit = True
    headers = [(b"Content-Type", b"Text/Event-Stream; charset=utf-8")]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    while scope["path"] != "/short":
        await send({"type": "http.response.body", "body": b"data: x\n\n", "more_body": True})
        await asyncio.sleep(0.1)
    await send({"type": "http.response.body"})


def copied() -> Any:
    """Import end_streams.py a second time, as a library would that has a copy of its own."""
    spec = importlib.util.spec_from_file_location("copied", end_streams.__file__)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


inner = end_streams.EndStreams(app), copied().EndStreams(app)


async def two_copies(scope: Any, receive: Any, send: Any) -> None:
    """Side by side: /now and all else are behind different copies."""
    await inner[scope.get("path") == "/now"](scope, receive, send)


# Ways to stop -------------------------------------------------------------------------------------


def exit_now(*_: object) -> None:
    server.should_exit = True


def replace_handlers() -> None:
    for signum in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signum, exit_now)


def chain_handlers() -> None:
    for signum in (signal.SIGINT, signal.SIGTERM):
        before: Any = signal.getsignal(signum)
        signal.signal(signum, lambda *args, before=before: before(*args))


def add_to_loop() -> None:
    for signum in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(signum, exit_now)


class Worker:
    """Not a server, although it has begun to do something."""

    started = True

    def exit_now(self, *_: object) -> None:
        exit_now()


def use_a_method() -> None:
    for signum in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signum, Worker().exit_now)


LATER = {
    "replaced": replace_handlers,
    "chained": chain_handlers,
    "on the loop": add_to_loop,
    "a method, should_exit": use_a_method,
}

if __name__ == "__main__":
    way, port = sys.argv[1:]
    stack = two_copies if "copies" in way else end_streams.EndStreams(app)
    limit = 1 if "limit" in way else None
    server = uvicorn.Server(uvicorn.Config(stack, port=int(port), limit_max_requests=limit))
    server.run()
