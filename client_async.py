"""Read the NDJSON stream like a collection, with aiohttp.

Run `python client_async.py [URL]`, or use it from a program of your own:

    from client_async import read_events

    async for event in read_events("http://localhost:8000/ndjson"):
        print(event["data"])

Each event comes once, in order and whole. Where the stream breaks off, it is resumed after the last
event that came. To leave the loop early, put the iterator into `contextlib.aclosing`.
"""

from __future__ import annotations

import asyncio
import json
import logging
import random
import sys
import time
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager
from typing import TypedDict, cast

import aiohttp
from aiohttp.http_exceptions import LineTooLong

CONNECT_TIMEOUT = 5.0  # seconds
STALL_TIMEOUT = 15.0  # seconds without a byte; the server is never silent for more than 10
GIVE_UP_AFTER = 30.0  # seconds without a new event
FIRST_DELAY = 0.2  # seconds before the stream is resumed; each further attempt waits longer
MAX_LINE = 64 * 1024 * 1024  # bytes; without a limit, a line that never ends would take all memory

logger = logging.getLogger(__name__)


async def read_events(url: str) -> AsyncGenerator[Event]:
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
            async with open_stream(url, last_event_id) as response:
                if response.status == 204:  # nothing is left after last_event_id
                    return
                # The last attempt, made at the deadline, has the time to bring an event as well.
                at_least_until = time.monotonic() + CONNECT_TIMEOUT
                while line := await read_line(response, max(patience.deadline, at_least_until)):
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
            await asyncio.sleep(patience.wait_after(lost, last_event_id))


@asynccontextmanager
async def open_stream(url: str, last_event_id: int | None) -> AsyncIterator[aiohttp.ClientResponse]:
    """Send the request and give the answer, 200 or 204, with its body still to be read."""
    headers = {} if last_event_id is None else {"Last-Event-ID": str(last_event_id)}
    # Without `total=None` aiohttp ends every stream after five minutes.
    timeout = aiohttp.ClientTimeout(
        total=None, sock_connect=CONNECT_TIMEOUT, sock_read=STALL_TIMEOUT
    )
    async with aiohttp.ClientSession(timeout=timeout) as session:
        try:
            response = await session.get(url, headers=headers)
        except aiohttp.ClientSSLError as error:
            raise CannotConnect("the TLS handshake failed") from error
        except aiohttp.ClientConnectorError as error:
            raise CannotConnect("nobody listens there") from error
        except aiohttp.ConnectionTimeoutError as error:
            raise CannotConnect("nobody answers there") from error
        except TimeoutError as error:
            raise ConnectionLost(f"nothing came for {STALL_TIMEOUT:.0f} seconds") from error
        except aiohttp.TooManyRedirects as error:
            raise StreamError(f"{url} redirects without end. Check the address.") from error
        except (aiohttp.ClientConnectionError, aiohttp.ClientResponseError) as error:
            raise ConnectionLost("the answer was cut off or is no HTTP") from error
        except (aiohttp.ClientError, ValueError) as error:
            raise StreamError(
                f"Cannot read {url} ({error}). Expected an address such as http://localhost:8000/ndjson."
            ) from error
        async with response:
            status = f"{response.status} {response.reason}".rstrip()
            if response.status >= 500:
                raise ConnectionLost(f"the server answered {status}")
            if response.status not in (200, 204):
                raise StreamError(
                    f"{url} answered {status}, not a stream: {await start_of_body(response)!r}. "
                    "Check the address and its parameters."
                )
            yield response


async def start_of_body(response: aiohttp.ClientResponse) -> str:
    """Return what an answer that is no stream says, or "" if that was cut, stalls or is damaged."""
    try:
        return (await response.content.read(300)).decode(errors="ignore")
    except (aiohttp.ClientError, OSError):
        return ""


async def read_line(response: aiohttp.ClientResponse, deadline: float) -> bytes:
    """Return the next line as soon as it is there whole, or `b""` at the end of the body."""
    try:
        async with asyncio.timeout(deadline - time.monotonic()):
            # Without `max_line_length` aiohttp refuses a line of more than 512 KB.
            return await response.content.readline(max_line_length=MAX_LINE)
    except aiohttp.SocketTimeoutError as error:
        raise ConnectionLost(f"nothing came for {STALL_TIMEOUT:.0f} seconds") from error
    except TimeoutError as error:  # bytes trickle in, but never a whole event
        raise ConnectionLost("no whole event came in time") from error
    except LineTooLong as error:
        raise StreamError(
            f"{response.url} sent a line of over {MAX_LINE} bytes. Check the address."
        ) from error
    # RuntimeError is all that aiohttp says of a damaged chunk that came while nobody was reading.
    except (aiohttp.ClientError, OSError, RuntimeError) as error:
        raise ConnectionLost("the connection was cut") from error


# What follows, down to `is_new`, is the same in client_sync.py, to the letter ---------------------


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

    async def show_events(terminal: Terminal) -> None:
        async for event in read_events(terminal.url):
            terminal.show(json.dumps(event, ensure_ascii=False))

    about = "Read a stream of NDJSON events and print each one when it arrives."
    with Terminal(about, "http://localhost:8000/ndjson", "events", StreamError) as terminal:
        asyncio.run(show_events(terminal))
    return terminal.status


if __name__ == "__main__":
    sys.exit(main())
