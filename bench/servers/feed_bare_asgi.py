"""A feed on bare ASGI: the same bytes, a future for each reader, and nothing else.

No framework, no resuming, no keep-alive, and nobody notices that a reader has left.
"""

import asyncio
import json

from starlette.types import Receive, Scope, Send

frames: list[bytes] = []
waiting: list[asyncio.Future[None]] = []


async def app(scope: Scope, receive: Receive, send: Send) -> None:
    if scope["method"] == "POST":
        body, more = b"", True
        while more:
            message = await receive()
            body += message["body"]
            more = message["more_body"]
        frames.append(b"id: %d\ndata: %b\n\n" % (len(frames), json.loads(body)["data"].encode()))
        readers, waiting[:] = waiting[:], []
        for reader in readers:
            reader.set_result(None)
        await send({"type": "http.response.start", "status": 201, "headers": []})
        await send({"type": "http.response.body"})
        return
    loop = asyncio.get_running_loop()
    place = len(frames)
    headers = [(b"content-type", b"text/event-stream")]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    while True:
        if place == len(frames):
            reader = loop.create_future()
            waiting.append(reader)
            await reader
        await send({"type": "http.response.body", "body": frames[place], "more_body": True})
        place += 1
