"""What the server puts on the wire, over real sockets, line by line."""

import json
import socket
import time

import pytest
import requests

from tests.support.processes import LIMIT, Process
from tests.support.raw_reader import RawReader, read_until

STREAMS = {
    "/text": "text/plain; charset=utf-8",
    "/ndjson": "application/x-ndjson",
    "/sse": "text/event-stream",
}


def get(server: Process, path: str, **headers: str) -> requests.Response:
    return requests.get(server.url + path, headers=headers, timeout=LIMIT)


def test_the_three_formats(shared_server: Process) -> None:
    text, ndjson, sse = (
        get(shared_server, f"{path}?interval=0").content.decode() for path in STREAMS
    )
    assert text == "".join(f"Step {i} of 10: ☕\n" for i in range(1, 11))
    assert ndjson.endswith("}\n")
    lines = ndjson.splitlines()
    assert [json.loads(line) for line in lines] == [
        {"event_id": i, "data": f"Step {i + 1} of 10: ☕", "is_last_event": i == 9}
        for i in range(10)
    ]
    assert sse == "".join(f"id: {i}\nretry: 1000\ndata: {line}\n\n" for i, line in enumerate(lines))


@pytest.mark.parametrize(("path", "media_type"), STREAMS.items())
def test_headers(shared_server: Process, path: str, media_type: str) -> None:
    response = get(shared_server, f"{path}?interval=0")
    assert response.status_code == 200
    assert response.headers["Content-Type"] == media_type
    assert response.headers["Cache-Control"] == "no-cache, no-transform"
    assert response.headers["X-Accel-Buffering"] == "no"
    assert response.headers["Transfer-Encoding"] == "chunked"


def test_events_leave_on_their_schedule(shared_server: Process) -> None:
    interval = 0.5
    asked = time.time()
    readers = [RawReader(shared_server.port, f"{p}?steps=6&interval={interval}") for p in STREAMS]
    assert read_until(readers, lambda: all(reader.ended_at for reader in readers))
    for reader in readers:
        first = reader.arrivals[0]
        assert len(reader.arrivals) == 6
        assert first - asked < interval, "the first event leaves at once"
        for k, arrived in enumerate(reader.arrivals):
            # Neither early nor all at the end. A busy machine may be late by most of an interval.
            assert -0.1 < arrived - (first + k * interval) < 0.9 * interval


def test_lateness_does_not_add_up(shared_server: Process) -> None:
    """200 sleeps of 10 ms, each a little late, still end after 2 seconds."""
    reader = RawReader(shared_server.port, "/ndjson?steps=201&interval=0.01")
    assert read_until([reader], lambda: reader.ended_at)
    assert 1.95 < reader.arrivals[-1] - reader.arrivals[0] < 2.2


def test_a_reader_that_sleeps_does_not_shift_the_schedule(shared_server: Process) -> None:
    """A reader that takes its time finds the events that were due meanwhile waiting for it."""
    with socket.create_connection(("127.0.0.1", shared_server.port)) as reader:
        reader.sendall(b"GET /text?steps=21&interval=0.1 HTTP/1.1\r\nHost: x\r\n\r\n")
        start = time.monotonic()
        time.sleep(1.5)
        received = b""
        while not received.endswith(b"0\r\n\r\n"):
            received += reader.recv(65536)
        assert received.count(b"Step") == 21
        assert time.monotonic() - start < 2.9


@pytest.mark.parametrize("path", STREAMS)
def test_what_is_left_after_the_last_event(shared_server: Process, path: str) -> None:
    """The same bytes as in the complete stream. (test_openapi.py tries every `Last-Event-ID`.)"""
    whole = get(shared_server, f"{path}?interval=0").content
    rest = get(shared_server, f"{path}?interval=0", **{"Last-Event-ID": "4"}).content
    if path == "/text":  # which has no ids, and cannot be resumed
        assert rest == whole
    else:
        assert rest == whole[whole.index(b"id: 5" if path == "/sse" else b'{"event_id":5') :]
        nothing = get(shared_server, path, **{"Last-Event-ID": "9"})
        assert nothing.status_code == 204
        # A cache may keep a 204, and would give it to a reader who wants the whole stream.
        assert "no-cache" in nothing.headers["Cache-Control"]


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("steps", "0", "greater than or equal to 1"),
        ("steps", "100001", "less than or equal to 100000"),
        ("steps", "1.5", "valid integer"),
        ("interval", "-0.1", "greater than or equal to 0"),
        ("interval", "10.1", "less than or equal to 10"),
        ("interval", "nan", "finite number"),
        ("interval", "inf", "finite number"),
        ("interval", "soon", "valid number"),
    ],
)
def test_422_names_the_parameter_its_range_and_what_came(
    shared_server: Process, name: str, value: str, says: str
) -> None:
    for path in STREAMS:
        response = get(shared_server, f"{path}?{name}={value}")
        assert response.status_code == 422
        (detail,) = response.json()["detail"]
        assert (detail["loc"], detail["input"]) == (["query", name], value)
        assert says in detail["msg"]


def test_http_1_0_reader_gets_the_stream(shared_server: Process) -> None:
    """HTTP/1.0 knows no chunks: the end of the connection is the end of the body."""
    with socket.create_connection(("127.0.0.1", shared_server.port), timeout=60) as reader:
        reader.sendall(b"GET /text?steps=3&interval=0 HTTP/1.0\r\n\r\n")
        answer = b""
        while piece := reader.recv(65536):
            answer += piece
    assert answer.count("☕".encode()) == 3
