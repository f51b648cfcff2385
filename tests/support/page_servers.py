"""The server as the page may find it: `uvicorn tests.support.page_servers:app`.

The first part of the path says which: `/gap/` is the page of a server that loses an event. Below
any other name, it is as always. It prints when a stream was resumed, and when an answer is over.
"""

import asyncio
import json

from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

import main

MARKUP = '<img src="x" onerror="document.title = 1"><b>bold</b>\ufeff'
painted = asyncio.Event()


async def app(scope: Scope, receive: Receive, send: Send) -> None:
    if scope["type"] != "http":
        await main.app(scope, receive, send)
        return
    _, variant, path = scope["path"].split("/", 2)

    async def changed(message: Message) -> None:
        body = message.get("body", b"")
        if variant == "markup" and path in ("text", "ndjson", "sse"):
            data = MARKUP if path == "text" else json.dumps(MARKUP)[1:-1]
            message["body"] = body.replace(b"Step", data.encode())
        if variant == "gap" and b"Step 3 of" in body:
            message["body"] = b""
        await send(message)

    # The page's scripts come when the page says, at `painted`, that it is painted without them: as
    # on a busy machine, or behind a slow connection.
    if variant == "slow" and path == "":
        painted.clear()
    if variant == "slow" and path.endswith(".js"):
        await painted.wait()
    if path == "painted":
        painted.set()
        await Response(status_code=204)(scope, receive, send)
        return
    for name, value in scope["headers"]:
        if name == b"last-event-id":
            print(f"{scope['path']} after {value.decode()}", flush=True)
    await main.app({**scope, "path": f"/{path}"}, receive, changed)
    print(f"{scope['path']} is over", flush=True)
