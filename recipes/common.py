"""What recipes need, but no lesson is about: a limit on bodies, clear errors, pages.

    app = FastAPI()
    prepare(app, page="tail.html")

You can read the recipes without it.
"""

import asyncio
import json
import logging
import os
import re
from collections.abc import Awaitable, Callable
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import unquote, urlsplit

from fastapi import FastAPI, HTTPException, Request, Response
from fastapi.encoders import jsonable_encoder
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, JSONResponse, RedirectResponse
from fastapi.staticfiles import StaticFiles
from pydantic import BaseModel, BeforeValidator
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException as StarletteHTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from main import Stream

MAX_BODY = 1024 * 1024  # bytes
PAGES = Path(__file__).resolve().parent / "pages"
PAGE_HEADERS = {
    "Content-Security-Policy": "default-src 'self'; base-uri 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Cache-Control": "no-cache",  # a browser keeps it, but asks each time whether it has changed
}
logger = logging.getLogger("uvicorn.error")  # a recipe logs where its server does


def prepare(app: FastAPI, page: str | None = None) -> None:
    """Add the limit, the 422 and the pages to an app. Without a page, `/` redirects to /docs."""
    app.add_middleware(LimitBodies)
    app.add_exception_handler(RequestValidationError, invalid_input)  # type: ignore[arg-type]
    app.mount("/pages", PageFiles(directory=PAGES))

    @app.get("/", include_in_schema=False)
    async def index(request: Request) -> Response:
        if page is None:
            return RedirectResponse(f"{request.scope.get('root_path', '')}/docs")
        return FileResponse(PAGES / page, headers=PAGE_HEADERS)


class LateStream(Stream):
    """A `Stream` whose status is sent with its first chunk: until then it can be an error.

    A subclass sets `begun` when it sends the status.
    """

    begun = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await super().__call__(scope, receive, send)
        if not self.begun:  # the reader has left; for many middlewares no response is an error
            await Response(status_code=499)(scope, receive, send)


