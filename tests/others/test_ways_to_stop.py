"""Any way in which a server stops, with an app that never asks whether its reader has left."""

import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.processes import ROOT, Start, run_python
from tests.support.raw_reader import RawReader, read_until
from tests.support.readme import copy_section
from tests.support.stopping import assert_no_error

# uvicorn counts a request when its answer is complete.
STOPS_WITHOUT_A_SIGNAL = {
    "limit": "/short",
    "limit, two copies": "/short",
    "should_exit": "/stop",
    "a method, should_exit": "/stop",
}


@pytest.mark.parametrize(
    ("way", "signum"),
    [
        ("limit", 0),
        ("limit, two copies", 0),
        ("should_exit", 0),
        ("a method, should_exit", 0),
        ("replaced", signal.SIGTERM),
        ("chained", signal.SIGTERM),
        ("on the loop", signal.SIGINT),
    ],
)
def test_feeds_end_properly(way: str, signum: int, start: Start, tmp_path: Path) -> None:
    """With a limit of requests, by a flag that the app sets, by handlers that were set later."""
    copy_section(4, tmp_path / "end_streams.py")
    shutil.copy(ROOT / "tests/others/ways_to_stop.py", tmp_path / "main.py")
    server = start(sys.executable, "main.py", way, "{port}", cwd=tmp_path)
    readers = [RawReader(server.port, "/feed"), RawReader(server.port, "/now")]
    # The server's loop has gone on for half a second since the handler was set.
    assert read_until(readers, lambda: all(len(reader.arrivals) > 5 for reader in readers))
    if signum:
        server.signal(signum)
    else:
        readers.append(RawReader(server.port, STOPS_WITHOUT_A_SIGNAL[way]))
    assert read_until(readers, lambda: all(reader.ended_at for reader in readers))
    assert all(reader.ended_properly for reader in readers)
    server.wait()
    assert_no_error(server)


def test_outside_of_a_server_ctrl_c_is_as_always() -> None:
    """asyncio.run() gets its handler back, and cancels; later ones are a KeyboardInterrupt."""
    result = run_python("""
import asyncio, signal
import httpx
from main import app

async def main():
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://t") as client:
        answer = await client.get("/sse?steps=30&interval=0.02")
        assert answer.text.count("data:") == 30
    if interrupt:
        signal.raise_signal(signal.SIGINT)
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            print("cancelled")
            raise

for interrupt in (False, True):
    try:
        asyncio.run(main())
    except KeyboardInterrupt:
        print("KeyboardInterrupt")
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
""")
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == ["cancelled", "KeyboardInterrupt"]


def test_copies_do_not_wrap_one_another_for_ever(tmp_path: Path) -> None:
    """Each wraps a handler once, and not again while the loop goes on. All of them are told."""
    copy_section(4, tmp_path / "end_streams.py")
    result = run_python(f"""
import asyncio, functools, importlib.util, signal

def copied():
    spec = importlib.util.spec_from_file_location("copied", {str(tmp_path / "end_streams.py")!r})
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.EndStreams

def depth(handler):
    return isinstance(handler, functools.partial) and 1 + max(map(depth, handler.args))

async def main():
    for each in copies:
        await each(app)({{"type": "lifespan"}}, None, None)
    await asyncio.sleep(1)
    depths.append(depth(signal.getsignal(signal.SIGTERM)))
    signal.raise_signal(signal.SIGTERM)
    assert all(set(each._stopping.values()) == {{True}} for each in copies)

async def app(scope, receive, send):
    pass

copies, calls, depths = [copied() for _ in range(3)], [], []
signal.signal(signal.SIGTERM, lambda signum, frame: calls.append(signum))
asyncio.run(main())
assert depths == [3], depths
assert calls == [signal.SIGTERM]
""")
    assert result.returncode == 0, result.stderr


def test_it_needs_the_standard_library_alone(tmp_path: Path) -> None:
    copy_section(4, tmp_path / "end_streams.py")
    # Without site-packages: https://docs.python.org/3/using/cmdline.html#cmdoption-S
    code = f"import sys; sys.path.append({str(tmp_path)!r}); from end_streams import EndStreams"
    subprocess.run([sys.executable, "-I", "-S", "-c", code], check=True)
