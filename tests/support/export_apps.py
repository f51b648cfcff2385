"""recipes.export behind a middleware that ends the body of a cut download properly."""

from starlette.middleware.base import BaseHTTPMiddleware

from recipes import export

with_middleware = BaseHTTPMiddleware(export.app, lambda request, call_next: call_next(request))
