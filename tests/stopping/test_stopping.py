"""The server is asked to stop in mid-stream, by the signals that people and supervisors send."""

import itertools
import json
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.processes import (
    LOG_CONFIG,
    ROOT,
    UVICORN,
    Process,
    RunningClient,
    Start,
    wait_for,
)
from tests.support.raw_reader import FORMATS, RawReader, read_until, wait_until_idle
from tests.support.stopping import assert_no_error, press_ctrl_c, save_a_file, terminate

READERS = 45
# How long streams may take to end in a test: on a busy machine not a quarter of a second, but far
# less than the ten seconds that some of them would still sleep.
SOON = 4.0

# Lines with the time in them.
FORMAT = {"plain": {"format": "%(created).3f %(levelname)s %(message)s"}}

# `python main.py`, but with its port 8000 replaced: somebody else may listen there.
MAIN = """
import runpy, sys, uvicorn
run = uvicorn.run
uvicorn.run = lambda app, **options: run(app, **options | {"port": int(sys.argv[1])})
runpy.run_path("main.py", run_name="__main__")
"""


RELOAD = (*UVICORN, "--reload")
WORKERS = (*UVICORN, "--workers", "2")
AT_ONCE = ""
# How the server runs, what is done to it, and the line of its log that says when the process that
# has the streams is sent the signal, where that is not at once: uvicorn looks for a changed file,
# and the parent of workers for a signal, several times a second.
STOPS = {
    "reload": (RELOAD, save_a_file, r"([\d.]+) WARNING .* Reloading\.\.\."),
    "SIGTERM": (UVICORN, terminate, AT_ONCE),
    "reload, Ctrl-C": (RELOAD, press_ctrl_c, AT_ONCE),
    "workers, Ctrl-C": (WORKERS, press_ctrl_c, AT_ONCE),
    "workers, SIGTERM": (WORKERS, terminate, r"([\d.]+) INFO Terminated child process"),
    "python main.py, Ctrl-C": ((sys.executable, "-c", MAIN, "{port}"), press_ctrl_c, AT_ONCE),
}


@pytest.mark.parametrize(("command", "stop", "signalled"), STOPS.values(), ids=STOPS.keys())
def test_every_stream_ends_at_once_and_goes_on(
    command: tuple[str, ...],
    stop: Callable[[Process], None],
    signalled: str,
    start: Start,
    tmp_path: Path,
) -> None:
    # A copy, so that saving a file there reloads no server of another test.
    app = tmp_path / "app"
    app.mkdir()
    shutil.copy(ROOT / "main.py", app)
    shutil.copytree(ROOT / "page", app / "page")
    if "uvicorn" in command:
        (tmp_path / "log.json").write_text(json.dumps(LOG_CONFIG | {"formatters": FORMAT}))
        command = (*command, "--log-config", str(tmp_path / "log.json"))
    server = start(*command, cwd=app)

    kinds = itertools.cycle(itertools.product(FORMATS, (10, 0.5, 0.05)))
    readers = [
        RawReader(server.port, f"{path}?steps=100000&interval={interval}")
        for path, interval in itertools.islice(kinds, READERS)
    ]
    clients = [
        RunningClient(tmp_path, client, f"{server.url}/ndjson?steps=100000&interval=0.2")
        for client in ("client_sync", "client_async")
    ]
    for client in clients:
        client.wait_for_lines(1)
    assert read_until(readers, lambda: all(reader.arrivals for reader in readers))

    stopped_at = time.time()
    stop(server)
    assert read_until(readers, lambda: all(reader.ended_at for reader in readers))
    if signalled:
        stopped_at = float(server.wait_for_log(signalled)[0])
    took = max(reader.ended_at for reader in readers) - stopped_at
    print(f"{READERS} streams ended within {took * 1000:.0f} ms of the signal")
    assert took < SOON
    for reader in readers:
        assert reader.ended_properly, f"{reader.path} was cut off"
        assert reader.ended_after_an_event
        assert reader.event_ids == list(range(len(reader.event_ids)))

    if stop is save_a_file:
        # The listening socket stays open, so nobody is refused before the new worker runs. Who
        # still gets to the old one has an event and the proper end, and goes on; or, if uvicorn has
        # just closed its connections, no answer at all, and asks again.
        ids: list[int] = []
        while ids[-1:] != [2]:
            last = f"Last-Event-ID: {ids[-1]}\r\n" if ids else ""
            reader = RawReader(server.port, "/ndjson?steps=3&interval=0", last)
            assert read_until([reader], lambda: reader.ended_at)  # noqa: B023
            assert reader.ended_properly or not reader.status
            ids += reader.event_ids
        assert ids == [0, 1, 2]
    else:
        server.wait()
        print(f"the server was down after {time.time() - stopped_at:.2f} s")
        server.start()
    for client in clients:
        assert_went_on(client)
    assert_no_error(server)


