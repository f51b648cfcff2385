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
        "500 POSTs, 100 side by side",
        "readers leave, come back and read slowly",
    ],
)
def test_a_fault(name: str) -> None:
    need("redis-server", "redis-server")
    need("nginx", "nginx")
    seen = feed_faults.run(FAULTS[name], 20)
    assert seen.events
    assert (seen.lost, seen.doubled, seen.disordered) == (0, 0, 0)
    if connections := re.search("([0-9]+) connections to Redis by two servers", seen.note):
        assert 0 < int(connections[1]) <= 6
        assert seen.note.endswith(" 0 refused")


def test_the_table_is_of_what_the_program_does() -> None:
    section = (ROOT / "tests/README.md").read_text().partition("<!-- feed faults -->\n")[2]
    names, line, *rows = section.partition("\n\n")[0].splitlines()
    assert f"{names}\n{line}" == feed_faults.HEAD
    cells = [[cell.strip() for cell in re.split(r"(?<!\\)\|", row)[1:-1]] for row in rows]
    assert [row[0] for row in cells] == list(FAULTS)
    assert {tuple(row[3:6]) for row in cells} == {("0", "0", "0")}
