"""Read the plain-text stream 16 bytes at a time, with requests, and see why that is not enough.

Run `python client.py [URL]`. Each line shows the time, the bytes of a piece, and its text.
Plain text cannot tell an end from a cut, or where to resume: for that, see client_sync.py.
"""

import argparse
import codecs
import io
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import datetime

import requests
from urllib3.exceptions import HTTPError

STALL_TIMEOUT = 30.0  # seconds; the server is silent for at most 10


def read_chunks(url: str) -> Iterator[tuple[bytes, str]]:
    """Yield each chunk of at most 16 bytes as it arrives, and the text that it completes."""
    decoder = codecs.getincrementaldecoder("utf-8")()  # keeps the first bytes of a character
    with explained(url), requests.get(url, timeout=(5, STALL_TIMEOUT), stream=True) as response:
        check_status(response, url)
        # `read1` returns what has arrived; `read` would wait for all of the 16 bytes.
        while chunk := response.raw.read1(16, decode_content=True):
            yield chunk, decoder.decode(chunk)
        decoder.decode(b"", final=True)  # an error, if the last character is incomplete


class StreamError(Exception):
    """The stream could not be read to its end: one sentence says why, and what to do."""


@contextmanager
def explained(url: str) -> Iterator[None]:
    """Turn every error into a StreamError."""
    try:
        yield
    except StreamError:
        raise
    except Exception as error:
        cause = error  # libraries wrap errors in errors; the innermost one explains the most
        while isinstance(inner := cause.__cause__ or [None, *cause.args][-1], Exception):
            cause = inner
        reason = getattr(cause, "strerror", None) or repr(cause)
        if isinstance(error, requests.exceptions.ProxyError) or "SOCKS" in reason:
            reason = f"the proxy failed ({reason})"
        advice = "Start the server with `uvicorn main:app`, or check the address."
        if isinstance(error, HTTPError) and not isinstance(error, ValueError):  # in mid-stream
            advice = "Text cut off in mid-stream cannot be resumed; NDJSON can, see client_sync.py."
        raise StreamError(f"Cannot read {url}: {reason}. {advice}") from error


def check_status(response: requests.Response, url: str) -> None:
    if (code := response.status_code) != 200:
        status = f"{code} {response.reason}".rstrip()
        text = "" if code > 199 else "requests does not read past an interim answer"
        with suppress(HTTPError, OSError):  # cut, silent or damaged: the status says enough
            text = text or response.raw.read1(300, decode_content=True).decode(errors="ignore")
        raise StreamError(f"{url} answered {status}, not a stream: {text!r}. Check the address.")


def run(read: Callable[..., None], url: str, what: str, failure: type[Exception]) -> int:
    """Print what arrives, then a summary; return the exit status."""
    end = "Exit status: 0 the stream is complete, 1 it is not (one line says why), 130 Ctrl-C."
    parser = argparse.ArgumentParser(description=read.__doc__, epilog=end)
    parser.add_argument("url", nargs="?", default=url, help="default: %(default)s")
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # for a terminal that is not UTF-8
    start, status, arrivals = time.monotonic(), 0, list[float]()

    def show(text: str) -> None:
        arrivals.append(time.monotonic() - start)
        try:
            print(f"{datetime.now().time().isoformat('milliseconds')}  {text}", flush=True)
        except OSError as error:  # such as `python client.py | head -3`, or a full disk
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            sys.exit(f"Cannot write to standard output: {error.strerror}.")

    try:
        read(parser.parse_args().url, show)
    except failure as error:
        print(error, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        status = 130
    took = time.monotonic() - start
    first = f", the first after {arrivals[0]:.2f} s" if arrivals else ""
    if arrivals and took > 1 and arrivals[0] > 0.9 * took:
        first += ": all at once at the end, so something on the way held the stream back"
    print(f"{len(arrivals)} {what} in {took:.2f} s{first}.", file=sys.stderr)
    return status


def show_chunks(url: str, show: Callable[[str], None]) -> None:
    """Read a plain-text stream 16 bytes at a time and print each piece."""
    for chunk, text in read_chunks(url):
        show(f"{chunk!s:<30} {text!r}")


def main() -> int:
    return run(show_chunks, "http://localhost:8000/text", "pieces", StreamError)


if __name__ == "__main__":
    sys.exit(main())
