"""The model of `tokens`, `relay` and `answers`: a parrot, which repeats what it hears.

    async with aclosing(parrot("Hello, world!")) as tokens:
        async for token in tokens:
            print(token, end="", flush=True)

It replaces a real model, so that these recipes run without a key. As with a real one, a token takes
a while to make, and a token that nobody reads is wasted.
"""

import asyncio
import logging
import re
import socket
import threading
from collections.abc import AsyncGenerator

import uvicorn

SECONDS_PER_TOKEN = 0.03
logger = logging.getLogger("uvicorn.error")  # `uvicorn --log-level debug` shows when it stops


def to_tokens(text: str) -> list[str]:
    """Cut a text into words (with the space before) and punctuation. No character is lost."""
    return re.findall(r" ?\w+|\s|[^\w\s]", text)


async def parrot(text: str) -> AsyncGenerator[str]:
    """Yield the text again, a token every SECONDS_PER_TOKEN. Close it, and it stops at once."""
    tokens = to_tokens(text)
    made = 0
    logger.debug("the parrot begins: %d tokens", len(tokens))
    try:
        for token in tokens:
            await asyncio.sleep(SECONDS_PER_TOKEN)
            made += 1
            yield token
    finally:
        logger.debug("the parrot stopped after %d of %d tokens", made, len(tokens))


def serve_parrot() -> str:
    """Run the recipe `tokens` in a thread of this process. Return the address of its API."""
    listener = socket.create_server(("127.0.0.1", 0))
    config = uvicorn.Config("recipes.tokens:app", lifespan="off", log_config=None, access_log=False)
    server = uvicorn.Server(config)
    threading.Thread(target=server.run, args=([listener],), daemon=True).start()
    return f"http://127.0.0.1:{listener.getsockname()[1]}/v1"