def assert_went_on(client: RunningClient) -> None:
    wait_for(lambda: client.errors, "the client to notice the end of its stream")
    assert "resuming it" in client.errors[0]
    lines = client.wait_for_lines(len(client.lines()) + 3)
    client.popen.kill()
    client.wait()
    events = [json.loads(line.partition("  ")[2]) for line in lines]
    assert [event["event_id"] for event in events] == list(range(len(lines)))


STUCK = "/ndjson?steps=100000&interval=0"  # a reader that does not read this blocks its sending


def test_second_ctrl_c_forces(start: Start) -> None:
    server = start(*UVICORN)
    stuck = RawReader(server.port, STUCK)
    wait_until_idle(server)
    press_ctrl_c(server)
    server.wait_for_log("Waiting for connections to close")
    assert server.popen.poll() is None
    press_ctrl_c(server)
    server.wait()
    stuck.close()


def receive_until(connection: socket.socket, end: bytes) -> bytes:
    """Return what came, to the `end` or until the connection was closed."""
    received = b""
    while not received.endswith(end) and (data := connection.recv(65536)):
        received += data
    return received


def test_new_requests_while_stopping(start: Start) -> None:
    """Each is answered to its proper end, or its connection is closed or refused: none hangs."""
    server = start(*UVICORN, "--timeout-graceful-shutdown", "2")
    stuck = RawReader(server.port, STUCK)
    wait_until_idle(server)
    kept_alive = []
    for _ in range(20):
        connection = socket.create_connection(("127.0.0.1", server.port), timeout=SOON)
        connection.sendall(b"GET /text?steps=1 HTTP/1.1\r\nHost: test\r\n\r\n")
        assert receive_until(connection, b"0\r\n\r\n")
        kept_alive.append(connection)

    terminate(server)
    refused = False
    while server.popen.poll() is None:
        try:
            if kept_alive:
                connection = kept_alive.pop()
            else:
                connection = socket.create_connection(("127.0.0.1", server.port), timeout=SOON)
            with connection:
                connection.sendall(
                    b"GET /text?interval=10 HTTP/1.1\r\nHost: test\r\nConnection: close\r\n\r\n"
                )
                answer = receive_until(connection, b"0\r\n\r\n")
            assert not answer or answer.endswith(b"\r\n0\r\n\r\n")  # perhaps without an event
        except ConnectionError as error:
            refused = refused or isinstance(error, ConnectionRefusedError)
            time.sleep(0.02)
    assert refused
    stuck.close()


def test_the_table_of_faults_in_short() -> None:
    """Of our server, and a few readers: nothing lost, nothing doubled, nothing cut off."""
    command = [sys.executable, "-m", "tests.faults.streams", "--ours", "--tries", "1"]
    command += ["--readers", "6", "--vanishing", "0", "--only", "kill"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stdout + result.stderr
    assert re.search(
        r"^\| kill -9, started again \| 6 streams; .* \| 0 \| 0 \|$", result.stdout, re.M
    )
