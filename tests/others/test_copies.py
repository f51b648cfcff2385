"""The sections of main.py that can be copied, in somebody's project whose own file is main.py."""

import subprocess
import sys
from pathlib import Path

from tests.support.processes import Start
from tests.support.raw_reader import RawReader, read_until
from tests.support.readme import copy_section
from tests.support.stopping import assert_no_error, terminate

THEIRS = """
import asyncio
from fastapi import FastAPI
from end_streams import EndStreams
from stream import Stream

app = FastAPI()
app.add_middleware(EndStreams)

async def generate():
    try:
        while True:
            yield "data: x\\n\\n"
            await asyncio.sleep(60)
    finally:
        await asyncio.sleep(0.01)
        print("closed", flush=True)

@app.get("/")
async def feed():
    return Stream(generate(), media_type="text/event-stream")
"""


def test_stream_and_end_streams(start: Start, tmp_path: Path) -> None:
    copy_section(2, tmp_path / "stream.py")
    copy_section(4, tmp_path / "end_streams.py")
    (tmp_path / "main.py").write_text(THEIRS)
    words = ["-m", "uvicorn", "main:app", "--port", "{port}"]
    server = start(sys.executable, *words, cwd=tmp_path)
    readers = [RawReader(server.port, "/") for _ in range(2)]
    assert read_until(readers, lambda: all(reader.arrivals for reader in readers))
    readers[0].close()
    server.wait_for_log("closed")
    terminate(server)
    assert read_until(readers, lambda: readers[1].ended_at)
    assert readers[1].ended_properly
    server.wait()
    assert server.log.count("closed") == 2
    assert_no_error(server)


def test_end_streams_needs_the_standard_library_alone(tmp_path: Path) -> None:
    copy_section(4, tmp_path / "end_streams.py")
    # Without site-packages: https://docs.python.org/3/using/cmdline.html#cmdoption-S
    code = f"import sys; sys.path.append({str(tmp_path)!r}); from end_streams import EndStreams"
    subprocess.run([sys.executable, "-I", "-S", "-c", code], check=True)
