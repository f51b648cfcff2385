"""`EndStreams` before anybody's responses: which end when the server stops, how, and which not."""

import re
import socket
import subprocess
import sys
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import pytest
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import connect

from tests.support.processes import ENVIRONMENT, LIMIT, ROOT, Process, Start, need, run_python
from tests.support.raw_reader import RawReader, read_until, wait_until_idle
from tests.support.stopping import KINDS, Streams, assert_no_error, save_a_file, terminate

UVICORN = (sys.executable, "-m", "uvicorn", "--port", "{port}", "--no-access-log")
APP, STACKS = "tests.support.endings:app", "tests.support.endings:stacks"


# In a mounted app, from the outside; one in the outer app and one in the mounted; among others'
# middlewares: `@app.middleware("http")` inside, outside or both, gzip, another `EndStreams`.
MOUNTS = ["", "/mounted", "/nested"]
AMONG = ["/end_http", "/http_end", "/http_end_http", "/end_end", "/end_gzip", "/gzip_end"]


@pytest.mark.parametrize(
    ("app", "prefixes", "options", "stop"),
    [
        (APP, MOUNTS, [], terminate),
        (APP, MOUNTS, ["--reload"], save_a_file),
        (STACKS, AMONG, [], terminate),
    ],
    ids=["SIGTERM", "reload", "among middlewares"],
)
def test_streams_of_each_kind_and_downloads(
    app: str,
    prefixes: list[str],
    options: list[str],
    stop: Callable[[Process], None],
    start: Start,
    tmp_path: Path,
) -> None:
    """A download is whole: the server waits for its end."""
    # In a folder of its own, where a saved file reloads no other server.
    environment = {**ENVIRONMENT, "PYTHONPATH": str(ROOT)}
    server = start(*UVICORN, app, *options, cwd=tmp_path, env=environment)
    streams = Streams(server, [prefix + kind for prefix in prefixes for kind in KINDS], 6)
    downloads = [
        RawReader(server.port, f"{prefixes[0]}/download?media_type={media_type}")
        for media_type in ("application/octet-stream", "application/x-ndjson", "text/plain")
    ]
    assert read_until(downloads, lambda: all(download.arrivals for download in downloads))
    stop(server)
    streams.assert_ended_properly()
    read_to_the_end(*downloads)
    for download in downloads:
        assert download.ended_properly
        assert download.body == b"".join(b"%d\n" % number for number in range(30))
    if stop is save_a_file:
        server.wait_for_log("Application startup complete", count=2)
    else:
        server.wait()
    assert_no_error(server)


def read_to_the_end(*readers: RawReader) -> None:
    assert read_until(readers, lambda: all(reader.ended_at for reader in readers))


def test_a_download_that_the_server_cuts_looks_cut(start: Start) -> None:
    """And a reader who never reads holds nothing up for longer than the server allows."""
    server = start(*UVICORN, APP, "--timeout-graceful-shutdown", "3")
    never_reads = RawReader(server.port, "/fast")
    streams = Streams(server, KINDS, 2)
    with subprocess.Popen(
        [need("curl", "curl"), "-sN", f"{server.url}/download?interval=5"], stdout=subprocess.PIPE
    ) as curl:
        assert curl.stdout
        assert curl.stdout.read(2) == b"0\n"
        terminate(server)
        streams.assert_ended_properly()
        assert curl.wait(LIMIT) == 18  # "Partial file"
    server.wait()
    never_reads.close()


