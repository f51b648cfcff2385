"""Read the NDJSON stream like a collection, with aiohttp: each event once, complete, in order.

Run `python client_async.py [URL]`, or copy this file and use it in a program of your own:

    async for event in client_async.read_events("http://localhost:8000/ndjson"):
        print(event["data"])

If the stream breaks off, it is resumed. To leave the loop early, use `contextlib.aclosing`.
"""

from __future__ import annotations

import asyncio
import json
import logging
import random
import sys
import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import suppress
from ssl import SSLError
from typing import Any, TypedDict

import aiohttp
from aiohttp.http_exceptions import ContentLengthError, LineTooLong, TransferEncodingError
from yarl import URL


async def read_events(url: str) -> AsyncGenerator[Event]:
    """Yield the events of the NDJSON stream at `url` as they arrive, or raise StreamError."""
    resume = Resume(url)
    while True:
        with resume:  # whatever goes wrong leads to another attempt, or to a StreamError
            async with (
                new_session() as session,
                await in_time(session.get(url, headers=resume.headers), resume) as response,
            ):
                if response.status == 204:  # No Content: nothing is left to read
                    return
                await check_status(response, url)
                body = response.content  # by default, its `readline()` refuses lines over 512 KB
                while line := await in_time(body.readline(max_line_length=MAX_LINE), resume):
                    if event := new_event(line, resume.last_event_id, url):
                        yield event
                        if event["is_last_event"]:
                            return
                        resume.after(event)
                raise ConnectionError("the server ended it early")
        await asyncio.sleep(resume.pause)


CONNECT_TIMEOUT, STALL_TIMEOUT = 5.0, 15.0  # seconds; the server is silent for at most 10
GIVE_UP_AFTER, FIRST_DELAY = 30.0, 0.2  # seconds without a new event; before the first retry
MAX_LINE = 64 * 1024 * 1024  # bytes; without a limit, an endless line would take all memory
logger = logging.getLogger(__name__)
NO_CONNECTION = (
    aiohttp.ClientConnectorError | aiohttp.ConnectionTimeoutError | aiohttp.ClientHttpProxyError
)


def new_session() -> aiohttp.ClientSession:
    """Return a session for one attempt. The defaults of aiohttp do not suit streams."""
    # By default, a session ends every stream after five minutes.
    timeout = aiohttp.ClientTimeout(sock_connect=CONNECT_TIMEOUT, sock_read=STALL_TIMEOUT)
    # As requests does: use the environment's proxies, take headers of 64 KB (the default is 8 KB).
    return aiohttp.ClientSession(timeout=timeout, trust_env=True, max_field_size=64 * 1024)


async def in_time(work: Awaitable[Any], resume: Resume) -> Any:
    """Await `work`, at most until it is time to give up."""
    # `sock_read` alone lets bytes trickle in forever, and an interim answer (103) stops its clock.
    async with asyncio.timeout(resume.until - time.monotonic()):
        return await work


async def check_status(response: aiohttp.ClientResponse, url: str) -> None:
    """Raise an error if the status is not 200 OK."""
    code, text = response.status, ""
    status = f"{code} {response.reason}".rstrip()
    if code in (408, 425, 429) or code >= 500:  # these mean: try again later
        raise ConnectionError(f"the server answered {status}")
    if code != 200:
        with suppress(aiohttp.ClientError, OSError):  # cut, silent or damaged
            text = (await response.content.read(300)).decode(errors="ignore")
        raise StreamError(f"{url} answered {status}, not a stream: {text!r}. Check the address.")


def explain(error: Exception, url: str, at_the_start: bool) -> str:
    """Return what went wrong if another attempt may help; otherwise raise StreamError."""
    cause = error  # libraries wrap errors in errors; the innermost one explains the most
    while isinstance(inner := cause.__cause__ or [None, *cause.args][-1], Exception):
        cause = inner
    match cause:
        case ConnectionRefusedError():
            reason = "nobody listens there"
        case ConnectionError(errno=int()) | ContentLengthError() | TransferEncodingError():
            reason = "the connection was cut"
        case TimeoutError():
            reason = "it timed out"
        case SSLError():
            reason = f"TLS failed, {cause.strerror}"
        case OSError():
            reason = str(cause.strerror or cause).rstrip(".")
        case _:
            words = getattr(cause, "message", cause)
            reason = " ".join(f"{type(cause).__name__}: {words}".split())[:200].rstrip(".")
    match error:
        case aiohttp.ClientProxyConnectionError() | aiohttp.ClientHttpProxyError():
            reason = f"the proxy failed ({reason})"
        case aiohttp.ClientConnectorError(host=host, port=port):
            if (host, port) != (URL(url).raw_host, URL(url).port):
                reason = f"a redirect or a proxy leads to {host}:{port}, and {reason}"
        case aiohttp.TooManyRedirects():
            raise StreamError(f"{url} redirects too often. Check the address.") from error
        case LineTooLong():
            raise StreamError(f"{url} sent a line of over {MAX_LINE} bytes. Check the address.")
        case ValueError() | TypeError() | aiohttp.NonHttpUrlClientError():
            advice = "Expected an address such as http://localhost:8000/ndjson; check proxies too."
            raise StreamError(f"Cannot read {url}: {reason}. {advice}") from error
    if at_the_start and isinstance(error, NO_CONNECTION):
        advice = "Start the server with `uvicorn main:app`, or check the address."
        raise StreamError(f"Cannot connect to {url}: {reason}. {advice}") from error
    return reason


