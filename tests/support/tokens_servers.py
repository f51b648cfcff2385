"""The recipe `tokens` in trouble: `uvicorn tests.support.tokens_servers:failing`, and others."""

import asyncio
from collections.abc import AsyncGenerator

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from recipes import tokens as recipe
from recipes.parrot import to_tokens
from tests.support import changed

tokens: ASGIApp = changed.tokens


async def failing(scope: Scope, receive: Receive, send: Send) -> None:
    """A model that fails at the third token."""

    async def broken(text: str) -> AsyncGenerator[str]:
        for token in to_tokens(text)[:2]:
            yield token
        raise RuntimeError("out of memory")

    vars(recipe)["parrot"] = broken
    await tokens(scope, receive, send)


async def cut_up(scope: Scope, receive: Receive, send: Send) -> None:
    """Line ends of all three kinds, an event over two lines, and one byte at a time."""
    stream = False

    async def cut(message: Message) -> None:
        nonlocal stream
        if message["type"] == "http.response.start":
            stream = b"text/event-stream" in dict(message["headers"])[b"content-type"]
        if not stream or message["type"] != "http.response.body" or not message["body"]:
            await send(message)
            return
        data = message["body"].removeprefix(b"data: ").removesuffix(b"\n\n")
        data = data.replace(b',"object"', b'\r\ndata:,"object"')
        for i, byte in enumerate(b": a comment\revent: x\r\n\r\ndata:" + data + b"\r\r\n: y\n"):
            await send({"type": "http.response.body", "body": bytes([byte]), "more_body": True})
            if i % 3 == 0:
                await asyncio.sleep(0)  # what is sent in one turn leaves in one piece

    await tokens(scope, receive, cut if scope["type"] == "http" else send)


async def repeated(scope: Scope, receive: Receive, send: Send) -> None:
    """Behind a middleware that has read the body, and gives it again and again."""

    async def repeat() -> Message:
        await asyncio.sleep(0)
        return message

    if scope["type"] == "http":
        message = await receive()
        while message["more_body"]:
            message = {**(more := await receive()), "body": message["body"] + more["body"]}
    await tokens(scope, repeat if scope["type"] == "http" else receive, send)
