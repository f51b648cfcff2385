"""The line readers behind a proxy that cuts, resets, stalls, trickles and refuses.

Whatever it does, the ten events come once each and in order, or one sentence says why not.
"""

import time
from collections.abc import Callable

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.support.fault_proxy import QUICK, Fault, FaultProxy, try_all, whole_answer
from tests.support.processes import LIMIT, Process, wait_for
from tests.support.wrong_servers import (
    ALL,
    CHUNKED,
    CLOSED,
    END,
    Answer,
    Connection,
    both_line_readers,
    chunk,
    event,
    events,
    load,
    read,
    wrong_server,
)


@pytest.fixture(scope="module")
def proxy(shared_server: Process) -> FaultProxy:
    return FaultProxy(shared_server.port)


@both_line_readers
def test_cut_after_every_byte(client: str, proxy: FaultProxy, shared_server: Process) -> None:
    """With FIN and with RST in turn. (`python -m tests.support.fault_proxy` does all of both.)"""
    answer = whole_answer(shared_server.port)
    faults = [Fault("reset" if n % 2 else "cut", n) for n in range(len(answer) + 1)]
    tally = try_all(client, proxy, [[fault] for fault in faults], at_once=8)
    assert (tally.lost, tally.doubled, tally.disordered, tally.errors) == (0, 0, 0, [])
    # The faults were real: wherever the last event was not yet there, a second request was needed.
    assert tally.tried == len(answer) + 1
    assert tally.connections >= tally.tried + answer.rindex(b'{"event_id"')


faults = st.builds(
    Fault,
    st.sampled_from(["cut", "reset", "stall", "trickle", "502", "503"]),
    st.integers(0, 904),
)
random_faults = settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@both_line_readers
@random_faults
@given(plan=st.lists(faults, max_size=6))
def test_any_faults(client: str, proxy: FaultProxy, plan: list[Fault]) -> None:
    module = load(client, **QUICK)
    with proxy.route(plan) as route:
        assert read(module, route.url) == (ALL, None)


@both_line_readers
@random_faults
@given(plan=st.lists(faults, min_size=1, max_size=3))
def test_a_fault_that_stays(client: str, proxy: FaultProxy, plan: list[Fault]) -> None:
    """Its last fault meets every connection: no event is lost in silence, and nothing hangs."""
    module = load(
        client, FIRST_DELAY=0.001, STALL_TIMEOUT=0.1, GIVE_UP_AFTER=0.3, CONNECT_TIMEOUT=0.3
    )
    with proxy.route(plan, for_ever=True) as route:
        ids, sentence = read(module, route.url)
    assert ids == ALL[: len(ids)]
    assert ids == ALL or (sentence and sentence.startswith("Gave up"))


@both_line_readers
def test_one_event_a_connection_is_enough(
    client: str, proxy: FaultProxy, shared_server: Process
) -> None:
    """Every connection is cut in the middle of its second event: the stream still gets on."""
    answer = whole_answer(shared_server.port)
    after = answer.index(b'{"event_id":1') + 5
    for fault in (Fault("cut", after), Fault("stall", after)):
        module = load(client, FIRST_DELAY=0.001, STALL_TIMEOUT=0.2)
        with proxy.route([fault], for_ever=True) as route:
            assert read(module, route.url) == (ALL, None)
            assert route.connections >= 10


# Stalled, and given up ----------------------------------------------------------------------------


@pytest.mark.parametrize("head", [b"", b"HTTP/1.1 200 OK\r\nX: ", CHUNKED, CHUNKED + b"10\r\n{"])
@both_line_readers
def test_a_stalled_connection_is_resumed(client: str, head: bytes) -> None:
    """Open and silent: after some events, and again after any part of the next answer."""
    answers: list[bytes] = [CHUNKED + chunk(events(0, 4)), head]

    def answer(connection: Connection) -> None:
        if connection.number <= 2:
            connection.send(answers[connection.number - 1])
            connection.wait_until_closed()
        else:
            connection.send(CHUNKED + chunk(events(connection.first, 10)) + END)

    module = load(client, FIRST_DELAY=0.01, STALL_TIMEOUT=1.0)
    with wrong_server(answer) as server:
        assert read(module, server.url) == (ALL, None)
        seen = [connection.headers.get("last-event-id") for connection in server.connections]
        assert seen[:3] == [None, "3", "3"]
        # The stalled ones are closed, not left to the server.
        wait_for(lambda: all(c.closed for c in server.connections[:2]), "them to be closed")


def endless(head: bytes, more: bytes = b"") -> Answer:
    def answer(connection: Connection) -> None:
        connection.send(head)
        if not more:
            connection.wait_until_closed()
        while True:
            connection.send(more)
            time.sleep(0.01)

    return answer


ENDLESS = {
    "silence": endless(b""),
    "silence after an interim answer": endless(b"HTTP/1.1 100 Continue\r\n\r\n"),
    "a line that never ends": endless(CLOSED + b'{"event_id": 0, "data": "', b"x"),
    "blank lines": endless(CHUNKED, chunk(b"\n")),
    "many blank lines": endless(CLOSED, b"\n" * 1000),
    "an event that is not new": endless(CLOSED + event(0), event(0)),
}


@pytest.mark.parametrize("case", ENDLESS)
@both_line_readers
def test_without_a_new_event_it_gives_up(client: str, case: str) -> None:
    answers: dict[str, Callable[[Connection], None]] = ENDLESS
    module = load(client, GIVE_UP_AFTER=1.0, STALL_TIMEOUT=0.4, CONNECT_TIMEOUT=0.5)
    with wrong_server(answers[case]) as server:
        begun = time.monotonic()
        ids, sentence = read(module, server.url)
        took = time.monotonic() - begun
    assert ids == ALL[: len(ids)]
    assert sentence
    assert sentence.startswith("Gave up ")
    assert f"{server.url} sent no new event for 1 seconds, most recently because " in sentence
    assert 1 <= took < LIMIT / 4


@both_line_readers
def test_with_new_events_it_does_not_give_up(client: str) -> None:
    """A stream may last longer than that, on one connection."""

    def answer(connection: Connection) -> None:
        connection.send(CHUNKED)
        for event_id in range(10):
            connection.send(chunk(event(event_id)))
            time.sleep(0.25)

    module = load(client, GIVE_UP_AFTER=1.5, CONNECT_TIMEOUT=0.5)
    with wrong_server(answer) as server:
        assert read(module, server.url) == (ALL, None)
        assert len(server.connections) == 1


@pytest.fixture(autouse=True)
def _quiet(caplog: pytest.LogCaptureFixture) -> None:
    """Thousands of warnings are expected here."""
    caplog.set_level("ERROR")