# From here to `new_event`, this file and client_sync.py are identical -----------------


class Event(TypedDict):
    event_id: int
    data: str
    is_last_event: bool


class StreamError(Exception):
    """The stream could not be read to its end: one sentence says why, and what to do."""


class Resume:
    """Where and when to resume. `with resume:` goes around each attempt to read the stream."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.after(None)

    def after(self, event: Event | None) -> None:
        """From now on, resume after this event; None is the start of the stream."""
        self.last_event_id = event["event_id"] if event else -1
        self.headers = {"Last-Event-ID": str(self.last_event_id)} if event else {}
        self.deadline = self.until = time.monotonic() + GIVE_UP_AFTER
        self.delay = FIRST_DELAY

    def __enter__(self) -> None:
        # The last attempt starts at the deadline; it too needs time to receive an event.
        self.until = max(self.deadline, time.monotonic() + CONNECT_TIMEOUT)

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> bool:
        """Set `pause`, the seconds until the next attempt, or raise StreamError."""
        if not isinstance(error, Exception) or isinstance(error, StreamError):
            return False
        first_time = self.delay == FIRST_DELAY
        reason = explain(error, self.url, at_the_start=first_time and not self.headers)
        where = f"after event {self.last_event_id}" if self.headers else "at the start"
        remaining = max(self.deadline - time.monotonic(), 0)
        if not remaining and not first_time:  # it may only have been suspended (Ctrl-Z, a laptop)
            raise StreamError(
                f"Gave up {where}: {self.url} sent no new event for {GIVE_UP_AFTER:.0f} seconds, "
                f"most recently because {reason}. Check the server, then try again."
            ) from error
        if first_time:
            logger.warning("The stream broke off %s (%s); resuming it.", where, reason)
        # Slightly random: otherwise all readers of a server would reconnect at the same moment.
        self.pause = min(self.delay * random.uniform(0.9, 1.1), remaining)
        self.delay *= 1.5
        return True


def new_event(line: bytes, last_event_id: int, url: str) -> Event | None:
    """Return the event in this line; None if it is empty, cut off, or sent a second time."""
    if len(line) >= MAX_LINE:
        raise StreamError(f"{url} sent a line of over {MAX_LINE} bytes. Check the address.")
    try:
        event: Event | None = json.loads(line)
    except (ValueError, RecursionError):  # not JSON, not UTF-8, or nested too deeply
        if not line.strip() or (line.startswith(b"{") and not line.endswith(b"\n")):
            return None  # a line that was cut off is sent again when the stream resumes
        event = None
    match event:
        case {"event_id": bool()}:
            pass  # for Python, true is an int
        case {"event_id": int(event_id), "data": str(), "is_last_event": bool()}:
            if event_id > last_event_id + 1:
                missing = f"event {event_id} where event {last_event_id + 1} was expected"
                advice = "events are lost. Read the stream again from its start."
                raise StreamError(f"{url} sent {missing}: {advice}")
            return event if event_id == last_event_id + 1 else None
    advice = "Expected JSON with event_id, data and is_last_event; check the address."
    raise StreamError(f"{url} sent a line that is not an event: {line[:60]!r}. {advice}")


def show_events(url: str, show: Callable[[str], None]) -> None:
    """Read a stream of NDJSON events and print each one when it arrives."""

    async def show_all() -> None:
        async for event in read_events(url):
            show(json.dumps(event, ensure_ascii=False))

    asyncio.run(show_all())


def main() -> int:
    try:
        from client import run  # only here: `read_events` needs no other file
    except ImportError as error:
        sys.exit(f"Printing needs client.py in this folder too ({error}); read_events does not.")
    return run(show_events, "http://localhost:8000/ndjson", "events", StreamError)


if __name__ == "__main__":
    sys.exit(main())
