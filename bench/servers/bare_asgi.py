"""An ASGI application with no framework: what uvicorn itself costs.

https://asgi.readthedocs.io/en/latest/specs/www.html
"""

from urllib.parse import parse_qs

from events import generate_sse
from starlette.types import Receive, Scope, Send


async def app(scope: Scope, receive: Receive, send: Send) -> None:
    query = parse_qs(scope["query_string"].decode())
    events = generate_sse(int(query["steps"][0]), float(query["interval"][0]))
    headers = [(b"content-type", b"text/event-stream")]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    async for event in events:
        await send({"type": "http.response.body", "body": event, "more_body": True})
    await send({"type": "http.response.body"})