def test_a_slow_reader_gets_all_that_was_sent(start: Start) -> None:
    server = start(*UVICORN, APP)
    reader = RawReader(server.port, "/fast", receive_buffer=4096)
    wait_until_idle(server)  # it cannot send any more
    terminate(server)
    server.wait_for_log("Waiting for connections to close")
    read_to_the_end(reader)
    assert reader.ended_properly
    event = b"data: %s\n\n" % (b"x" * 10_000)
    assert reader.body == event * (len(reader.body) // len(event))
    server.wait()
    assert_no_error(server)


def receive_all(connection: socket.socket) -> bytes:
    """Return what comes until the connection is closed."""
    received = b""
    while data := connection.recv(65536):
        received += data
    return received


def test_a_request_that_is_half_sent(start: Start) -> None:
    """It is read to its end and answered. If the answer is a stream, that one ends properly."""
    server = start(*UVICORN, APP)
    with ExitStack() as stack:
        connections = []
        for count, (method, stream) in enumerate((("POST", False), ("GET", True)), start=1):
            connection = socket.create_connection(("127.0.0.1", server.port), LIMIT)
            connections.append(stack.enter_context(connection))
            connection.sendall(
                f"{method} /upload?reader={method}&stream={stream} HTTP/1.1\r\n"
                "Host: test\r\nContent-Length: 20\r\n\r\n0123456789".encode()
            )
            server.wait_for_log("upload 10", count)
        terminate(server)
        server.wait_for_log("Waiting for connections to close")
        for connection in connections:
            connection.sendall(b"0123456789")
        answer, streamed = map(receive_all, connections)
    assert answer.startswith(b"HTTP/1.1 200 OK\r\n")
    assert answer.endswith(b"\r\n\r\n20 bytes")
    assert streamed.startswith(b"HTTP/1.1 200 OK\r\n")
    assert streamed.endswith(b"\r\n0\r\n\r\n")
    assert sorted(re.findall("INFO ended (.*)", server.log)) == ["GET", "POST"]
    server.wait()
    assert_no_error(server)


def test_websockets_and_the_lifespan_pass_through(start: Start) -> None:
    server = start(*UVICORN, APP)
    with connect(f"ws://127.0.0.1:{server.port}/echo") as websocket:
        websocket.send("still here")
        assert websocket.recv(LIMIT) == "still here"
        terminate(server)
        with pytest.raises(ConnectionClosed) as closed:
            websocket.recv(LIMIT)
        assert closed.value.rcvd
        assert closed.value.rcvd.code == 1012  # "Service Restart", as uvicorn says it
    server.wait()
    assert re.findall("lifespan .*", server.log) == ["lifespan begins", "lifespan ends"]
    assert_no_error(server)


def test_generators_that_raise_or_take_their_time(start: Start) -> None:
    server = start(*UVICORN, APP)
    raises = RawReader(server.port, "/raises?reader=raises")
    read_to_the_end(raises)
    raises_at_last = RawReader(server.port, "/raises_at_last?reader=raises_at_last")
    slow = RawReader(server.port, "/slow_to_close?reader=slow")
    readers = [raises_at_last, slow]
    assert read_until(readers, lambda: all(reader.arrivals for reader in readers))
    terminate(server)
    for reader in readers:
        read_to_the_end(reader)
    for reader in (raises, raises_at_last):
        assert reader.body == b"data: 0\n\n"
        assert not reader.ended_properly
    assert slow.ended_properly
    server.wait()
    ends = re.findall("(?:ended|closed) .*", server.log)
    assert ends == ["closed slow", "ended slow"]
    assert re.findall("^RuntimeError: .*", server.log, re.M) == [
        "RuntimeError: in mid-stream",
        "RuntimeError: at last",
    ]


# More than one server, or class, in a process; other ways to stop ---------------------------------


def test_two_servers_one_after_the_other_on_one_loop(start: Start) -> None:
    """And the handlers that were there run as if nothing stood before them, and are there again."""
    code = """
import asyncio, signal, sys, uvicorn
signals = []
handler = lambda signum, frame: signals.append(signum)
signal.signal(signal.SIGTERM, handler)
async def main():
    for _ in range(2):
        config = uvicorn.Config("tests.support.endings:app", port=int(sys.argv[1]))
        await uvicorn.Server(config).serve()
asyncio.run(main())
assert signals == [signal.SIGTERM] * 2
assert signal.getsignal(signal.SIGTERM) is handler
"""
    server = start(sys.executable, "-c", code, "{port}")
    for run, prefix in enumerate(("", "/mounted"), start=1):
        server.wait_for_log("Application startup complete", count=run)
        server.wait_until_listening()
        # The stop of the server before ends nothing here.
        whole = RawReader(server.port, "/main/sse?interval=0.02")
        read_to_the_end(whole)
        assert whole.event_ids == list(range(10))
        streams = Streams(server, [f"{prefix}{kind}" for kind in KINDS], 2)
        terminate(server)
        streams.assert_ended_properly()
    assert server.wait() == 0
    assert_no_error(server)


def test_a_server_in_a_thread() -> None:
    """It gets no signals, so its program calls `EndStreams.stop()`; and again for the next one."""
    result = run_python("""
import signal, threading, time
import requests, uvicorn
from main import EndStreams
from tests.support.endings import app

def handlers():
    return [signal.getsignal(signum) for signum in (signal.SIGINT, signal.SIGTERM)]

before = handlers()
for _ in range(2):
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="warning"))
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    port = server.servers[0].sockets[0].getsockname()[1]
    url = f"http://127.0.0.1:{port}/streaming?reader=me&interval=0.05"
    with requests.get(url, stream=True) as answer:
        lines = answer.iter_lines()
        while next(lines) != b"data: 3":
            pass
        EndStreams.stop()
        server.should_exit = True
        list(lines)  # a body that is cut would raise
    thread.join()
    assert handlers() == before
""")
    assert result.returncode == 0, result.stderr
    assert not re.search("Traceback|ERROR", result.stderr), result.stderr
