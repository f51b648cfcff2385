"""What the clients make of an odd answer: one sentence at once, the stream, or another attempt."""

import re
import threading
import time
from itertools import pairwise

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.clients.conftest import Main
from tests.support.processes import LIMIT, wait_for
from tests.support.wrong_servers import (
    ALL,
    CHUNKED,
    CLOSED,
    END,
    GZIPPED,
    STREAM,
    WHOLE,
    Answer,
    Connection,
    all_clients,
    both_line_readers,
    chunk,
    error,
    event,
    events,
    for_each,
    go_on,
    in_turn,
    load,
    read,
    stall,
    wrong_server,
)

SSH = b"SSH-2.0-OpenSSH_9.2\r\n"

# Told at once -------------------------------------------------------------------------------------

NOT_FOUND = b"HTTP/1.1 404 Not Found\r\n"
ERRORS: dict[str, tuple[Answer | bytes, str]] = {
    "404": (error("404 Not Found"), "answered 404 Not Found, not a stream: 'it is broken'"),
    "404 without a reason": (error("404"), "answered 404, not a stream"),
    "404 cut": (NOT_FOUND + b"Content-Length: 9\r\n\r\nabc", "answered 404 Not Found"),
    "404 stalled": (stall(NOT_FOUND + b"Content-Length: 9\r\n\r\n"), "answered 404 Not Found"),
    "404 endless": (stall(NOT_FOUND + b"\r\nabc"), "answered 404 Not Found, not a stream: 'abc'"),
    "404 no gzip": (
        error("404 Not Found", b"abc", b"Content-Encoding: gzip\r\n"),
        "answered 404 Not Found, not a stream: ''",
    ),
    "404 odd charset": (
        error("404 Not Found", b"abc", b"Content-Type: text/plain; charset=rot13\r\n"),
        "answered 404 Not Found, not a stream: 'abc'",
    ),
    "302 to itself": (error("302 Found", headers=b"Location: /\r\n"), "redirects"),
    "302 to no address": (error("302 Found", headers=b"Location: http://[::1\r\n"), "Cannot read"),
    "302 to another scheme": (error("302 Found", headers=b"Location: ftp://x/\r\n"), "ftp://x/"),
    "206": (error("206 Partial Content"), "answered 206 Partial Content, not a stream"),
    "302 to nobody": (
        error("302 Found", headers=b"Location: http://127.0.0.1:1/\r\n"),
        "Connection refused|(redirects|leads) to .*127.0.0.1:1.*, and nobody listens there",
    ),
}


@pytest.mark.parametrize("case", ERRORS)
@all_clients
def test_an_answer_that_is_no_stream_is_told_at_once(client: str, case: str, main: Main) -> None:
    answer, sentence = ERRORS[case]
    with wrong_server(answer) as server:
        printed = main(client, server.url, STALL_TIMEOUT=2.0)
        redirected = case == "302 to itself"
        assert redirected or len(server.connections) == 1
    assert (printed.status, printed.out, len(printed.err)) == (1, [], 1)
    assert re.search(sentence, printed.err[0])
    assert server.url in printed.err[0]


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (error("503 Service Unavailable"), "answered 503 Service Unavailable"),
        (CHUNKED + chunk(b"Step 1") + b"9\r\nSte", "cannot be resumed"),
        (STREAM + b"Content-Length: 99\r\n\r\nStep 1", "cannot be resumed"),
        (GZIPPED + chunk(b"this is not gzip") + END, "decompressing"),
        (CHUNKED + chunk(b"Step 1") + b"zz\r\n", "cannot be resumed"),
        (CLOSED + b"Step \xff", "utf-8"),
        (CLOSED + b"Step 1: \xe2\x98", "unexpected end of data"),
        (SSH, "SSH-2.0-OpenSSH"),
        (b"", "closed connection without response"),
        (stall(CHUNKED + chunk(b"Step 1")), "timed out"),
    ],
)
def test_client_tells_why_it_could_not_read_on(
    answer: Answer | bytes, reason: str, main: Main
) -> None:
    with wrong_server(answer) as server:
        printed = main("client", server.url, STALL_TIMEOUT=2.0)
        assert len(server.connections) == 1
    assert (printed.status, len(printed.err)) == (1, 1)
    assert reason in printed.err[0]


