"""Other servers than uvicorn: they stream live, and `EndStreams` ends the streams as they stop."""

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.processes import Process, Start
from tests.support.raw_reader import FORMATS, RawReader, event_ids, read_until
from tests.support.stopping import KINDS, Streams, assert_no_error, press_ctrl_c, terminate

# Each has one worker: a second one may not be up yet, and gunicorn and granian stop such a one late
# or never.
GUNICORN = "gunicorn --no-control-socket --bind 127.0.0.1:{port} --worker-class"
HYPERCORN = "hypercorn --bind 127.0.0.1:{port} --graceful-timeout"
SERVERS = {
    "gunicorn, uvicorn-worker": f"{GUNICORN} uvicorn_worker.UvicornWorker",
    "gunicorn, asgi": f"{GUNICORN} asgi",
    "hypercorn": f"{HYPERCORN} 60 --workers 0",
    "hypercorn, a worker process": f"{HYPERCORN} 1 --workers 1",
    "granian": "granian --interface asgi --port {port}",
}


def start_server(start: Start, name: str) -> Process:
    program, *arguments = SERVERS[name].split()
    return start(
        str(Path(sys.executable).with_name(program)), *arguments, "tests.support.endings:app"
    )


def assert_live(server: Process) -> None:
    """Each event of main.py's streams comes when it is made; who leaves does no harm."""
    readers = [RawReader(server.port, f"/main{path}?interval=0.1") for path in FORMATS]
    assert read_until(readers, lambda: all(reader.ended_at for reader in readers))
    for path, reader in zip(FORMATS, readers, strict=True):
        assert reader.ended_properly
        assert event_ids(path, bytes(reader.body)) == list(range(10))
        assert reader.arrivals[-1] - reader.arrivals[0] > 0.5  # not all at once

    leavers = [RawReader(server.port, f"/main{path}?interval=0.05") for path in FORMATS]
    assert read_until(leavers, lambda: all(leaver.arrivals for leaver in leavers))
    for leaver in leavers:
        leaver.reset()


def begin_download(server: Process, interval: float = 0.1) -> RawReader:
    """30 lines, one each `interval` seconds."""
    download = RawReader(server.port, f"/download?interval={interval}")
    assert read_until([download], lambda: download.arrivals)
    return download


def assert_ends(download: RawReader, properly: bool) -> None:
    assert read_until([download], lambda: download.ended_at)
    assert download.ended_properly == properly


@pytest.mark.parametrize(
    ("name", "stop"),
    [
        ("gunicorn, uvicorn-worker", terminate),
        ("gunicorn, uvicorn-worker", press_ctrl_c),
        ("gunicorn, asgi", terminate),
        ("hypercorn", terminate),
        ("granian", terminate),
        ("granian", press_ctrl_c),
    ],
)
def test_streams_end_properly_and_downloads_are_whole(
    name: str, stop: Callable[[Process], None], start: Start
) -> None:
    server = start_server(start, name)
    assert_live(server)
    download = begin_download(server)
    streams = Streams(server, KINDS, 6)
    stop(server)
    streams.assert_ended_properly()
    assert_ends(download, properly=True)
    server.wait()
    assert_no_error(server)


def test_gunicorns_own_worker_waits_for_nothing_after_ctrl_c(start: Start) -> None:
    """It looks once a second, so that most streams have ended before; a download is cut."""
    server = start_server(start, "gunicorn, asgi")
    download = begin_download(server, 10)
    press_ctrl_c(server)
    assert_ends(download, properly=False)
    server.wait()


@pytest.mark.skipif(sys.version_info >= (3, 12), reason="there it waits for the streams' end")
def test_hypercorns_worker_processes_cut_streams(start: Start) -> None:
    """They are stopped by an event that they share, not by a signal: the app sees nothing."""
    server = start_server(start, "hypercorn, a worker process")
    assert_live(server)
    download = begin_download(server, 10)
    streams = Streams(server, KINDS, 2)
    terminate(server)
    streams.read_until(lambda reader: reader.ended_at)
    assert not any(reader.ended_properly for reader in streams.readers.values())
    assert_ends(download, properly=False)
    server.wait()
