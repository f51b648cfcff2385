"""How tests publish in recipes/feed.py: many events, quickly."""

import json
import re
import socket
import threading

from tests.support.processes import LIMIT, Process


def numbers(first: int, stop: int, size: int = 0) -> list[str]:
    """Texts for events: numbers, with spaces after them up to a size."""
    return [str(number).ljust(size) for number in range(first, stop)]


def post(text: str, path: str) -> bytes:
    body = json.dumps({"data": text}).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: test\r\nContent-Type: application/json\r\n"
    return f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body


def publish(server: Process, *texts: str, path: str = "/feed/goals") -> list[str]:
    """Publish events, one after the other on one connection; return their ids."""
    requests = b"".join(post(text, path) for text in texts)
    with socket.create_connection(("127.0.0.1", server.port), LIMIT) as connection:
        sender = threading.Thread(target=connection.sendall, args=[requests])
        sender.start()
        answers = b""
        while answers.count(b'"}') < len(texts):
            data = connection.recv(65536)
            assert data, answers
            answers += data
        sender.join(LIMIT)
    assert answers.count(b"HTTP/1.1 201 ") == len(texts), answers
    return [found.decode() for found in re.findall(rb'{"id":"([0-9]+-[0-9]+)"}', answers)]