NO_EVENT = "a line that is not an event: b"


# Both line readers have the same function for this, to the letter.
@pytest.mark.parametrize(
    ("line", "wrong"),
    [
        (b"<html>\n", NO_EVENT),
        (b"<html>", NO_EVENT),  # ... whose last line has no end
        (b'{"message": "hello"}\n', NO_EVENT),
        (b"[" * 100_000 + b"\n", NO_EVENT),
        (b'{"event_id": true, "data": "", "is_last_event": false}\n', NO_EVENT),
        (b'{"event_id": 1e999, "data": "", "is_last_event": false}\n', NO_EVENT),
        (
            b'{"event_id": %s, "data": "", "is_last_event": false}\n' % (b"1" * 5000),
            NO_EVENT,
        ),
        (b'{"event_id": 0, "data": "\xff", "is_last_event": false}\n', NO_EVENT),
        (events(0, 10).decode().encode("utf-16"), NO_EVENT),
        (event(2), "event 2 where event 1 was expected: events are lost"),
    ],
    ids=lambda value: repr(value[:40]),
)
def test_a_line_that_is_not_the_next_event_is_told_at_once(
    line: bytes, wrong: str, main: Main
) -> None:
    with wrong_server(CHUNKED + chunk(event(0) + line) + END) as server:
        printed = main("client_sync", server.url)
        assert len(server.connections) == 1
    assert (printed.status, printed.ids, len(printed.err)) == (1, [0], 1)
    assert f"{server.url} sent {wrong}" in printed.err[0]


@both_line_readers
def test_a_line_without_end_is_told(client: str, main: Main) -> None:
    def answer(connection: Connection) -> None:
        connection.send(CLOSED + b'{"event_id": 0, "data": "')
        while True:
            connection.send(b"x" * 65_536)

    with wrong_server(answer) as server:
        printed = main(client, server.url, MAX_LINE=1_000_000)
    assert (printed.status, len(printed.err)) == (1, 1)
    assert f"{server.url} sent a line of " in printed.err[0]


# Read, all ten events of them ---------------------------------------------------------------------

LONG = event(0, data="☕" * 350_000)  # a line of 1 MB
READABLE = {
    "a long line at once": CHUNKED + chunk(LONG + events(1, 10)) + END,
    "a long line in small chunks": CHUNKED
    + b"".join(chunk(LONG[i : i + 100]) for i in range(0, len(LONG), 100))
    + chunk(events(1, 10))
    + END,
    "100": b"HTTP/1.1 100 Continue\r\n\r\n" + WHOLE,
    "headers of 60 KB": STREAM
    + b"X: %s\r\nTransfer-Encoding: chunked\r\n\r\n" % (b"y" * 60_000)
    + chunk(events(0, 10))
    + END,
    "CRLF": CLOSED + events(0, 10).replace(b"\n", b"\r\n"),
    "empty lines": CLOSED + events(0, 10).replace(b"\n", b"\n\n \n"),
    "no last newline": CLOSED + events(0, 10)[:-1],
    "a byte order mark": CLOSED + b"\xef\xbb\xbf" + events(0, 10),
}


@pytest.mark.parametrize("case", READABLE)
@both_line_readers
def test_odd_but_readable(client: str, case: str) -> None:
    with wrong_server(READABLE[case]) as server:
        assert read(load(client), server.url) == (ALL, None)
        assert len(server.connections) == 1


@all_clients
def test_early_hints_come_first(client: str, main: Main) -> None:
    hints = b"HTTP/1.1 103 Early Hints\r\nLink: </a>; rel=preload\r\n\r\n"
    with wrong_server(hints * 2 + WHOLE) as server:
        printed = main(client, server.url)
        assert len(server.connections) == 1
    if client == "client_async":
        assert printed.status == 0
    else:  # http.client takes it for the answer, and there is no way to read on
        assert printed.status == 1
        assert "answered 103 Early Hints" in printed.err[-1]
        assert "interim" in printed.err[-1]


