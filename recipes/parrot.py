"""The model of `tokens`, `relay` and `answers`: a parrot, which says again what it was told.

    async with aclosing(parrot("Hello, world!")) as tokens:
        async for token in tokens:
            print(token, end="", flush=True)

It stands in for a real model, so that these recipes run without a key. Two things it has in common
with one: a token takes a while to make, and each token that nobody reads is made for nothing.
"""

import asyncio
import logging
import re
from collections.abc import AsyncGenerator

SECONDS_PER_TOKEN = 0.03
logger = logging.getLogger("uvicorn.error")  # `uvicorn --log-level debug` shows when it stops


def to_tokens(text: str) -> list[str]:
    """Cut a text into words, each with the space before it, and signs. Nothing of it is lost."""
    return re.findall(r" ?\w+|\s|[^\w\s]", text)


async def parrot(text: str) -> AsyncGenerator[str]:
    """Yield the text again, a token each SECONDS_PER_TOKEN. Close it, and it stops at once."""
    tokens = to_tokens(text)
    made = 0
    try:
        for token in tokens:
            await asyncio.sleep(SECONDS_PER_TOKEN)
            made += 1
            yield token
    finally:
        logger.debug("the parrot stopped after %d of %d tokens", made, len(tokens))