class LimitBodies:
    """Refuse a body over MAX_BODY with 413 before it is in memory.

    Starlette's RequestBodyLimitMiddleware does that too, but always answers in plain text. Here the
    app's own handler for an HTTPException answers, as it does for the app's other errors.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        length = Headers(scope=scope).get("content-length", "0") if scope["type"] == "http" else "0"
        unread = len(length) > 9 or int(length) > MAX_BODY
        error = HTTPException(413, f"The body is larger than the limit of {MAX_BODY} bytes.")
        read = 0

        async def limited() -> Message:
            nonlocal read, unread
            message = await receive()
            read += len(message.get("body", b""))
            if read > MAX_BODY:
                unread = message.get("more_body", False)
                raise error
            if not message.get("more_body"):
                read = 0  # the body is complete, but some middlewares repeat it forever
            return message

        async def answer(message: Message) -> None:
            if unread and message["type"] == "http.response.body":
                # Closing a connection with an unread body resets it (RFC 9112, section 9.6), and
                # many clients send everything before they read. So read the rest and drop it.
                await send({**message, "more_body": True})
                while (await receive()).get("more_body"):
                    pass
                message = {"type": "http.response.body"}
            await send(message)

        if unread:
            handler = scope["app"].exception_handlers[StarletteHTTPException]
            await (await handler(Request(scope), error))(scope, receive, answer)
        else:
            await self.app(scope, limited, answer)


class PageFiles(StaticFiles):
    """The files of a page, with its headers."""

    def file_response(self, *args: object, **kwargs: object) -> Response:
        response = super().file_response(*args, **kwargs)  # type: ignore[arg-type]
        response.headers.update(PAGE_HEADERS)
        return response


async def invalid_input(_: Request, error: RequestValidationError) -> Response:
    """Send FastAPI's 422, even if it repeats an input that JSON or UTF-8 cannot encode.

    FastAPI answers 500 to `NaN`, `1e400` and `"\\ud800"` in a body:
    https://github.com/fastapi/fastapi/issues/459
    """
    errors = error.errors()
    try:
        detail = json.loads(json.dumps(errors, default=jsonable_encoder), parse_constant=str)
    except (ValueError, RecursionError):  # the input is not UTF-8, or nested too deeply
        detail = [{name: each[name] for name in ("type", "loc", "msg")} for each in errors]
    return ASCIIResponse({"detail": detail}, 422)


class ASCIIResponse(JSONResponse):
    """JSON in ASCII, because a text can contain half of a surrogate pair, and UTF-8 cannot."""

    def render(self, content: object) -> bytes:
        return json.dumps(content).encode()


async def keep_going(what: str, work: Callable[[], Awaitable[object]], pause: float = 1.0) -> None:
    """Await `work()` again and again; log each exception in one line, and pause after it.

    Without this, a background task would end silently at its first exception.
    """
    while True:
        try:
            await work()
        except Exception as error:
            logger.error("%s: %s", what, in_one_line(error))
            await asyncio.sleep(pause)


# The content of a message in the OpenAI API: a text, or a list of its parts.


class Part(BaseModel):
    type: Literal["text", "input_text", "output_text"]
    text: str


def join_parts(content: object) -> object:
    """Return the text of a list of parts; return anything else unchanged."""
    if not isinstance(content, list):
        return content
    return "\n".join(Part.model_validate(part).text for part in content)


Text = Annotated[str, BeforeValidator(join_parts)]


# The errors of the OpenAI API: https://platform.openai.com/docs/guides/error-codes


def openai_error(status: int, message: str, said: bytes = b"", **fields: Any) -> HTTPException:
    """Return an exception that reaches the reader as `{"error": {"message": …, "type": …}}`.

    `said` is the body of another server's error, in any shape. It is passed on.
    """
    headers = {"Retry-After": "5"} if status == 503 else None
    with suppress(ValueError, RecursionError):
        if isinstance(own := json.loads(said), dict) and own.get("error"):
            return HTTPException(status, own, headers)
    message = f"{message} {said[:2000].decode(errors='replace')}".strip()
    kind = "invalid_request_error" if status < 500 else "server_error"
    error = {"message": message, "type": kind, "param": None, "code": None} | fields
    return HTTPException(status, {"error": error}, headers)


def use_openai_errors(app: FastAPI) -> None:
    """Send all errors of an app in that format. Bad input is then a 400, as in that API."""

    @app.exception_handler(StarletteHTTPException)
    async def tell(_: Request, error: StarletteHTTPException) -> Response:
        detail: Any = error.detail  # FastAPI's own, such as a 404's, is a text
        told = openai_error(error.status_code, detail).detail if isinstance(detail, str) else detail
        return ASCIIResponse(told, error.status_code, error.headers)

    @app.exception_handler(RequestValidationError)
    async def tell_bad_input(request: Request, error: RequestValidationError) -> Response:
        first = error.errors()[0]
        message = f"{first['msg']} ({'.'.join(map(str, first['loc']))})"
        fields = [name for name in first["loc"][1:2] if isinstance(name, str)]
        return await tell(request, openai_error(400, message, param=fields[0] if fields else None))


def in_one_line(error: Exception) -> str:
    """Return the error's name and first line. (PostgreSQL adds the statement on further lines.)"""
    nothing_said = "it took too long" if isinstance(error, TimeoutError) else "no reason given"
    why = " ".join(str(error).strip().partition("\n")[0].split())  # without \r and the like
    return f"{type(error).__name__}: {why or nothing_said}"


def database_url(default: str) -> str:
    """Return DATABASE_URL as sqlite:///FILE or postgresql://…, also from SQLAlchemy's spelling.

    A wrong one ends the program with one sentence. The sentence does not repeat the setting or
    libpq's own message, because both may contain the password.
    """
    url = os.environ.get("DATABASE_URL", "").strip() or default
    found = re.fullmatch(r"(sqlite|postgres)(?:ql)?(?:\+\w+)?://(.+)", url, re.DOTALL)
    if found and found[1] == "sqlite" and re.match("/(?!:memory:$).", found[2]):
        return f"sqlite://{found[2]}"
    if found and found[1] == "postgres" and is_readable(f"postgresql://{found[2]}"):
        return f"postgresql://{found[2]}"
    raise SystemExit(
        "DATABASE_URL should be sqlite:///FILE or postgresql://USER:PASSWORD@HOST:PORT/NAME, "
        "with special characters in the password written as %XX."
    )


def is_readable(url: str) -> bool:
    """Return whether libpq finds a database's name, and the password only in its own place."""
    from psycopg import Error
    from psycopg.conninfo import conninfo_to_dict

    try:
        parts = conninfo_to_dict(url)
    except Error:
        return False
    # With a raw @ or / in the password, a part of it becomes the host, the port or the name.
    is_clean = "@" not in f"{parts.get('host')}{parts.get('dbname')}"
    has_port = re.fullmatch(r"[\d,]*", str(parts.get("port", "")))
    return bool(parts.get("dbname") and is_clean and has_port)


