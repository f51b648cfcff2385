"""Readers that vanish, and readers that stop reading."""

import json
import re
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.support.processes import (
    LOG_CONFIG,
    UVICORN,
    Process,
    Start,
    wait_for,
)
from tests.support.raw_reader import RawReader, many_descriptors, read_until, wait_until_idle

# These load the server as hard as they can: not two of them at once.
pytestmark = pytest.mark.xdist_group("readers")

STUCK = "/ndjson?steps=100000&interval=0"  # a reader that does not read this blocks its sending


@pytest.fixture
def server(start: Start, tmp_path: Path) -> Iterator[Process]:
    """A server that may have many connections, and whose log shows its generators' ends."""
    (tmp_path / "log.json").write_text(json.dumps(LOG_CONFIG))
    with many_descriptors(4096) as allowed:
        if not allowed:
            pytest.skip("this user may not open 4,096 files: raise the limit (`ulimit -Hn`)")
        yield start(*UVICORN, "--log-config", str(tmp_path / "log.json"), "--no-access-log")


def closed_generators(server: Process) -> list[int]:
    """Return the event at which each generator that was closed so far was closed."""
    return [int(at) for at in re.findall(r"generator closed at event (\d+) of", server.log)]


def memory(server: Process) -> float:
    """Return the resident memory in MB."""
    return float(psutil.Process(server.pid).memory_info().rss / 1e6)


def may_vanish() -> bool:
    """Tell whether this user may close a socket without a packet."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        reader = RawReader(listener.getsockname()[1], "/")
        try:
            reader.vanish()
        except PermissionError:
            reader.close()
            return False
        return True


def test_hundreds_of_readers_vanish(server: Process) -> None:
    """Closed or reset while their streams sleep, gone without a word, or blocked in sending.

    Seven waves of it leave no growth.
    """
    ways = [
        ("close", "/ndjson?interval=10", 500),
        ("reset", "/sse?interval=10", 500),
        ("vanish", "/text?steps=1000&interval=0.5", 500),
        # Each of these is sent 2 MB until the kernel's buffers are full: a few will do.
        ("close", STUCK, 10),
    ]
    if not may_vanish():  # needs root
        del ways[2]
    process = psutil.Process(server.pid)
    wait_until_idle(server)  # until it has closed the connection that found it listening
    descriptors = process.num_fds()
    after_wave = []
    for wave in range(7):
        way, target, count = ways[wave % len(ways)]
        closed_before = len(closed_generators(server))
        readers = [RawReader(server.port, target) for _ in range(count)]
        if target == STUCK:
            wait_until_idle(server)
        else:
            assert read_until(readers, lambda: all(reader.arrivals for reader in readers))  # noqa: B023
        assert process.num_fds() >= descriptors + count

        start = time.monotonic()
        for reader in readers:
            getattr(reader, way)()
        wait_for(
            lambda: len(closed_generators(server)) == closed_before + count,  # noqa: B023
            f"the end of {count} generators",
        )
        wait_for(lambda: process.num_fds() == descriptors, "the descriptors to be closed")
        took = time.monotonic() - start
        wait_until_idle(server)
        after_wave.append(memory(server))
        print(f"{way} {target}: {count} gone after {took:.2f} s, then {after_wave[-1]:.1f} MB")

    # Python and malloc keep some of what they once had, and settle after the first waves. What a
    # stream would leave is more: one costs 12 KB, so a wave that left its streams would add 6 MB.
    # Here 1,000 readers may leave 4 MB, 4 KB each.
    assert after_wave[-1] - after_wave[4] < 4
    assert "ERROR" not in server.log


def test_stuck_readers_hold_up_nobody(server: Process) -> None:
    """Nor do they cost more than their buffers; and one that reads again gets every event."""
    before = memory(server)
    stuck = [RawReader(server.port, STUCK) for _ in range(5)]
    other = RawReader(server.port, "/ndjson?interval=0.2")
    assert read_until([other], lambda: other.ended_at)
    assert other.event_ids == list(range(10))
    late = [at - other.arrivals[0] - k * 0.2 for k, at in enumerate(other.arrivals)]
    print(f"beside five stuck readers an event was up to {max(late) * 1000:.0f} ms late")

    wait_until_idle(server)  # backpressure reached the generators
    assert closed_generators(server) == [9]  # only the other reader's
    cost = (memory(server) - before) / len(stuck)
    print(f"a stuck reader costs {cost * 1000:.0f} KB")
    assert cost < 2

    again = stuck.pop()
    assert read_until([again], lambda: again.ended_at)
    assert again.ended_properly
    assert again.event_ids == list(range(100_000))

    for reader in stuck:
        reader.close()
    wait_for(lambda: len(closed_generators(server)) == 6, "the end of the generators")
    reached = closed_generators(server)[2:]
    print(f"their generators waited at event {min(reached)} to {max(reached)} of 100,000")
    assert max(reached) < 90_000  # they stood still, and did not go on without a reader
