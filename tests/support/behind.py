"""A recipe behind a middleware such as many have: `uvicorn tests.support.behind:relay`."""

from starlette.middleware.base import BaseHTTPMiddleware, RequestResponseEndpoint
from starlette.requests import Request
from starlette.responses import Response

from tests.support import changed


async def pass_on(request: Request, call_next: RequestResponseEndpoint) -> Response:
    return await call_next(request)


def __getattr__(recipe: str) -> BaseHTTPMiddleware:
    return BaseHTTPMiddleware(getattr(changed, recipe), pass_on)
