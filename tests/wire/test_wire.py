"""What the server puts on the wire, over real sockets, line by line."""

import http.client
import json
import socket
import time
from pathlib import Path

import psutil
import pytest

from tests.support.processes import LOG_CONFIG, UVICORN, Process, Start, wait_for

STREAMS = {
    "/text": "text/plain; charset=utf-8",
    "/ndjson": "application/x-ndjson",
    "/sse": "text/event-stream",
}
RESUMABLE = ["/ndjson", "/sse"]


def get(
    server: Process, path: str, headers: dict[str, str] | None = None
) -> tuple[http.client.HTTPResponse, bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
    connection.request("GET", path, headers=headers or {})
    response = connection.getresponse()
    body = response.read()
    connection.close()
    return response, body


def arrivals(server: Process, path: str) -> list[tuple[float, bytes]]:
    """Read a stream; return each HTTP chunk with the time at which it came, in seconds."""
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
    connection.request("GET", path)
    response = connection.getresponse()
    pieces = []
    while piece := response.read1():
        pieces.append((time.monotonic(), piece))
    connection.close()
    return pieces


def event_ids(path: str, body: bytes) -> list[int]:
    """Return the ids of the events in the body of /ndjson or /sse, in their order."""
    lines = body.decode().split("\n")
    if path.startswith("/sse"):
        return [int(line.removeprefix("id: ")) for line in lines if line.startswith("id: ")]
    return [json.loads(line)["event_id"] for line in lines if line]


def test_text_is_a_line_for_each_event(shared_server: Process) -> None:
    _, body = get(shared_server, "/text?interval=0")
    assert body.decode() == "".join(f"Step {i} of 10: ☕\n" for i in range(1, 11))


def test_ndjson_is_a_line_of_json_for_each_event(shared_server: Process) -> None:
    _, body = get(shared_server, "/ndjson?interval=0")
    assert body.endswith(b"}\n")
    events = [json.loads(line) for line in body.decode().splitlines()]
    assert events == [
        {"event_id": i, "data": f"Step {i + 1} of 10: ☕", "is_last_event": i == 9}
        for i in range(10)
    ]


def test_sse_has_the_same_events_with_their_ids(shared_server: Process) -> None:
    _, body = get(shared_server, "/sse?interval=0")
    _, lines = get(shared_server, "/ndjson?interval=0")
    assert body.decode() == "".join(
        f"id: {i}\nretry: 1000\ndata: {line}\n\n"
        for i, line in enumerate(lines.decode().splitlines())
    )


def test_a_cut_after_16_bytes_cuts_a_character(shared_server: Process) -> None:
    _, body = get(shared_server, "/text?interval=0")
    with pytest.raises(UnicodeDecodeError):
        body[:16].decode()


@pytest.mark.parametrize(("path", "media_type"), STREAMS.items())
def test_headers(shared_server: Process, path: str, media_type: str) -> None:
    response, _ = get(shared_server, f"{path}?interval=0")
    assert response.status == 200
    assert response.headers["Content-Type"] == media_type
    assert response.headers["Cache-Control"] == "no-cache, no-transform"
    assert response.headers["X-Accel-Buffering"] == "no"
    assert response.headers["Transfer-Encoding"] == "chunked"


@pytest.mark.parametrize("path", STREAMS)
def test_events_leave_on_their_schedule(shared_server: Process, path: str) -> None:
    interval = 0.5
    asked = time.monotonic()
    pieces = arrivals(shared_server, f"{path}?steps=6&interval={interval}")
    first = pieces[0][0]
    assert len(pieces) == 6
    assert first - asked < interval, "the first event leaves at once"
    for k, (arrived, _) in enumerate(pieces):
        # Neither early nor all at the end. A busy machine may be late by most of an interval.
        assert -0.1 < arrived - (first + k * interval) < 0.9 * interval


def test_lateness_does_not_add_up(shared_server: Process) -> None:
    """200 sleeps of 10 ms, each a little late, still end after 2 seconds."""
    pieces = arrivals(shared_server, "/ndjson?steps=201&interval=0.01")
    assert 1.95 < pieces[-1][0] - pieces[0][0] < 2.2


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


@pytest.mark.parametrize("path", RESUMABLE)
@pytest.mark.parametrize("last", [0, 4, 8])
def test_resumes_after_the_last_event(shared_server: Process, path: str, last: int) -> None:
    _, whole = get(shared_server, f"{path}?interval=0")
    response, rest = get(shared_server, f"{path}?interval=0", {"Last-Event-ID": str(last)})
    assert response.status == 200
    assert event_ids(path, rest) == list(range(last + 1, 10))
    assert whole.endswith(rest)


@pytest.mark.parametrize("path", RESUMABLE)
@pytest.mark.parametrize("last", ["9", "10", "99999999999999999999999999"])
def test_204_when_nothing_is_left(shared_server: Process, path: str, last: str) -> None:
    response, body = get(shared_server, f"{path}?interval=0", {"Last-Event-ID": last})
    assert response.status == 204
    assert body == b""
    # A cache may keep a 204, and would give it to a reader who wants the whole stream.
    assert "no-cache" in response.headers["Cache-Control"]


@pytest.mark.parametrize("path", RESUMABLE)
@pytest.mark.parametrize("last", ["-1", "+1", "1.0", "1_0", "1e1", "x", "0x1", "²", "1, 2"])
def test_422_for_what_is_no_event_id(shared_server: Process, path: str, last: str) -> None:
    response, body = get(shared_server, f"{path}?interval=0", {"Last-Event-ID": last})
    assert response.status == 422
    (detail,) = json.loads(body)["detail"]
    assert detail["loc"] == ["header", "last-event-id"]


@pytest.mark.parametrize("path", RESUMABLE)
def test_an_empty_event_id_is_none(shared_server: Process, path: str) -> None:
    _, body = get(shared_server, f"{path}?interval=0", {"Last-Event-ID": ""})
    assert event_ids(path, body) == list(range(10))


def test_text_cannot_be_resumed(shared_server: Process) -> None:
    _, body = get(shared_server, "/text?interval=0", {"Last-Event-ID": "4"})
    assert body.count(b"\n") == 10


@pytest.mark.parametrize("path", STREAMS)
@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("steps", "0", "greater than or equal to 1"),
        ("steps", "100001", "less than or equal to 100000"),
        ("steps", "x", "valid integer"),
        ("steps", "1.5", "valid integer"),
        ("interval", "-0.1", "greater than or equal to 0"),
        ("interval", "10.1", "less than or equal to 10"),
        ("interval", "nan", "finite number"),
        ("interval", "inf", "finite number"),
        ("interval", "soon", "valid number"),
    ],
)
def test_422_names_the_parameter_its_range_and_what_came(
    shared_server: Process, path: str, name: str, value: str, says: str
) -> None:
    response, body = get(shared_server, f"{path}?{name}={value}")
    assert response.status == 422
    (detail,) = json.loads(body)["detail"]
    assert detail["loc"] == ["query", name]
    assert says in detail["msg"]
    assert detail["input"] == value


