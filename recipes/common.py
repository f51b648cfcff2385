"""What every recipe needs and no lesson is about: a limit on bodies, a 422 that never fails, pages.

    app = FastAPI()
    prepare(app, page="tail.html")

There is nothing about streaming in here; the recipes can be read without it.
"""

import asyncio
import json
import logging
from collections.abc import Awaitable, Callable
from pathlib import Path

from fastapi import FastAPI, Request, Response
from fastapi.encoders import jsonable_encoder
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, RedirectResponse
from fastapi.staticfiles import StaticFiles
from starlette.middleware.body_limit import RequestBodyLimitMiddleware

MAX_BODY = 1024 * 1024  # bytes
PAGES = Path(__file__).resolve().parent / "pages"
PAGE_HEADERS = {
    "Content-Security-Policy": "default-src 'self'; base-uri 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Cache-Control": "no-cache",  # a browser keeps it, but asks each time whether it has changed
}
logger = logging.getLogger("uvicorn.error")  # a recipe's log is where its server's is


def prepare(app: FastAPI, page: str | None = None) -> None:
    """Add the limit, the 422 and the pages to an app; without a page, `/` leads to /docs."""
    app.add_middleware(RequestBodyLimitMiddleware, max_body_size=MAX_BODY)
    app.add_exception_handler(RequestValidationError, invalid_input)  # type: ignore[arg-type]
    app.mount("/pages", PageFiles(directory=PAGES))

    @app.get("/", include_in_schema=False)
    async def index(request: Request) -> Response:
        if page is None:
            return RedirectResponse(f"{request.scope.get('root_path', '')}/docs")
        return FileResponse(PAGES / page, headers=PAGE_HEADERS)


class PageFiles(StaticFiles):
    """The files of a page, with its headers."""

    def file_response(self, *args: object, **kwargs: object) -> Response:
        response = super().file_response(*args, **kwargs)  # type: ignore[arg-type]
        response.headers.update(PAGE_HEADERS)
        return response


async def invalid_input(_: Request, error: RequestValidationError) -> Response:
    """Answer FastAPI's 422, also where it repeats an input that JSON or UTF-8 cannot hold.

    FastAPI answers 500 to `NaN`, `1e400` and `"\\ud800"` in a body:
    https://github.com/fastapi/fastapi/issues/459
    """
    detail = json.dumps({"detail": jsonable_encoder(error.errors())})
    detail = json.dumps(json.loads(detail, parse_constant=str))
    return Response(detail, 422, media_type="application/json")


async def keep_going(what: str, work: Callable[[], Awaitable[object]], pause: float = 1.0) -> None:
    """Await `work()` again and again; log each exception in one line, and go on after `pause` s.

    A task in the background has nobody who sees its exception: it would end without a word.
    """
    while True:
        try:
            await work()
        except Exception as error:
            why = str(error).strip().partition("\n")[0]
            logger.error("%s: %s: %s", what, type(error).__name__, why or "no reason given")
            await asyncio.sleep(pause)
