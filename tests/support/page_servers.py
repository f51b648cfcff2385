"""The server as the page may find it, such as `uvicorn tests.support.page_servers:markup`."""

import asyncio
import json

from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

from main import app

STREAMS = ("/text", "/ndjson", "/sse")


MARKUP = '<img src="x" onerror="document.title = 1"><b>bold</b>\ufeff'


async def markup(scope: Scope, receive: Receive, send: Send) -> None:
    """Data that would be markup, if the page took it for that."""

    async def replace(message: Message) -> None:
        if scope["path"] in STREAMS and message["type"] == "http.response.body":
            data = MARKUP if scope["path"] == "/text" else json.dumps(MARKUP)[1:-1]
            message["body"] = message.get("body", b"").replace(b"Step", data.encode())
        await send(message)

    await app(scope, receive, replace if scope["type"] == "http" else send)


async def telling(scope: Scope, receive: Receive, send: Send) -> None:
    """A server that prints after which event a stream was resumed, and when one is over."""
    for name, value in scope.get("headers", []):
        if name == b"last-event-id":
            print(f"{scope['path']} after {value.decode()}", flush=True)
    await app(scope, receive, send)
    if scope["type"] == "http":
        print(f"{scope['path']} is over", flush=True)


async def gap(scope: Scope, receive: Receive, send: Send) -> None:
    """A server that loses event 2."""

    async def lose(message: Message) -> None:
        if b'"event_id":2,' in message.get("body", b""):
            message["body"] = b""
        await send(message)

    await app(scope, receive, lose if scope["type"] == "http" else send)


painted = asyncio.Event()


async def painted_first(scope: Scope, receive: Receive, send: Send) -> None:
    """The page's scripts come when the page says, at `/painted`, that it is painted without them.

    So it is on a busy machine, or behind a slow connection.
    """
    path = scope.get("path", "")
    if path == "/":
        painted.clear()
    if path == "/painted":
        painted.set()
        await Response(status_code=204)(scope, receive, send)
        return
    if path.endswith(".js"):
        await painted.wait()
    await app(scope, receive, send)