@pytest.mark.parametrize(
    "query", ["steps=1&interval=10", "steps=100000&interval=0", "steps=1&interval=0"]
)
def test_the_ends_of_the_ranges_are_allowed(shared_server: Process, query: str) -> None:
    response, body = get(shared_server, f"/ndjson?{query}")
    assert response.status == 200
    last = json.loads(body.splitlines()[-1])
    assert last["is_last_event"] is True
    assert f"steps={last['event_id'] + 1}&" in query


def test_index_lists_the_streams_for_a_program(shared_server: Process) -> None:
    response, body = get(shared_server, "/")
    assert response.headers["Content-Type"] == "application/json"
    assert response.headers["Vary"] == "Accept"
    index = json.loads(body)
    assert isinstance(index["message"], str)
    assert index["streams"] == list(STREAMS)


def test_http_1_0_reader_gets_the_stream(shared_server: Process) -> None:
    """HTTP/1.0 knows no chunks: the end of the connection is the end of the body."""
    with socket.create_connection(("127.0.0.1", shared_server.port), timeout=60) as reader:
        reader.sendall(b"GET /text?steps=3&interval=0 HTTP/1.0\r\n\r\n")
        answer = b""
        while piece := reader.recv(65536):
            answer += piece
    assert answer.count("☕".encode()) == 3


@pytest.mark.parametrize("how", ["sleeping", "sending"])
@pytest.mark.parametrize("path", STREAMS)
def test_a_reader_that_goes_away_closes_its_generator(
    start: Start, tmp_path: Path, path: str, how: str
) -> None:
    """The generator's `finally` runs at once, whether it sleeps or waits for a full socket."""
    config = tmp_path / "log.json"
    config.write_text(json.dumps(LOG_CONFIG))
    server = start(*UVICORN, "--log-config", str(config))
    query = "interval=10" if how == "sleeping" else "steps=100000&interval=0"
    reader = socket.socket()
    reader.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)  # or all of it would fit in there
    reader.connect(("127.0.0.1", server.port))
    reader.sendall(f"GET {path}?{query} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
    received = b""
    while b"Step 1 of" not in received:
        received += reader.recv(1024)
    if how == "sending":  # wait until the server is stuck: its CPU time stands still
        process = psutil.Process(server.pid)

        def stuck() -> bool:
            before = process.cpu_times()
            time.sleep(0.5)
            return process.cpu_times() == before

        wait_for(stuck, "the server to wait for its reader")
    assert "generator closed" not in server.log
    reader.close()
    (at,) = server.wait_for_log(r"generator closed at event (\d+) of")
    assert int(at) == 1 if how == "sleeping" else 0 < int(at) < 99_999
    assert "Traceback" not in server.log