# Tried again --------------------------------------------------------------------------------------

# What the clients are sent at each attempt, and what is said of it.
DAMAGED: dict[str, tuple[Answer | bytes, str]] = {
    "server error": (error("500 Internal Server Error"), "the server answered 500 Internal Server"),
    "too many requests": (error("429 Too Many Requests"), "the server answered 429 Too Many"),
    "no HTTP": (SSH, "SSH-2.0-OpenSSH"),
    "nothing": (b"", ""),
    "status line": (b"HTTP/1.1 abc OK\r\n\r\n", ""),
    "long header": (STREAM + b"X: " + b"y" * 100_000 + b"\r\n\r\n", "ot more than 65536 bytes"),
    "many headers": (STREAM + b"X: y\r\n" * 200 + b"\r\n", "100 headers|Too many headers"),
    "chunk size": (CHUNKED + b"zz\r\n", ""),
    "cut": (CHUNKED + chunk(b'{"event_id":'), "the connection was cut"),
    "damaged gzip": (
        STREAM + b"Content-Encoding: gzip\r\nContent-Length: 4\r\n\r\nabcd",
        "decompressing|decode content-encoding",
    ),
    "event ids": (
        CHUNKED + chunk(b'{"event_id": -1, "data": "", "is_last_event": false}\n') + END,
        "the server ended it early",
    ),
    "blank lines": (CHUNKED + chunk(b"\n\n\n") + END, "the server ended it early"),
}


@pytest.mark.usefixtures("clock")
@pytest.mark.parametrize("case", DAMAGED)
@both_line_readers
def test_a_damaged_answer_is_tried_again_until_it_gives_up(
    client: str, case: str, main: Main
) -> None:
    answer, reason = DAMAGED[case]
    with wrong_server(answer) as server:
        printed = main(client, server.url)
        assert len(server.connections) > 9
    assert (printed.status, printed.out) == (1, [])
    warning, sentence = printed.err
    assert warning.startswith("The stream broke off at the start (")
    start = f"Gave up at the start: {re.escape(server.url)} sent no new event for 30 seconds, "
    assert re.match(rf"{start}most recently because .*({reason})", sentence)


@pytest.mark.usefixtures("clock")
@both_line_readers
def test_thirty_seconds_without_an_event_end_it(client: str, main: Main) -> None:
    """As the scripts are, they wait longer each time, and try for the last time at the end."""
    answer = in_turn(CHUNKED + chunk(events(0, 4)) + END, error("503 Service Unavailable"))
    with wrong_server(answer) as server:
        printed = main(client, server.url)
    attempts = [connection.time - server.connections[0].time for connection in server.connections]
    *waits, _ = [later - earlier for earlier, later in pairwise(attempts)]
    assert len(waits) > 8
    for number, wait in enumerate(waits):
        assert wait == pytest.approx(0.2 * 1.5**number, rel=0.101)
    assert attempts[-1] == pytest.approx(30)
    warning, sentence = printed.err
    assert warning.startswith("The stream broke off after event 3 (")
    assert sentence == (
        f"Gave up after event 3: {server.url} sent no new event for 30 seconds, most recently "
        "because the server answered 503 Service Unavailable. Check the server, then try again."
    )


@pytest.mark.usefixtures("clock")
@both_line_readers
def test_with_new_events_it_does_not_give_up(client: str) -> None:
    """A stream may last longer than that, on one connection."""
    taken = threading.Semaphore(0)

    def answer(connection: Connection) -> None:
        connection.send(CHUNKED)
        for event_id in ALL:
            connection.send(chunk(event(event_id)))
            taken.acquire(timeout=LIMIT)

    def take(_: object) -> None:
        time.sleep(4)
        taken.release()

    with wrong_server(answer) as server:
        for_each(load(client), server.url, take)
        assert len(server.connections) == 1


@both_line_readers
def test_the_last_attempt_may_succeed(client: str) -> None:
    """The one retry is at the deadline, and the server is back by then."""

    def answer(connection: Connection) -> None:
        if connection.number == 1:
            connection.send(error("503 Service Unavailable"))
            return
        connection.send(CHUNKED)
        for event_id in ALL:
            time.sleep(0.02)
            connection.send(chunk(event(event_id)))

    module = load(client, FIRST_DELAY=10.0, GIVE_UP_AFTER=0.5)
    with wrong_server(answer) as server:
        assert read(module, server.url) == (ALL, None)
        first, second = (connection.time for connection in server.connections)
        assert 0.4 < second - first < 9


