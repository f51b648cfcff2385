"""The line readers behind a proxy that cuts, resets, stalls, trickles and refuses.

Whatever it does, the ten events come once each and in order.
"""

import pytest

from tests.support.fault_proxy import Fault, complete_answer, fault_proxy, plans, try_all
from tests.support.processes import Process
from tests.support.wrong_servers import ALL, both_line_readers, load, read


@pytest.fixture(autouse=True)
def _quiet(caplog: pytest.LogCaptureFixture) -> None:
    """Thousands of warnings are expected here."""
    caplog.set_level("ERROR")


@pytest.mark.parametrize("fault", plans(1))
@both_line_readers
def test_nothing_is_lost_or_doubled(client: str, fault: str, shared_server: Process) -> None:
    """A quarter of what `python -m tests.support.fault_proxy` tries."""
    port = shared_server.port
    tries = plans(len(complete_answer(port)))[fault][::4]
    tally = try_all(client, port, tries)
    assert (tally.lost, tally.doubled, tally.wrong) == (0, 0, [])
    assert tally.tried == len(tries)
    # The faults were real: nearly always, a second request was needed.
    assert tally.connections > 1.8 * tally.tried or fault == "a byte at a time"


@both_line_readers
def test_one_event_a_connection_is_enough(client: str, shared_server: Process) -> None:
    """Every connection is cut in the middle of its second event: the stream still gets on."""
    port = shared_server.port
    after = complete_answer(port).index(b'{"event_id":1') + 5
    for fault in (Fault("cut", after), Fault("stall", after)):
        module = load(client, FIRST_DELAY=0.001, STALL_TIMEOUT=0.2)
        with fault_proxy(port, [fault], for_ever=True) as proxy:
            assert read(module, proxy.url) == (ALL, None)
            assert len(proxy.connections) >= 10
