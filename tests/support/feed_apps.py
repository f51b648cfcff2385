"""recipes/feed.py with a middleware: `uvicorn tests.support.feed_apps:app`."""

import asyncio
import contextvars

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from tests.support.changed import feed

reader: contextvars.ContextVar[int] = contextvars.ContextVar("reader")


class Limits:
    """Gives each `send` a time limit, and looks whether it is called where its reader is.

    The second message to a reader whose address has `?last=1` raises instead.
    """

    def __init__(self, inner: ASGIApp) -> None:
        self.inner = inner

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        sent = 0
        reader.set(id(scope))

        async def send_in_time(message: Message) -> None:
            nonlocal sent
            sent += 1
            assert asyncio.current_task()
            assert reader.get() == id(scope)
            if sent == 2 and scope.get("query_string") == b"last=1":
                raise RuntimeError("the middleware failed")
            async with asyncio.timeout(30):
                await send(message)

        await self.inner(scope, receive, send_in_time)


app = Limits(feed)
