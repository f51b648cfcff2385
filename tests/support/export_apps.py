"""recipes.export in other circumstances."""

from starlette.middleware.base import BaseHTTPMiddleware

from recipes import export

export.PATIENCE = 2.0  # a minute lasts two seconds
impatient = export.app
with_middleware = BaseHTTPMiddleware(export.app, lambda request, call_next: call_next(request))
