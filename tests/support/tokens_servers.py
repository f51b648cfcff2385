"""The recipe `tokens` as tests run it: `uvicorn tests.support.tokens_servers:parrot`.

The environment variable CONSTANTS (JSON) changes its constants, and the parrot prints how many
tokens it makes. `cut_up` is the same with its streams in small pieces.
"""

import asyncio
import json
import os
from collections.abc import Generator

from starlette.types import Message, Receive, Scope, Send

from recipes import tokens

for name, value in json.loads(os.environ.get("CONSTANTS", "{}")).items():
    assert hasattr(tokens, name), name
    setattr(tokens, name, value)

parrot = tokens.app
squawk = tokens.squawk


def counted(prompt: str) -> Generator[str]:
    """The parrot, but it prints when it begins and after how many tokens it stopped."""
    made = 0
    print(f"the parrot begins: {prompt}", flush=True)
    try:
        for token in squawk(prompt):
            made += 1
            yield token
    finally:
        print(f"the parrot stopped after {made} tokens: {prompt}", flush=True)


tokens.squawk = counted


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

    await parrot(scope, receive, cut if scope["type"] == "http" else send)
