"""The table of faults of recipes/feed.py in short: a few readers, nothing lost or doubled."""

import re

import pytest

from tests.faults import feed as feed_faults
from tests.support.processes import ROOT, need

FAULTS = {fault.name: fault for fault in feed_faults.FAULTS}


@pytest.mark.parametrize(
    "name",
    [
        "`kill -9` of a server",
        "rolling restart behind nginx",
        "Redis killed, started again (`appendfsync always`)",
        "Redis stalled for 10 s",
        "the line from a server to Redis falls silent",
        "Redis comes back without its data",
        "the same, and its clock is behind",
        "Redis is read-only for 3 s, then full for 3 s",
        "an exception in one reader, again and again",
    ],
)
def test_a_fault(name: str) -> None:
    need("redis-server", "redis-server")
    need("nginx", "nginx")
    seen = feed_faults.run(FAULTS[name], 20)
    assert seen.events
    assert (seen.lost, seen.doubled, seen.disordered) == (0, 0, 0)
    assert seen.gaps == (seen.readers if "its data" in name or "its clock" in name else 0)
    if stayed := re.search("([0-9]+) readers stayed; each 503 within ([0-9.]+) s", seen.note):
        assert int(stayed[1]) == seen.readers
        assert float(stayed[2]) < 15  # on a busy machine; 5 are promised


def test_the_table_is_of_what_the_program_does() -> None:
    section = (ROOT / "tests/README.md").read_text().partition("<!-- feed faults -->\n")[2]
    names, line, *rows = section.partition("\n\n")[0].splitlines()
    assert f"{names}\n{line}" == feed_faults.HEAD
    cells = [[cell.strip() for cell in re.split(r"(?<!\\)\|", row)[1:-1]] for row in rows]
    assert [row[0] for row in cells] == list(FAULTS)
    assert {tuple(row[3:6]) for row in cells} == {("0", "0", "0")}