@both_line_readers
def test_after_a_long_pause_it_tries_once_more(client: str) -> None:
    """A program that was suspended, with its laptop or by Ctrl-Z, has had no chance to resume."""

    def pause(connection: Connection) -> None:
        connection.send(CHUNKED + chunk(events(0, 4)))
        time.sleep(0.5)

    with wrong_server(in_turn(pause, go_on)) as server:
        assert read(load(client, GIVE_UP_AFTER=0.2), server.url) == (ALL, None)


# Events 0 to 2, and half of the next one, as far as into the middle of its ☕.
BEGUN, HALF = events(0, 3), event(3).split(b"\x98")[0]
CUT, EARLY = "the connection was cut", "the server ended it early"
CUTS: dict[str, tuple[Answer | bytes, str]] = {
    "chunked, between chunks": (CHUNKED + chunk(BEGUN) + chunk(HALF), CUT),
    "chunked, in a chunk": (CHUNKED + b"999\r\n" + BEGUN + HALF, CUT),
    "length": (STREAM + b"Content-Length: 2457\r\n\r\n" + BEGUN + HALF, CUT),
    "closed": (CLOSED + BEGUN + HALF, EARLY),
    "a proper end": (CHUNKED + chunk(BEGUN) + chunk(HALF) + END, EARLY),
    "stalled": (stall(CHUNKED + chunk(BEGUN) + chunk(HALF)), "it timed out"),
}


@pytest.mark.parametrize("case", CUTS)
@both_line_readers
def test_cut_in_a_line_and_in_a_character_it_resumes(client: str, case: str, main: Main) -> None:
    cut, reason = CUTS[case]
    with wrong_server(in_turn(cut, go_on)) as server:
        printed = main(client, server.url, STALL_TIMEOUT=2.0 if case == "stalled" else LIMIT)
        assert "last-event-id" not in server.connections[0].headers
        assert {c.headers["last-event-id"] for c in server.connections[1:]} == {"2"}
    assert (printed.status, printed.ids) == (0, ALL)
    warning, summary = printed.err
    assert warning == f"The stream broke off after event 2 ({reason}); resuming it."
    assert summary.startswith("10 events in ")


@both_line_readers
def test_try_again_later_is_tried_again(client: str, main: Main) -> None:
    """Of 408 and 425 RFC 9110 and 8470 say that they are temporary. A connection that stays open
    and silent, before any answer, is one more attempt; it is closed, not left to the server.
    """
    answers = in_turn(
        error("408 Request Timeout", headers=b"Retry-After: 1\r\n"),
        CHUNKED + chunk(BEGUN) + END,
        error("425 Too Early"),
        stall(b""),
        go_on,
    )
    with wrong_server(answers) as server:
        printed = main(client, server.url, FIRST_DELAY=0.01, STALL_TIMEOUT=2.0)
        seen = [connection.headers.get("last-event-id") for connection in server.connections]
        wait_for(lambda: server.connections[3].closed, "the server to see that it is closed")
    assert seen[:5] == [None, None, "2", "2", "2"]
    assert (printed.status, printed.ids) == (0, ALL)
    assert len(printed.err) == 3  # a warning each time that it broke off, not for each attempt


@both_line_readers
def test_damage_in_mid_stream(client: str) -> None:
    """Chunks that go bad after a whole event, while the program is busy with that event."""

    def answer(connection: Connection) -> None:
        connection.send(CHUNKED + chunk(event(connection.first)))
        if connection.first < 9:
            time.sleep(0.02)
            connection.send(b"zz\r\n")

    module = load(client, FIRST_DELAY=0.01, GIVE_UP_AFTER=5.0)
    with wrong_server(answer) as server:
        assert read(module, server.url, pause=0.1) == (ALL, None)


