"""Connections that are damaged on purpose, between a client and a real server.

Toxiproxy does this too, but PyPI and npm have only clients for its prebuilt binary.

`python -m tests.support.fault_proxy` prints how many events the line readers lose and double: none.
"""

import logging
import random
import socket
import struct
import tempfile
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal, NamedTuple

from tests.support.processes import UVICORN, starting
from tests.support.wrong_servers import (
    LINE_READERS,
    Connection,
    WrongServer,
    error,
    load,
    read,
    wrong_server,
)


class Fault(NamedTuple):
    """What happens to one connection, once so many bytes of the answer have come through."""

    kind: Literal["cut", "reset", "stall", "trickle", "502", "503"]
    after: int = 0


def complete_answer(port: int, first: int = 0) -> bytes:
    """Return the answer with the events from `first` on, as it is on the wire, with its headers."""
    resume = f"Last-Event-ID: {first - 1}\r\n" if first else ""
    request = f"GET /ndjson?interval=0 HTTP/1.1\r\nHost: localhost\r\n{resume}\r\n"
    with socket.create_connection(("127.0.0.1", port)) as connection:
        connection.sendall(request.encode())
        answer = b""
        while not answer.endswith(b"\r\n0\r\n\r\n"):
            answer += connection.recv(65536)
    return answer


def fault_proxy(port: int, faults: list[Fault], for_ever: bool = False) -> WrongServer:
    """Each connection meets the next fault; then there are none, or the last one stays."""

    def answer(connection: Connection) -> None:
        number = connection.number - 1
        if for_ever:
            number = min(number, len(faults) - 1)
        kind, after = faults[number] if number < len(faults) else (None, 0)
        if kind in ("502", "503"):
            connection.send(error(f"{kind} Broken"))
            return
        data = complete_answer(port, connection.first)
        connection.send(data[:after])
        if kind == "reset":  # closed so, the socket sends RST
            linger = struct.pack("ii", 1, 0)
            connection.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        elif kind == "stall":
            connection.wait_until_closed()
        elif kind == "trickle":
            for byte in data[after:]:
                connection.send(bytes([byte]))
        elif kind is None:
            connection.send(data)

    return wrong_server(answer)


class Tally(NamedTuple):
    """How often a fault was tried, and what became of the ten events of each stream."""

    tried: int
    connections: int
    lost: int
    doubled: int
    wrong: list[Any]  # what came out of order, or ended with an error


def try_all(client: str, port: int, plans: Iterable[list[Fault]]) -> Tally:
    """Read a stream of ten events through each of these plans, several at once; count."""
    module = load(client, FIRST_DELAY=0.001, STALL_TIMEOUT=0.2, GIVE_UP_AFTER=60.0)

    def try_one(plan: list[Fault]) -> tuple[int, list[int], str | None]:
        with fault_proxy(port, plan) as proxy:
            ids, error = read(module, proxy.url)
        return len(proxy.connections), ids, error

    with ThreadPoolExecutor(8) as pool:
        tried = list(pool.map(try_one, plans))
    return Tally(
        tried=len(tried),
        connections=sum(connections for connections, _, _ in tried),
        lost=sum(10 - len(set(ids)) for _, ids, _ in tried),
        doubled=sum(len(ids) - len(set(ids)) for _, ids, _ in tried),
        wrong=[each for each in tried if each[2] or each[1] != sorted(each[1])],
    )


def plans(length: int) -> dict[str, list[list[Fault]]]:
    """Return what is tried on an answer of so many bytes: the rows of the table."""
    every = range(length + 1)
    anything = random.Random(1)
    kinds: list[Any] = ["cut", "reset", "stall", "trickle", "502", "503"]
    return {
        "cut (FIN) after each byte of the answer, headers included": [
            [Fault("cut", n)] for n in every
        ],
        "cut (RST) after each byte": [[Fault("reset", n)] for n in every],
        "open but silent, after each tenth byte": [[Fault("stall", n)] for n in every[::10]],
        "a byte at a time": [[Fault("trickle")]] * 20,
        "cut, then 502 three times": [[Fault("cut", 700)] + [Fault("502")] * 3] * 100,
        "cut, then 503 three times": [[Fault("cut", 700)] + [Fault("503")] * 3] * 100,
        "one to six of these, one after the other": [
            [
                Fault(anything.choice(kinds), anything.randrange(length))
                for _ in range(anything.randint(1, 6))
            ]
            for _ in range(200)
        ],
    }


def main() -> None:
    """Print the table: each fault, how often it was tried, events lost and events doubled."""
    logging.disable()
    with tempfile.TemporaryDirectory() as folder, starting(Path(folder)) as start:
        port = start(*UVICORN).port
        print("| fault | times tried, with each reader | lost | doubled |")
        print("| --- | --- | --- | --- |")
        for name, tries in plans(len(complete_answer(port))).items():
            tallies = [try_all(client, port, tries) for client in LINE_READERS]
            lost, doubled = sum(t.lost for t in tallies), sum(t.doubled for t in tallies)
            print(f"| {name} | {len(tries)} | {lost} | {doubled} |", flush=True)


if __name__ == "__main__":
    main()
