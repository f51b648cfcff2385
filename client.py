"""Read the plain-text stream 16 bytes at a time, with requests, and see why that is not enough.

Run `python client.py [URL]`. Each line of output is one arrival: the time of day, the bytes as they
were cut, and the text that they complete. A cut falls where it likes, in the middle of a line and
even of a character. And nothing in the text tells an end from a cut, or where to go on after one:
for that, see client_sync.py and client_async.py.

What all three scripts do in a terminal is at the end: `Terminal`.
"""

import argparse
import codecs
import io
import os
import sys
import time
from collections.abc import Iterator
from datetime import datetime
from typing import Self

import requests
from urllib3.exceptions import HTTPError, MaxRetryError, ReadTimeoutError

CHUNK_SIZE = 16  # bytes
CONNECT_TIMEOUT = 5.0  # seconds
STALL_TIMEOUT = 30.0  # seconds without a byte; the server is never silent for more than 10


def read_chunks(url: str) -> Iterator[bytes]:
    """Yield the body of the answer from `url` as it arrives, at most 16 bytes at a time.

    Raises:
        StreamError: nobody listens, the answer is an error (4xx, 5xx), the connection is cut, or
            nothing comes for 30 seconds.
    """
    try:
        with requests.get(url, timeout=(CONNECT_TIMEOUT, STALL_TIMEOUT), stream=True) as response:
            if response.status_code != 200:
                status = f"{response.status_code} {response.reason}".rstrip()
                raise StreamError(
                    f"{url} answered {status}, not a stream: {start_of_body(response)!r}. "
                    "Check the address and its parameters."
                )
            # `read1` returns what has arrived; `read` would wait for all of the 16 bytes.
            while chunk := response.raw.read1(CHUNK_SIZE, decode_content=True):
                yield chunk
    except (requests.ReadTimeout, ReadTimeoutError) as error:
        raise StreamError(
            f"{url} sent nothing for {STALL_TIMEOUT:.0f} seconds. Check the server, then try again."
        ) from error
    except requests.exceptions.SSLError as error:
        raise StreamError(
            f"Cannot connect to {url}: the TLS handshake failed. Check the address."
        ) from error
    except requests.ConnectionError as error:
        if isinstance(error.args[0], MaxRetryError):  # it never got as far as a connection
            raise StreamError(
                f"Cannot connect to {url}: nobody listens there. "
                "Start the server with `uvicorn main:app`, or check the address."
            ) from error
        raise StreamError(
            f"{url} cut its answer off, or it is no HTTP. Check the address, then try again."
        ) from error
    except (requests.RequestException, ValueError) as error:  # ValueError: a bad redirect
        raise StreamError(
            f"Cannot read {url} ({error}). Expected an address such as http://localhost:8000/text."
        ) from error
    except (HTTPError, OSError) as error:
        raise StreamError(
            f"{url} was cut off in mid-stream, and plain text cannot be resumed. Start again, "
            "or read /ndjson with client_sync.py."
        ) from error


def main() -> int:
    """Print the pieces of the stream as they arrive; return the exit status."""
    about = "Read a plain-text stream 16 bytes at a time and print each piece."
    with Terminal(about, "http://localhost:8000/text", "pieces", StreamError) as terminal:
        # Keeps the first bytes of a character until the rest of it has come.
        decoder = codecs.getincrementaldecoder("utf-8")()
        try:
            for chunk in read_chunks(terminal.url):
                terminal.show(f"{chunk!s:<30} {decoder.decode(chunk)!r}")
            decoder.decode(b"", final=True)
        except UnicodeDecodeError as error:
            raise StreamError(
                f"{terminal.url} sent bytes that are no UTF-8 ({error.reason}). Expected "
                "text/plain; charset=utf-8: check the address."
            ) from error
    return terminal.status


class StreamError(Exception):
    """The stream could not be read to its end: one sentence, why and what to do."""


def start_of_body(response: requests.Response) -> str:
    """Return what an answer that is no stream says, or "" if that was cut, stalls or is damaged."""
    try:
        return response.raw.read1(300, decode_content=True).decode(errors="ignore")
    except (HTTPError, OSError):
        return ""


class Terminal:
    """A reader in a terminal: which address it reads, a line for each arrival, and how it ended.

    `with Terminal(...) as terminal:` goes around the loop that reads `terminal.url`;
    `terminal.status` is the exit status, when the loop has ended in whatever way.
    """

    def __init__(
        self, about: str, default_url: str, what: str, stream_error: type[Exception]
    ) -> None:
        parser = argparse.ArgumentParser(
            description=about,
            epilog="Exit status: 0 read to the end, 1 not (one line says why), 130 Ctrl-C.",
        )
        parser.add_argument("url", nargs="?", default=default_url, help="default: %(default)s")
        self.url: str = parser.parse_args().url
        self.what = what  # arrives
        self.stream_error = stream_error
        self.status = 0
        self.count = 0
        self.first_after = 0.0
        self.start = time.monotonic()
        if isinstance(sys.stdout, io.TextIOWrapper):
            sys.stdout.reconfigure(errors="backslashreplace")  # for a terminal that is not UTF-8

    def show(self, text: str) -> None:
        """Print one arrival, with the time of day."""
        if not self.count:
            self.first_after = time.monotonic() - self.start
        self.count += 1
        print(f"{datetime.now().time().isoformat('milliseconds')}  {text}", flush=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> bool:
        """Say how it ended. Only what nobody expects is left to be a traceback."""
        if error is None:
            self.sum_up()
        elif isinstance(error, KeyboardInterrupt):
            self.status = 130
            self.sum_up()
        elif isinstance(error, self.stream_error):
            self.status = 1
            print(error, file=sys.stderr)
        elif isinstance(error, OSError):  # such as `python client.py | head -3`, or a full disk
            self.status = 1
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            print(f"Nobody takes the output any more ({error.strerror}).", file=sys.stderr)
        else:
            return False
        return True

    def sum_up(self) -> None:
        took = time.monotonic() - self.start
        summary = f"{self.count} {self.what} in {took:.2f} s"
        if self.count:
            summary += f", the first after {self.first_after:.2f} s"
        if self.count and took > 1 and self.first_after > 0.9 * took:
            summary += ": all at once at the end, so something on the way held the stream back"
        print(f"{summary}.", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