def upstream() -> tuple[str, str, Any]:
    """Return UPSTREAM_URL and UPSTREAM_KEY ("" if they are not set), and a client of httpx2."""
    import httpx2

    url, key = (os.environ.get(name, "").strip() for name in ("UPSTREAM_URL", "UPSTREAM_KEY"))
    address = r"https?://([^\s/?#]+@)?(\[\S+\]|[^\s/?#:]+)(:[1-6]?\d{1,4})?(/[^\s?#]*)?"
    try:
        valid = bool(not url or (re.fullmatch(address, url) and httpx2.URL(url)))
    except httpx2.InvalidURL:  # such as 256.0.0.1
        valid = False
    if not valid:
        raise SystemExit("UPSTREAM_URL must be an address such as https://api.openai.com/v1.")
    if not re.fullmatch("[!-~]*", key):
        raise SystemExit("UPSTREAM_KEY has characters that no key has. Copy it again.")
    # A new connection each time: one that was kept may just have been closed (RFC 9112, 9.5).
    limits = httpx2.Limits(max_keepalive_connections=0)
    patience = httpx2.Timeout(300, connect=4)  # a thinking model may be silent for minutes
    try:
        # Without an upstream, the server is on this machine, so the proxy variables are ignored.
        client = httpx2.AsyncClient(limits=limits, trust_env=bool(url), timeout=patience)
    except Exception:  # its message may contain the password of a proxy
        raise SystemExit(
            "UPSTREAM_URL cannot be used: one of SSL_CERT_FILE, SSL_CERT_DIR, SSLKEYLOGFILE, "
            "HTTP_PROXY, HTTPS_PROXY and ALL_PROXY is wrong (for a SOCKS proxy, install socksio)."
        ) from None
    return url.rstrip("/"), key, client


def upstream_error(error: BaseException) -> HTTPException:
    """Return the error that a reader gets for an error of httpx2."""
    import httpx2

    logger.warning("upstream: %s: %.200s", type(error).__name__, error)
    if isinstance(error, httpx2.ConnectError | httpx2.ConnectTimeout):
        return openai_error(503, "The upstream cannot be reached.")
    if isinstance(error, httpx2.ReadTimeout):
        return openai_error(504, "The upstream has stalled.")
    return openai_error(502, "The connection to the upstream broke.")


def connect_to_redis(url: str, connections: int, retries: int = 0) -> Any:
    """Return a client for an address of redis-py, or redis+sentinel://:PASSWORD@HOST:PORT/NAME.

    It has no timeouts: put a time limit around each command. With `retries`, a command may run
    twice. If a server says that it has become a replica, its connection is closed: after a
    failover, another server may be behind the same address.
    """
    from redis.asyncio import Redis, Sentinel
    from redis.asyncio.retry import Retry
    from redis.backoff import NoBackoff
    from redis.exceptions import ReadOnlyError, RedisError

    options: dict[str, Any] = {"max_connections": connections, "decode_responses": True}
    options |= {"retry": Retry(NoBackoff(), retries), "retry_on_error": [ReadOnlyError]}
    # redis-py's own timeouts use asyncio.wait_for, which may miss a cancellation in Python 3.11:
    # https://github.com/python/cpython/issues/86296.
    options |= {"socket_timeout": None, "socket_connect_timeout": None}
    # Protocol 3 notices a broken connection only when it is used.
    options |= {"protocol": 2, "encoding_errors": "replace"}
    # With a raw / ? or # in the password, a part of it would become the host or the port.
    spelling = r"rediss?://[^/?#]*(/\d*)?(\?\w+=[^#]*)?"
    spelling += r"|rediss?\+sentinel://[^/?#]+/[^/?#]+|unix://.*/.+"
    try:
        address = urlsplit(url := url.strip())
        if not re.fullmatch(spelling, url, re.IGNORECASE):
            raise ValueError
        if not address.scheme.endswith("+sentinel"):
            client = Redis.from_url(url, **options)
            # This finds options that do not exist, and files for TLS.
            connection = client.connection_pool.make_connection()  # type: ignore[no-untyped-call]
            if hasattr(connection, "ssl_context"):
                connection.ssl_context.get()
            return client
        login, _, hosts = address.netloc.rpartition("@")
        options["username"], _, options["password"] = map(unquote, login.partition(":"))
        options["ssl"] = address.scheme.startswith("rediss")
        pairs = [
            (host.strip("[]"), int(port))
            for host, _, port in (h.rpartition(":") for h in hosts.split(","))
        ]
    except (ValueError, TypeError, AttributeError, RedisError):
        # Their message may contain a part of the password.
        raise SystemExit("REDIS_URL should be like redis://:P%40SSWORD@HOST:6379.") from None
    except OSError:
        raise SystemExit(
            "REDIS_URL has a wrong option for TLS, or a file that cannot be read."
        ) from None
    quick = {"socket_timeout": 1, "socket_connect_timeout": 1, "retry": None}  # one may hang
    sentinel = Sentinel(pairs, sentinel_kwargs=quick)  # type: ignore[no-untyped-call]
    return sentinel.master_for(address.path.strip("/"), **options)
