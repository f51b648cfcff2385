"""Apps of other frameworks, with `EndStreams` around each: `uvicorn --factory main:django`.

The tests copy this file, as main.py, into a folder with the end_streams.py that they cut out of
our main.py. Each app answers `GET /SECONDS` with an endless event stream, an event each so many
seconds, and `POST /0.1` with an event stream of twenty words.
"""

import asyncio
import itertools
from collections.abc import AsyncGenerator
from typing import Any

from end_streams import EndStreams  # type: ignore[import-not-found]


async def texts(method: str, seconds: float) -> AsyncGenerator[str]:
    try:
        for number in itertools.count() if method == "GET" else range(20):
            yield f"word{number}"
            await asyncio.sleep(seconds)
    finally:
        print(f"closed {method} {seconds}", flush=True)


async def frames(method: str, seconds: float) -> AsyncGenerator[bytes]:
    async for text in texts(method, seconds):
        yield f"data: {text}\n\n".encode()


def django() -> Any:
    from django.conf import settings
    from django.core.asgi import get_asgi_application
    from django.http import HttpRequest, StreamingHttpResponse
    from django.urls import path

    async def stream(request: HttpRequest, seconds: str) -> StreamingHttpResponse:
        content = frames(str(request.method), float(seconds))
        return StreamingHttpResponse(content, content_type="text/event-stream")

    settings.configure(
        ROOT_URLCONF=(path("<seconds>", stream),), ALLOWED_HOSTS=["*"], SECRET_KEY="test"
    )
    return EndStreams(get_asgi_application())


def falcon_sse() -> Any:
    import falcon
    import falcon.asgi

    class Resource:
        async def on_get(self, req: Any, resp: Any, seconds: float) -> None:
            async def events() -> AsyncGenerator[falcon.asgi.SSEvent]:
                async for text in texts("GET", seconds):
                    yield falcon.asgi.SSEvent(text=text)

            resp.sse = events()

        async def on_post(self, req: Any, resp: Any, seconds: float) -> None:
            resp.content_type = "text/event-stream"
            resp.stream = frames("POST", seconds)

    class AsStream(Resource):
        async def on_get(self, req: Any, resp: Any, seconds: float) -> None:
            resp.content_type = "text/event-stream"
            resp.stream = frames("GET", seconds)

    app = falcon.asgi.App()
    app.add_route("/{seconds:float}", Resource())
    app.add_route("/stream/{seconds:float}", AsStream())
    return EndStreams(app)


def quart() -> Any:
    import quart

    app = quart.Quart(__name__)

    @app.route("/<float:seconds>", methods=["GET", "POST"])
    async def stream(seconds: float) -> quart.Response:
        content = frames(quart.request.method, seconds)
        response = quart.Response(content, content_type="text/event-stream")
        response.timeout = None
        return response

    return EndStreams(app)


def litestar() -> Any:
    import litestar
    from litestar.response import ServerSentEvent

    @litestar.get("/{seconds:float}")
    async def feed(seconds: float) -> ServerSentEvent:
        return ServerSentEvent(texts("GET", seconds))

    @litestar.post("/{seconds:float}", status_code=200)
    async def answer(seconds: float) -> ServerSentEvent:
        return ServerSentEvent(texts("POST", seconds))

    return EndStreams(litestar.Litestar([feed, answer]))
