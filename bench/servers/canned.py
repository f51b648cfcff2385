"""Sends events that were made in advance, faster than any reader in Python takes them in.

/events/ndjson and /events/sse send one HTTP chunk and one TCP segment an event, as uvicorn does;
/blocks/ndjson and /blocks/sse send chunks of 500 events, as a proxy does that lags behind.
"""

import sys
from functools import cache
from socket import IPPROTO_TCP, TCP_NODELAY, create_server
from urllib.parse import parse_qs, urlsplit

from events import event_json, event_sse

TYPES = {"ndjson": "application/x-ndjson", "sse": "text/event-stream"}
BLOCK = 500  # events


def chunk(body: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(body), body)


@cache
def pieces(path: str, steps: int) -> list[bytes]:
    """The answer, cut into what is handed to the network at a time."""
    _, cut, form = path.split("/")
    if form == "sse":
        events = [event_sse(event_id, steps) for event_id in range(steps)]
    else:
        events = [f"{event_json(event_id, steps)}\n".encode() for event_id in range(steps)]
    if cut == "blocks":
        events = [b"".join(events[i : i + BLOCK]) for i in range(0, steps, BLOCK)]
    head = f"HTTP/1.1 200 OK\r\ncontent-type: {TYPES[form]}\r\ntransfer-encoding: chunked\r\n\r\n"
    return [head.encode(), *map(chunk, events), b"0\r\n\r\n"]


def main() -> None:
    with create_server(("127.0.0.1", int(sys.argv[1]))) as listener:
        while True:
            connection, _ = listener.accept()
            connection.setsockopt(IPPROTO_TCP, TCP_NODELAY, 1)
            with connection:
                if not (request := connection.recv(65536)):
                    continue
                target = urlsplit(request.split(b" ", 2)[1].decode())
                steps = int(parse_qs(target.query)["steps"][0])
                try:
                    for piece in pieces(target.path, steps):
                        connection.sendall(piece)
                    connection.recv(1)  # the reader closes first
                except OSError:  # it did not read to the end
                    pass


if __name__ == "__main__":
    main()
