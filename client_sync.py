"""Read the NDJSON stream like a collection, with requests: each event once, complete, in order.

Run `python client_sync.py [URL]`, or copy this file and use it in a program of your own:

    for event in client_sync.read_events("http://localhost:8000/ndjson"):
        print(event["data"])

If the stream breaks off, it is resumed after the last event that arrived.
"""

from __future__ import annotations

import io
import json
import logging
import random
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from http.client import IncompleteRead
from ssl import SSLError
from typing import TypedDict

import requests
from urllib3.exceptions import HTTPError, MaxRetryError


def read_events(url: str) -> Iterator[Event]:
    """Yield the events of the NDJSON stream at `url` as they arrive, or raise StreamError."""
    resume = Resume(url)
    timeout = (CONNECT_TIMEOUT, STALL_TIMEOUT)
    while True:
        with (
            resume,  # whatever goes wrong leads to another attempt, or to a StreamError
            requests.get(url, headers=resume.headers, timeout=timeout, stream=True) as response,
        ):
            if response.status_code == 204:  # No Content: nothing is left to read
                return
            check_status(response, url)
            lines = io.BufferedReader(Arrived(response, resume), buffer_size=64 * 1024)
            while line := lines.readline(MAX_LINE):
                if event := new_event(line, resume.last_event_id, url):
                    yield event
                    if event["is_last_event"]:
                        return
                    resume.after(event)
            raise ConnectionError("the server ended it early")
        time.sleep(resume.pause)


CONNECT_TIMEOUT, STALL_TIMEOUT = 5.0, 15.0  # seconds; the server is silent for at most 10
GIVE_UP_AFTER, FIRST_DELAY = 30.0, 0.2  # seconds without a new event; before the first retry
MAX_LINE = 64 * 1024 * 1024  # bytes; without a limit, an endless line would take all memory
logger = logging.getLogger(__name__)


class Arrived(io.RawIOBase):
    """The body of an answer as a file that returns what has arrived, without waiting for more.

    `response.raw.readline()` reads one byte at a time. `response.iter_lines()` asks for 512 bytes,
    and unless the answer is chunked, it waits for all of them. `read1` returns what has arrived,
    and `io.BufferedReader` cuts it into lines, in C.
    """

    def __init__(self, response: requests.Response, resume: Resume) -> None:
        self.raw, self.resume = response.raw, resume

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        if time.monotonic() > self.resume.until:  # bytes trickle in, but never a complete event
            raise ConnectionError("no complete event came in time")
        data = self.raw.read1(len(buffer), decode_content=True)
        buffer[: len(data)] = data
        return len(data)


def check_status(response: requests.Response, url: str) -> None:
    """Raise an error if the status is not 200 OK."""
    code, text = response.status_code, ""
    status = f"{code} {response.reason}".rstrip()
    if code in (408, 425, 429) or code >= 500:  # these mean: try again later
        raise ConnectionError(f"the server answered {status}")
    if code in range(102, 200):  # https://github.com/python/cpython/issues/42550
        status += " (requests does not read past this interim answer, client_async.py does)"
    if code != 200:
        with suppress(HTTPError, OSError):  # cut, silent or damaged: the status says enough
            text = response.raw.read1(300, decode_content=True).decode(errors="ignore")
        raise StreamError(f"{url} answered {status}, not a stream: {text!r}. Check the address.")


def explain(error: Exception, url: str, at_the_start: bool) -> str:
    """Return what went wrong if another attempt may help; otherwise raise StreamError."""
    cause = error  # libraries wrap errors in errors; the innermost one explains the most
    while isinstance(inner := cause.__cause__ or [None, *cause.args][-1], Exception):
        cause = inner
    match cause:
        case ConnectionRefusedError():
            reason = "nobody listens there"
        case ConnectionError(errno=int()) | IncompleteRead():
            reason = "the connection was cut"
        case TimeoutError():
            reason = "it timed out"
        case SSLError():
            reason = f"TLS failed, {cause.strerror}"
        case OSError(filename=str(name)):
            reason = f"{cause.strerror}: {name}"
        case OSError():
            reason = str(cause.strerror or cause).rstrip(".")
        case _:
            reason = " ".join(f"{type(cause).__name__}: {cause}".split())[:200].rstrip(".")
    if isinstance(error, requests.exceptions.ProxyError) or "SOCKS" in reason:
        reason = f"the proxy failed ({reason})"
    match error:
        case requests.ConnectionError(args=[MaxRetryError()], request=request) if at_the_start:
            if request and request.url != requests.Request("GET", url).prepare().url:
                reason = f"it redirects to {request.url}, and {reason}"
            advice = "Start the server with `uvicorn main:app`, or check the address."
            raise StreamError(f"Cannot connect to {url}: {reason}. {advice}") from error
        case _ if isinstance(error, ValueError) or getattr(cause, "filename", None):
            pass  # a wrong address, also where urllib3 calls it an HTTPError, or a missing file
        case ConnectionError() | requests.ConnectionError() | requests.Timeout() | HTTPError():
            return reason
    advice = "Expected an address such as http://localhost:8000/ndjson, or check the environment."
    raise StreamError(f"Cannot read {url}: {reason}. {advice}") from error


# From here to `new_event`, this file and client_async.py are identical -----------------


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
    for event in read_events(url):
        show(json.dumps(event, ensure_ascii=False))


def main() -> int:
    try:
        from client import run  # only here: `read_events` needs no other file
    except ImportError as error:
        sys.exit(f"Printing needs client.py in this folder too ({error}); read_events does not.")
    return run(show_events, "http://localhost:8000/ndjson", "events", StreamError)


if __name__ == "__main__":
    sys.exit(main())