@pytest.mark.parametrize(
    ("answer", "status", "told"),
    [
        (error("410 Gone"), 1, "answered 410 Gone"),
        (b"HTTP/1.1 204 No Content\r\n\r\n", 0, "events in "),
    ],
    ids=["410", "204"],
)
@both_line_readers
def test_an_answer_that_ends_it(
    client: str, answer: bytes, status: int, told: str, main: Main
) -> None:
    """Instead of the stream, and after four of its events."""
    for count, begins in ((0, []), (4, [CHUNKED + chunk(events(0, 4)) + END])):
        with wrong_server(in_turn(*begins, answer)) as server:
            printed = main(client, server.url, FIRST_DELAY=0.01)
            assert len(server.connections) == 1 + len(begins)
        assert (printed.status, len(printed.out)) == (status, count)
        assert told in printed.err[-1]


@both_line_readers
def test_a_server_that_begins_anew(client: str) -> None:
    """It ignores Last-Event-ID; even so each event comes once."""

    def answer(connection: Connection) -> None:
        connection.send(CHUNKED + chunk(events(0, 4 * connection.number)[:-9]) + END)

    with wrong_server(answer) as server:
        assert read(load(client, FIRST_DELAY=0.01), server.url) == (ALL, None)
        assert len(server.connections) == 3


@both_line_readers
def test_redirects_are_followed_with_the_place_to_resume(client: str) -> None:
    def answer(connection: Connection) -> None:
        if connection.path == "/ndjson":
            connection.send(error("307 Temporary Redirect", headers=b"Location: /moved\r\n"))
        else:
            stop = 10 if connection.first else 4
            connection.send(CHUNKED + chunk(events(connection.first, stop)) + END)

    with wrong_server(answer) as server:
        assert read(load(client), server.url) == (ALL, None)
        seen = [(c.path, c.headers.get("last-event-id")) for c in server.connections]
    assert seen == [("/ndjson", None), ("/moved", None), ("/ndjson", "3"), ("/moved", "3")]


def endless(head: bytes, more: bytes) -> Answer:
    def answer(connection: Connection) -> None:
        connection.send(head)
        while True:
            connection.send(more)
            time.sleep(0.01)

    return answer


ENDLESS = {
    "silence": stall(b""),
    "silence after an interim answer": stall(b"HTTP/1.1 100 Continue\r\n\r\n"),
    "a line that never ends": endless(CLOSED + b'{"event_id": 0, "data": "', b"x"),
    "many blank lines": endless(CLOSED, b"\n" * 1000),
    "an event that is not new": endless(CLOSED + event(0), event(0)),
}


@pytest.mark.parametrize("case", ENDLESS)
@both_line_readers
def test_without_a_new_event_it_gives_up(client: str, case: str) -> None:
    module = load(client, GIVE_UP_AFTER=0.6, STALL_TIMEOUT=0.3, CONNECT_TIMEOUT=0.3)
    with wrong_server(ENDLESS[case]) as server:
        ids, sentence = read(module, server.url)
    assert ids in ([], [0])
    assert sentence
    assert re.match("Gave up .* sent no new event for 1 seconds, most recently because ", sentence)


@both_line_readers
@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_no_answer_is_a_traceback(client: str, data: st.DataObject) -> None:
    """Whatever bytes come, the events are the first ones in order, or one sentence says why.

    One of the bytes is in no event: what is damaged must not be the last event by chance.
    """
    whole = data.draw(st.sampled_from([WHOLE, CHUNKED + chunk(event(0)) + chunk(events(1, 10))]))
    start = data.draw(st.integers(0, len(whole)))
    stop = data.draw(st.integers(start, min(start + 20, len(whole))))
    answer = whole[:start] + data.draw(st.binary(max_size=20)) + b"\xff" + whole[stop:]
    module = load(
        client, FIRST_DELAY=0.01, STALL_TIMEOUT=0.1, GIVE_UP_AFTER=0.1, CONNECT_TIMEOUT=0.1
    )
    with wrong_server(answer) as server:
        ids, sentence = read(module, server.url)
    assert ids == ALL[: len(ids)]
    assert ids == ALL or sentence
    assert "\n" not in (sentence or "")
