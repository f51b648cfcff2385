"""What people put around main.py's streams: `uvicorn --factory tests.others.around:observed`.

And servers of protocols that stream, with main.py's `EndStreams` around them.
"""

import asyncio
import json
from collections.abc import AsyncGenerator, Awaitable, Callable
from typing import Any

from brotli_asgi import BrotliMiddleware
from fastapi import Request, Response
from mcp.server import MCPServer
from mcp.server.mcpserver import Context
from opentelemetry.instrumentation.fastapi import FastAPIInstrumentor
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from sse_starlette.sse import AppStatus
from starlette.middleware import Middleware
from starlette.responses import StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp

import main


def observed() -> ASGIApp:
    """Traces, and a middleware that reads what the app has put into the scope."""
    app = main.app
    seen: list[Any] = []
    spans, traces = InMemorySpanExporter(), TracerProvider()
    traces.add_span_processor(SimpleSpanProcessor(spans))

    @app.middleware("http")
    async def look(request: Request, call_next: Callable[..., Awaitable[Response]]) -> Response:
        response = await call_next(request)
        route, endpoint = request.scope["route"].path, request.scope["endpoint"].__name__
        user = getattr(request.state, "user", None)
        seen.append([route, endpoint, request.path_params, user])
        return response

    @app.get("/of/{user}")
    async def of_user(user: str, request: Request) -> Response:
        request.state.user = user
        return main.SSEStream(main.generate_events(0, 3, 0))

    @app.get("/seen")
    async def tell() -> Any:
        return {"seen": seen, "spans": [span.name for span in spans.get_finished_spans()]}

    FastAPIInstrumentor.instrument_app(
        app,
        tracer_provider=traces,
        exclude_spans=["send", "receive"],  # or each chunk is a span
    )
    return app


def brotli_outside() -> ASGIApp:
    main.app.add_middleware(BrotliMiddleware, minimum_size=1)
    return main.app


def brotli_inside() -> ASGIApp:
    main.app.user_middleware.append(Middleware(BrotliMiddleware, minimum_size=1))
    return main.app


def protocols() -> ASGIApp:
    """A server of MCP that also completes chats as OpenAI's does. Both take two seconds."""
    # The MCP SDK sends a session's streams by sse-starlette, which cuts them off at a stop itself.
    AppStatus.disable_automatic_graceful_drain()  # type: ignore[no-untyped-call]
    server = MCPServer("test")

    @server.tool()
    async def work(context: Context) -> str:
        for done in range(20):
            await context.report_progress(done, 20)
            await asyncio.sleep(0.1)
        return "done"

    async def chunks() -> AsyncGenerator[str]:
        for number in range(20):
            delta = {"content": f"word{number} "}
            choice = {"index": 0, "delta": delta, "finish_reason": None}
            chunk = {"id": "x", "created": 0, "model": "x", "choices": [choice]}
            yield f"data: {json.dumps({**chunk, 'object': 'chat.completion.chunk'})}\n\n"
            await asyncio.sleep(0.1)
        yield "data: [DONE]\n\n"

    async def complete(request: Request) -> Response:
        return StreamingResponse(chunks(), media_type="text/event-stream")

    app = server.streamable_http_app()
    app.router.routes.append(Route("/chat/completions", complete, methods=["POST"]))
    app.add_middleware(main.EndStreams)
    return app
