"""Read the NDJSON stream like a collection, with requests.

Run `python client_sync.py [URL]`, or use it from a program of your own:

    from client_sync import read_events

    for event in read_events("http://localhost:8000/ndjson"):
        print(event["data"])

Each event comes once, in order and whole. Where the stream breaks off, it is resumed after the last
event that came.
"""

from __future__ import annotations

import io
import json
import logging
import random
import sys
import time
from collections.abc import Iterator
from typing import TypedDict, cast

import requests
from urllib3.exceptions import HTTPError, MaxRetryError, ReadTimeoutError

CONNECT_TIMEOUT = 5.0  # seconds
STALL_TIMEOUT = 15.0  # seconds without a byte; the server is never silent for more than 10
GIVE_UP_AFTER = 30.0  # seconds without a new event
FIRST_DELAY = 0.2  # seconds before the stream is resumed; each further attempt waits longer
MAX_LINE = 64 * 1024 * 1024  # bytes; without a limit, a line that never ends would take all memory

logger = logging.getLogger(__name__)


def read_events(url: str) -> Iterator[Event]:
    """Yield the events of the NDJSON stream at `url` as they arrive, each once and in order.

    Where the connection is cut or stalls, or the server fails (5xx), the stream is resumed with
    `Last-Event-ID`: after 0.2 seconds, then waiting half as long again each time. The first loss
    after an event is logged as a warning.

    Raises:
        StreamError: nobody listens at the start; the answer is no stream of events (4xx, not JSON,
            an event missing); 30 seconds have passed without a new event.
    """
    last_event_id: int | None = None
    patience = Patience(url)
    while True:
        try:
            with open_stream(url, last_event_id) as response:
                if response.status_code == 204:  # nothing is left after last_event_id
                    return
                lines = io.BufferedReader(LiveBody(response, patience), buffer_size=64 * 1024)
                while line := lines.readline(MAX_LINE):
                    event = parse_event(line, url)
                    if event is None or not is_new(event, last_event_id, url):
                        continue
                    yield event
                    if event["is_last_event"]:
                        return
                    last_event_id = event["event_id"]
                    patience.begin_anew()
                raise ConnectionLost("the server ended it early")
        except ConnectionLost as lost:
            time.sleep(patience.wait_after(lost, last_event_id))


def open_stream(url: str, last_event_id: int | None) -> requests.Response:
    """Send the request and return the answer, 200 or 204, with its body still to be read."""
    headers = {} if last_event_id is None else {"Last-Event-ID": str(last_event_id)}
    timeout = (CONNECT_TIMEOUT, STALL_TIMEOUT)
    try:
        response = requests.get(url, headers=headers, timeout=timeout, stream=True)
    except requests.Timeout as error:
        if isinstance(error, requests.ConnectTimeout):
            raise CannotConnect("nobody answers there") from error
        raise ConnectionLost(f"nothing came for {STALL_TIMEOUT:.0f} seconds") from error
    except requests.exceptions.SSLError as error:
        raise CannotConnect("the TLS handshake failed") from error
    except requests.ConnectionError as error:
        if isinstance(error.args[0], MaxRetryError):  # it never got as far as a connection
            raise CannotConnect("nobody listens there") from error
        raise ConnectionLost("the answer was cut off or is no HTTP") from error
    except (requests.RequestException, HTTPError, ValueError) as error:
        raise StreamError(
            f"Cannot read {url} ({error}). Expected an address such as http://localhost:8000/ndjson."
        ) from error
    status = f"{response.status_code} {response.reason}".rstrip()
    if response.status_code >= 500:
        response.close()
        raise ConnectionLost(f"the server answered {status}")
    if response.status_code not in (200, 204):
        with response:
            raise StreamError(
                f"{url} answered {status}, not a stream: {start_of_body(response)!r}. "
                "Check the address and its parameters."
            )
    return response


def start_of_body(response: requests.Response) -> str:
    """Return what an answer that is no stream says, or "" if that was cut, stalls or is damaged."""
    try:
        return response.raw.read1(300, decode_content=True).decode(errors="ignore")
    except (HTTPError, OSError):
        return ""


