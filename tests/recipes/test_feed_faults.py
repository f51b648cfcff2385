"""The faults of recipes/feed.py, one after the other: a few readers, nothing lost or doubled."""

import re

import pytest

from recipes.feed_redis import PATIENCE
from tests.faults import feed
from tests.support.processes import ROOT, need

FAULTS = {fault.strike: fault for fault in feed.FAULTS}
STAY = (
    feed.kill_redis,
    feed.stall_redis,
    feed.silence,
    feed.take_nothing,
    feed.fail_in_one_reader,
    feed.fail_over,
)
CUT = (feed.restart_one_after_the_other, feed.kill_a_server)
LOSE = (feed.lose_the_data, feed.turn_the_clock_back)


@pytest.mark.parametrize("strikes", [STAY, CUT, LOSE], ids=["readers stay", "cut", "a gap each"])
def test_faults(strikes: tuple[feed.Strike, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    need("redis-server", "redis-server")
    need("nginx", "nginx")
    monkeypatch.setattr(feed, "SETTLE", 0.3)
    monkeypatch.setattr(feed, "STALL", 3.0)
    monkeypatch.setattr(feed, "REFUSE", 1.0)
    faults = [FAULTS[strike] for strike in strikes]
    seen = feed.run(20, *faults, **{"feed_redis.PATIENCE": 1, "feed_redis.CHECK": 1})
    assert seen.events
    assert (seen.lost, seen.doubled, seen.disordered) == (0, 0, 0)
    assert seen.gaps == (len(strikes) * seen.readers if strikes is LOSE else 0)
    for stayed, slowest in re.findall(
        "([0-9]+) readers stayed; each 503 within ([0-9.]+)", seen.note
    ):
        assert int(stayed) == seen.readers
        assert float(slowest) < 10  # on a busy machine; here it is after a second
    assert PATIENCE < 5


def test_the_table_is_of_what_the_program_does() -> None:
    section = (ROOT / "tests/README.md").read_text().partition("<!-- feed faults -->\n")[2]
    names, line, *rows = section.partition("\n\n")[0].splitlines()
    assert f"{names}\n{line}" == feed.HEAD
    cells = [[cell.strip() for cell in re.split(r"(?<!\\)\|", row)[1:-1]] for row in rows]
    assert [row[0] for row in cells] == [fault.name for fault in feed.FAULTS]
    assert {tuple(row[3:6]) for row in cells} == {("0", "0", "0")}
