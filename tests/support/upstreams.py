"""An upstream for `relay` that sends any bytes. The model's name in the question says which.

with Upstream({"fine": http(whole("Hello")), "hangs": hang}) as upstream: …
"""

import json
import re
import socket
import socketserver
import threading
from collections.abc import Callable, Mapping
from typing import Any

LIMIT = 60.0  # seconds
Handler = Callable[[socket.socket], None]


def chunk(delta: dict[str, Any], reason: str | None = None, **more: Any) -> str:
    choice = {"index": 0, "delta": delta, "finish_reason": reason}
    chunk = {"id": "x", "object": "chat.completion.chunk", "created": 1, "model": "x"}
    return json.dumps({**chunk, "choices": [choice], **more})


def whole(text: str, reason: str | None = "stop", **more: Any) -> bytes:
    message = {"role": "assistant", "content": text}
    choice = {"index": 0, "message": message, "finish_reason": reason}
    answer = {"id": "x", "object": "chat.completion", "created": 1, "model": "x"}
    return json.dumps({**answer, "choices": [choice], **more}).encode()


BEGINNING = (chunk({"role": "assistant"}), chunk({"content": "One"}), chunk({"content": " two"}))


def events(*datas: str) -> bytes:
    return "".join(f"data: {data}\n\n" for data in datas).encode()


def http(
    body: bytes,
    status: str = "200 OK",
    headers: str = "",
    media_type: str | None = None,
    length: int | None = None,
) -> bytes:
    """A response, with the media type that fits the body, and a length that may be a lie."""
    fits = "application/json" if body.startswith((b"{", b"[")) else "text/event-stream"
    length = len(body) if length is None else length
    head = (
        f"HTTP/1.1 {status}\r\nContent-Type: {media_type or fits}\r\nContent-Length: {length}\r\n"
    )
    return f"{head}{headers}\r\n".encode() + body


def head(media_type: str = "text/event-stream") -> bytes:
    """The head of a response that ends with its connection."""
    return f"HTTP/1.1 200 OK\r\nContent-Type: {media_type}\r\nConnection: close\r\n\r\n".encode()


def hang(connection: socket.socket) -> None:
    """Say nothing, until the reader has left."""
    connection.recv(1)


def hang_after(said: bytes) -> Handler:
    def say_and_hang(connection: socket.socket) -> None:
        connection.sendall(said)
        hang(connection)

    return say_and_hang


class Upstream:
    """`asked` has what came: the head and the body of each request. `left` has the models of
    those whose reader closed the connection before the answer was over, or after it.
    """

    def __init__(self, answers: Mapping[str, bytes | Handler], port: int = 0) -> None:
        self.answers = dict(answers)
        self.asked: list[tuple[str, bytes]] = []
        self.left: list[str] = []
        upstream = self

        class Connection(socketserver.StreamRequestHandler):
            timeout = LIMIT

            def handle(self) -> None:
                head = b""
                while not head.endswith(b"\r\n\r\n"):
                    line = self.rfile.readline()
                    if not line:
                        return
                    head += line
                length = re.search(rb"content-length: *(\d+)", head, re.IGNORECASE)
                body = self.rfile.read(int(length[1])) if length else b""
                upstream.asked.append((head.decode("latin-1"), body))
                upstream.answer(head.split(b" ")[1].decode(), body, self.connection)

        class Server(socketserver.ThreadingTCPServer):
            daemon_threads = True
            allow_reuse_address = True
            request_queue_size = 128

        self.server = Server(("127.0.0.1", port), Connection)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}/v1"

    def answer(self, path: str, body: bytes, connection: socket.socket) -> None:
        if path.endswith("/models"):
            data = [{"id": model, "object": "model"} for model in self.answers]
            model, answer = "models", http(json.dumps({"object": "list", "data": data}).encode())
            answer = self.answers.get("models", answer)  # type: ignore[assignment]
        else:
            found = re.search(rb'"model": ?"([^"]*)"', body)
            model = found[1].decode() if found else ""
            answer = self.answers[model]  # type: ignore[assignment]
        try:
            if callable(answer):
                answer(connection)
                connection.sendall(b"")
            else:
                connection.sendall(answer)
                connection.shutdown(socket.SHUT_WR)
                connection.recv(1)
        except OSError:
            pass
        self.left.append(model)

    def __enter__(self) -> "Upstream":
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.server.shutdown()
        self.server.server_close()
