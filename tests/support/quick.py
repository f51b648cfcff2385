"""main.py's app, with ten events a second where nobody asks for more or fewer: for READMEs."""

from starlette.types import Receive, Scope, Send

import main


async def app(scope: Scope, receive: Receive, send: Send) -> None:
    if scope["type"] == "http" and b"interval" not in scope["query_string"]:
        scope = {**scope, "query_string": scope["query_string"] + b"&interval=0.1"}
    await main.app(scope, receive, send)
