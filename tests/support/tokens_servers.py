"""The recipes `tokens` and `relay` as tests run them.

The environment variable CONSTANTS changes their constants: `{"parrot.SECONDS_PER_TOKEN": 0}`.
`cut_up` is `tokens` with its streams in small pieces, `failing` is one whose model fails.
`repeated` is `tokens` behind a middleware that has read the body, and gives it again and again.
"""

import asyncio
import importlib
import json
import os
from collections.abc import AsyncGenerator

from starlette.types import Message, Receive, Scope, Send

for name, value in json.loads(os.environ.get("CONSTANTS", "{}")).items():
    module, _, constant = name.partition(".")
    recipe = importlib.import_module(f"recipes.{module}")
    assert hasattr(recipe, constant), name
    setattr(recipe, constant, value)
    if constant == "STALLED_AFTER":
        recipe.client.timeout = value


def __getattr__(name: str) -> object:
    """`uvicorn tests.support.tokens_servers:relay` imports that recipe, and no other."""
    if name in ("tokens", "relay"):
        return importlib.import_module(f"recipes.{name}").app
    raise AttributeError(name)


async def failing(scope: Scope, receive: Receive, send: Send) -> None:
    """A model that fails at the third token."""
    from recipes import tokens
    from recipes.parrot import to_tokens

    async def broken(text: str) -> AsyncGenerator[str]:
        for token in to_tokens(text)[:2]:
            yield token
        raise RuntimeError("out of memory")

    vars(tokens)["parrot"] = broken
    await tokens.app(scope, receive, send)


async def cut_up(scope: Scope, receive: Receive, send: Send) -> None:
    """Line ends of all three kinds, an event over two lines, and one byte at a time."""
    from recipes import tokens

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

    await tokens.app(scope, receive, cut if scope["type"] == "http" else send)


async def repeated(scope: Scope, receive: Receive, send: Send) -> None:
    from recipes import tokens

    async def repeat() -> Message:
        await asyncio.sleep(0)
        return message

    if scope["type"] == "http":
        message = await receive()
        while message["more_body"]:
            message = {**(more := await receive()), "body": message["body"] + more["body"]}
    await tokens.app(scope, repeat if scope["type"] == "http" else receive, send)