class LiveBody(io.RawIOBase):
    """The body of an answer as a file that gives what has arrived, without waiting for more.

    `response.raw.readline()` would ask for one byte at a time, `response.iter_lines()` for 512
    bytes, however many events those are. `read1` takes what is there; `io.BufferedReader` cuts it
    into lines, in C.
    """

    def __init__(self, response: requests.Response, patience: Patience) -> None:
        self.raw = response.raw
        self.patience = patience
        # The last attempt, made at the deadline, has the time to bring an event as well.
        self.at_least_until = time.monotonic() + CONNECT_TIMEOUT

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        # Bytes trickle in, but never a whole event.
        if time.monotonic() > max(self.patience.deadline, self.at_least_until):
            raise ConnectionLost("no whole event came in time")
        try:
            data = self.raw.read1(len(buffer), decode_content=True)
        except ReadTimeoutError as error:
            raise ConnectionLost(f"nothing came for {STALL_TIMEOUT:.0f} seconds") from error
        except (HTTPError, OSError) as error:
            raise ConnectionLost("the connection was cut") from error
        buffer[: len(data)] = data
        return len(data)


# What follows, down to `is_new`, is the same in client_async.py, to the letter --------------------


class Event(TypedDict):
    """One event, as the server sent it."""

    event_id: int
    data: str
    is_last_event: bool


class StreamError(Exception):
    """The stream could not be read to its end: one sentence, why and what to do."""


class ConnectionLost(Exception):
    """This connection is of no more use, another one may be."""


class CannotConnect(ConnectionLost):
    """Nobody listens: at the start that is told at once, later the server may come back."""


class Patience:
    """When a reader comes back after a loss, and when it gives up."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.ever_connected = False
        self.begin_anew()

    def begin_anew(self) -> None:
        """A new event came."""
        self.deadline = time.monotonic() + GIVE_UP_AFTER
        self.delay = FIRST_DELAY

    def wait_after(self, lost: ConnectionLost, last_event_id: int | None) -> float:
        """Return the seconds until the next attempt, each time half as long again.

        Raises:
            StreamError: the reader gives up, or nobody listened at the start.
        """
        if isinstance(lost, CannotConnect) and not self.ever_connected:
            raise StreamError(
                f"Cannot connect to {self.url}: {lost}. "
                "Start the server with `uvicorn main:app`, or check the address."
            ) from lost
        self.ever_connected = True
        where = "at the start" if last_event_id is None else f"after event {last_event_id}"
        remaining = self.deadline - time.monotonic()
        if remaining <= 0:
            raise StreamError(
                f"Gave up {where}: {self.url} sent no new event for {GIVE_UP_AFTER:.0f} seconds, "
                f"at last because {lost}. Check the server, then try again."
            ) from lost
        if self.delay == FIRST_DELAY:
            logger.warning("The stream broke off %s (%s); resuming it.", where, lost)
        # Not to the millisecond, or all the readers of a server come back in one moment.
        wait = min(self.delay * random.uniform(0.9, 1.1), remaining)
        self.delay *= 1.5
        return wait


def parse_event(line: bytes, url: str) -> Event | None:
    """Return the event in this line, or None for an empty line and for one that was cut off.

    Raises:
        StreamError: the line is no event.
    """
    if not line.strip():
        return None
    if len(line) >= MAX_LINE:
        raise StreamError(f"{url} sent a line of over {MAX_LINE} bytes. Check the address.")
    try:
        event = json.loads(line)
    except (ValueError, RecursionError):  # no JSON, no UTF-8, or nested without end
        if line.startswith(b"{") and not line.endswith(b"\n"):
            return None  # cut in the middle: the event comes again when the stream is resumed
        event = None
    match event:
        case {"event_id": int(), "data": str(), "is_last_event": bool()}:
            return cast(Event, event)
    raise StreamError(
        f"{url} sent a line that is no event: {line[:60]!r}. "
        "Expected JSON with event_id, data and is_last_event; check the address."
    )


def is_new(event: Event, last_event_id: int | None, url: str) -> bool:
    """Tell whether the event is the next one, and not one that a server sends a second time.

    Raises:
        StreamError: events are missing before this one.
    """
    expected = 0 if last_event_id is None else last_event_id + 1
    if event["event_id"] > expected:
        raise StreamError(
            f"{url} sent event {event['event_id']} where event {expected} was expected: events are "
            "lost. Read the stream again from its start."
        )
    return event["event_id"] == expected


# In a terminal ------------------------------------------------------------------------------------


def main() -> int:
    """Print the events of the stream as they arrive; return the exit status."""
    try:
        from client import Terminal  # only here: `read_events` needs no other file
    except ImportError as error:
        sys.exit(f"Printing needs client.py in this folder too ({error}); read_events does not.")
    about = "Read a stream of NDJSON events and print each one when it arrives."
    with Terminal(about, "http://localhost:8000/ndjson", "events", StreamError) as terminal:
        for event in read_events(terminal.url):
            terminal.show(json.dumps(event, ensure_ascii=False))
    return terminal.status


if __name__ == "__main__":
    sys.exit(main())
