"""Other frameworks behind an `EndStreams` that was copied into a project of theirs."""

import shutil
import sys
from pathlib import Path

import pytest

from tests.support.processes import ROOT, Start
from tests.support.raw_reader import RawReader, read_until
from tests.support.readme import copy_section
from tests.support.stopping import assert_no_error, terminate

WORDS = [f"word{number}" for number in range(20)]


@pytest.mark.parametrize(
    ("name", "gets"),
    [
        ("django", ["/0.1", "/600.0"]),
        ("falcon_sse", ["/0.1", "/600.0", "/stream/0.1", "/stream/600.0"]),
        ("quart", ["/0.1", "/600.0"]),
        ("litestar", ["/0.1", "/600.0"]),
    ],
)
def test_feeds_end_and_answers_are_finished(
    name: str, gets: list[str], start: Start, tmp_path: Path
) -> None:
    """Feeds are closed and end properly on SIGTERM, asleep or not. The answer to a POST runs on."""
    copy_section(4, tmp_path / "end_streams.py")
    shutil.copy(ROOT / "tests/others/frameworks.py", tmp_path / "main.py")
    words = f"-m uvicorn --factory main:{name} --port {{port}}".split()
    server = start(sys.executable, *words, cwd=tmp_path)
    feeds = [RawReader(server.port, path) for path in gets]
    answer = RawReader(server.port, "/0.1", method="POST")
    readers = [*feeds, answer]
    # The endless ones are live: all of them have something before they end.
    assert read_until(readers, lambda: all(reader.arrivals for reader in readers))
    terminate(server)
    assert read_until(readers, lambda: all(reader.ended_at for reader in readers))
    assert [reader.ended_properly for reader in readers] == [True] * len(readers)
    assert answer.body.decode().replace("\r", "").split("\n\n")[:20] == [
        f"data: {word}" for word in WORDS
    ]
    server.wait()
    assert server.log.count("closed GET") == len(feeds)
    assert_no_error(server)
