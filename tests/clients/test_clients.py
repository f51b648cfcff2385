"""The three clients: what a person sees of them, and what a program that uses them gets."""

import ast
import asyncio
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import aclosing
from datetime import datetime
from itertools import pairwise
from pathlib import Path
from typing import assert_type

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import client_async
import client_sync
from tests.clients.conftest import Main, Run
from tests.support.processes import (
    LIMIT,
    ROOT,
    Process,
    free_port,
    run_client,
    wait_for,
)
from tests.support.wrong_servers import (
    ALL,
    CHUNKED,
    CLOSED,
    END,
    GZIPPED,
    LINE_READERS,
    STREAM,
    WHOLE,
    Answer,
    Connection,
    Gzip,
    all_clients,
    both_line_readers,
    chunk,
    error,
    event,
    events,
    load,
    read,
    read_all,
    wrong_server,
)

TIME = r"\d\d:\d\d:\d\d\.\d{3}"


def path_of(client: str) -> str:
    return "/text" if client == "client" else "/ndjson"


def first_two(client: str) -> list[bytes]:
    """Two pieces of a stream, an A and a B; each is one arrival for this client."""
    return [b"A\n", b"B\n"] if client == "client" else [event(0, 2, "A"), event(1, 2, "B")]


def in_turn(*answers: bytes) -> Answer:
    """The first connection gets the first answer, the last one and all later ones the last."""
    return lambda connection: connection.send(answers[min(connection.number, len(answers)) - 1])


def go_on(connection: Connection) -> None:
    """Send the events that the client has not had."""
    connection.send(CHUNKED + chunk(events(connection.first, 10)) + END)


def stall(head: bytes) -> Answer:
    """An answer that begins so, and then stays open and silent."""

    def answer(connection: Connection) -> None:
        connection.send(head)
        connection.wait_until_closed()

    return answer


# Giving up: the longest test begins first --------------------------------------------------------


def test_thirty_seconds_without_an_event_end_it(run: Run) -> None:
    """The scripts as they are: they wait longer each time, and try for the last time at the end."""
    answer = in_turn(CHUNKED + chunk(events(0, 4)) + END, error("503 Service Unavailable"))
    with wrong_server(answer) as one, wrong_server(answer) as other:
        servers = [one, other]
        clients = [run(c, server.url) for c, server in zip(LINE_READERS, servers, strict=True)]
        assert [client.wait() for client in clients] == [1, 1]
    for server, client in zip(servers, clients, strict=True):
        attempts = [c.time - server.connections[0].time for c in server.connections]
        waits = [later - earlier for earlier, later in pairwise(attempts)]
        *growing, _ = waits  # the last one is cut short by the end
        # Each wait is half as long again as the one before; compared with the one before that, a
        # busy machine cannot blur it.
        assert all(wait > waits[i] for i, wait in enumerate(growing[2:])), waits
        assert len(attempts) > 8
        assert 29.5 < attempts[-1] < 29.5 + 10
        warning, sentence = client.errors
        assert warning.startswith("The stream broke off after event 3 (")
        assert sentence == (
            f"Gave up after event 3: {server.url} sent no new event for 30 seconds, most "
            "recently because the server answered 503 Service Unavailable. "
            "Check the server, then try again."
        )


# What a person sees -------------------------------------------------------------------------------


@all_clients
def test_copied_away_prints_each_arrival_and_sums_up(
    client: str, shared_server: Process, tmp_path: Path
) -> None:
    for file in {f"{client}.py", "client.py"}:
        shutil.copy(ROOT / file, tmp_path)
    url = f"{shared_server.url}{path_of(client)}?interval=0.01"
    command = [sys.executable, f"{client}.py", url]
    copy = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=LIMIT)
    assert copy.returncode == 0, copy.stderr
    arrivals = [re.fullmatch(rf"{TIME}  (.*)", line) for line in copy.stdout.splitlines()]
    assert all(arrivals), copy.stdout
    shown = [arrival[1] for arrival in arrivals if arrival]
    if client == "client":
        parts = [re.fullmatch(r"(b'.*'|b\".*\") +('.*'|\".*\")", line) for line in shown]
        pieces, texts = zip(*((ast.literal_eval(p[1]), p[2]) for p in parts if p), strict=True)
        expected = "".join(f"Step {i + 1} of 10: ☕\n" for i in range(10))
        assert b"".join(pieces).decode() == expected
        assert "".join(map(ast.literal_eval, texts)) == expected
        assert max(map(len, pieces)) == 16
        # The cut through the first cup is shown, and the cup is put together again.
        assert (pieces[0], texts[0]) == (b"Step 1 of 10: \xe2\x98", "'Step 1 of 10: '")
        assert texts[1] == r"'☕\n'"
        assert "\ufffd" not in copy.stdout
    else:
        assert [json.loads(line)["event_id"] for line in shown] == ALL
        assert "☕" in shown[0]
    what = "pieces" if client == "client" else "events"
    summary = rf"{len(shown)} {what} in \d+\.\d\d s, the first after \d+\.\d\d s\.\n"
    assert re.fullmatch(summary, copy.stderr)


@pytest.mark.parametrize("framing", ["chunked", "gzip", "length", "closed"])
@all_clients
def test_live(client: str, framing: str, run: Run) -> None:
    """An arrival is printed before the next one is sent, however the body is framed."""
    send_next = threading.Semaphore(0)
    pieces = first_two(client)
    gzip = Gzip()
    head, frame, end = {
        "chunked": (CHUNKED, chunk, END),
        "gzip": (GZIPPED, lambda piece: chunk(gzip(piece)), END),
        "length": (STREAM + b"Content-Length: %d\r\n\r\n" % sum(map(len, pieces)), bytes, b""),
        "closed": (CLOSED, bytes, b""),
    }[framing]

    def answer(connection: Connection) -> None:
        connection.send(head)
        for piece in pieces:
            send_next.acquire(timeout=LIMIT)
            connection.send(frame(piece))
        connection.send(end)

    with wrong_server(answer) as server:
        running = run(client, server.url)
        for count, letter in enumerate("AB", 1):
            sent = datetime.now().time().isoformat("milliseconds")
            send_next.release()
            lines = running.wait_for_lines(count)
            seen = datetime.now().time().isoformat("milliseconds")
            assert letter in lines[-1]
            if sent < seen:  # not so at midnight
                assert sent <= lines[-1][:12] <= seen
        assert running.wait() == 0


# When each of the two pieces is sent, in seconds, and whether something held the stream back.
@pytest.mark.parametrize(
    ("times", "held"), [((1.2, 0), True), ((0, 1.2), False), ((0.2, 0), False)]
)
@all_clients
def test_says_when_something_held_the_stream_back(
    client: str, times: tuple[float, float], held: bool, main: Main
) -> None:
    def answer(connection: Connection) -> None:
        connection.send(CHUNKED)
        for seconds, piece in zip(times, first_two(client), strict=True):
            time.sleep(seconds)
            connection.send(chunk(piece))
        connection.send(END)

    with wrong_server(answer) as server:
        printed = main(client, server.url)
    assert printed.status == 0
    assert ("something on the way held the stream back" in printed.err[-1]) == held


@pytest.mark.parametrize(
    "url",
    [
        "",
        "localhost:8000",
        "ftp://localhost/",
        "http://",
        "http://localhost:99999/",
        "http://localhost:no/",
        "http://[::1/",
        "http://.example.com/",
        f"http://{'a' * 70}.com/",
        "http://\udcff/",
        "http://no-such-host.invalid/",
        "http://127.0.0.1:{port}/",
    ],
)
@all_clients
def test_a_wrong_address_is_told_at_once(client: str, url: str, main: Main) -> None:
    url = url.replace("{port}", str(free_port()))
    printed = main(client, url, FIRST_DELAY=LIMIT) if client != "client" else main(client, url)
    assert (printed.status, printed.out) == (1, [])
    (sentence,) = printed.err
    assert re.fullmatch(r"Cannot (read|connect to) .*\. (Expected|Start) .+\.", sentence)
    assert url in sentence.encode("utf-8", "surrogateescape").decode() or "\udcff" in url
    if "127.0.0.1" in url:
        assert re.search(
            r": (nobody listens there|Connection refused)\. Start the server with `uvicorn "
            r"main:app`, or check the address\.$",
            sentence,
        )


@all_clients
def test_a_server_that_does_not_understand(client: str, main: Main, shared_server: Process) -> None:
    """TLS to a plain port; and bad parameters, which are told with the server's words."""
    printed = main(client, shared_server.url.replace("http", "https"))
    assert (printed.status, len(printed.err)) == (1, 1)
    assert re.search("TLS|SSL", printed.err[0])
    printed = main(client, f"{shared_server.url}{path_of(client)}?steps=0")
    assert (printed.status, printed.out, len(printed.err)) == (1, [], 1)
    assert "422 Unprocessable" in printed.err[0]
    assert "greater than or equal to 1" in printed.err[0]


@all_clients
def test_ctrl_c(client: str, run: Run) -> None:
    """While it waits for the next event, and while it waits to resume the stream."""
    with wrong_server(stall(CHUNKED + chunk(first_two(client)[0]))) as server:
        running = run(client, server.url)
        running.wait_for_lines(1)
        running.popen.send_signal(signal.SIGINT)
        assert running.wait() == 130
        wait_for(lambda: server.connections[0].closed, "the server to see that the client is gone")
    (summary,) = running.errors
    assert re.fullmatch(r"1 (events|pieces) in .* s\.", summary)
    if client != "client":
        with wrong_server(error("503 Service Unavailable")) as server:
            running = run(client, server.url)
            wait_for(lambda: len(server.connections) > 3, "some attempts")
            running.popen.send_signal(signal.SIGINT)
            assert running.wait() == 130
        warning, summary = running.errors
        assert "resuming it" in warning
        assert re.fullmatch(r"0 events in .* s\.", summary)


@pytest.mark.parametrize(
    ("output", "reason"), [("| head -2", "Broken pipe"), (">/dev/full", "No space left on device")]
)
@all_clients
def test_nobody_takes_the_output(
    client: str, output: str, reason: str, shared_server: Process
) -> None:
    url = f"{shared_server.url}{path_of(client)}?interval=0.01"
    command = f"{sys.executable} {ROOT}/{client}.py '{url}' {output}; exit ${{PIPESTATUS[0]}}"
    process = subprocess.run(
        ["bash", "-c", command], capture_output=True, text=True, timeout=LIMIT, check=False
    )
    assert process.returncode == 1
    assert len(process.stdout.splitlines()) == (2 if "head" in output else 0)
    assert process.stderr == f"Cannot write to standard output: {reason}.\n"


@all_clients
def test_help_and_a_terminal_that_is_not_utf8(client: str, shared_server: Process) -> None:
    shown = run_client(f"{client}.py", "--help")
    assert shown.returncode == 0
    assert "Exit status: 0 the stream is complete, 1 it is not (one line" in shown.stdout
    assert f"http://localhost:8000{path_of(client)}" in shown.stdout
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    url = f"{shared_server.url}{path_of(client)}?interval=0"
    read = run_client(f"{client}.py", url, env=environment)
    assert read.returncode == 0, read.stderr
    assert r"\u2615" in read.stdout


# What goes wrong, and is told at once -------------------------------------------------------------


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
    "304": (b"HTTP/1.1 304 Not Modified\r\n\r\n", "answered 304 Not Modified"),
    "301 to nowhere": (error("301 Moved Permanently"), "answered 301 Moved Permanently"),
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
        (b"SSH-2.0-OpenSSH_9.2\r\n", "SSH-2.0-OpenSSH"),
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


@pytest.mark.parametrize(
    "line",
    [
        b"<html>\n",
        b"<html>",  # ... whose last line has no end
        b'{"message": "hello"}\n',
        b'{"message": "hello"}',
        b"[]\n",
        b"[" * 100_000 + b"\n",
        b'{"event_id": NaN, "data": "", "is_last_event": false}\n',
        b'{"event_id": true, "data": "", "is_last_event": false}\n',
        b'{"event_id": 1e999, "data": "", "is_last_event": false}\n',
        b'{"event_id": %s, "data": "", "is_last_event": false}\n' % (b"1" * 5000),
        b'{"event_id": 0, "data": "\xff", "is_last_event": false}\n',
        b"\0\n",
        event(2),
    ],
    ids=lambda line: repr(line[:40]),
)
@both_line_readers
def test_a_line_that_is_not_the_next_event_is_told_at_once(
    client: str, line: bytes, main: Main
) -> None:
    with wrong_server(CHUNKED + chunk(event(0) + line) + END) as server:
        printed = main(client, server.url)
        assert len(server.connections) == 1
    assert (printed.status, printed.ids, len(printed.err)) == (1, [0], 1)
    wrong = "a line that is not an event: b"
    if line == event(2):
        wrong = "event 2 where event 1 was expected: events are lost"
    assert f"{server.url} sent {wrong}" in printed.err[0]


# What goes wrong, and is tried again --------------------------------------------------------------

# What the clients are sent at each attempt, and what is said of it.
DAMAGED: dict[str, tuple[Answer | bytes, str]] = {
    "server error": (error("500 Internal Server Error"), "the server answered 500 Internal Server"),
    "server error without a reason": (error("500 "), "the server answered 500"),
    "too many requests": (error("429 Too Many Requests"), "the server answered 429 Too Many"),
    "no HTTP": (b"SSH-2.0-OpenSSH_9.2\r\n", "SSH-2.0-OpenSSH"),
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
    "no line": (CHUNKED + END, "the server ended it early"),
}


@pytest.mark.parametrize("case", DAMAGED)
@both_line_readers
def test_a_damaged_answer_is_tried_again_until_it_gives_up(
    client: str, case: str, main: Main
) -> None:
    answer, reason = DAMAGED[case]
    with wrong_server(answer) as server:
        printed = main(client, server.url, FIRST_DELAY=0.02, GIVE_UP_AFTER=0.4)
        assert len(server.connections) > 1
    assert (printed.status, printed.out) == (1, [])
    warning, sentence = printed.err
    assert warning.startswith("The stream broke off at the start (")
    start = f"Gave up at the start: {re.escape(server.url)} sent no new event for 0 seconds, "
    assert re.match(rf"{start}most recently because .*({reason})", sentence)


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


CUTS: dict[str, Callable[[bytes, bytes], bytes]] = {
    # Each sends whole events and then half of the next one, as far as into the middle of its ☕.
    "chunked, between chunks": lambda whole, half: CHUNKED + chunk(whole) + chunk(half),
    "chunked, in a chunk": lambda whole, half: CHUNKED + b"999\r\n" + whole + half,
    "length": lambda whole, half: STREAM + b"Content-Length: 2457\r\n\r\n" + whole + half,
    "closed": lambda whole, half: CLOSED + whole + half,
    "a proper end": lambda whole, half: CHUNKED + chunk(whole) + chunk(half) + END,
}


@pytest.mark.parametrize("cut", CUTS)
@both_line_readers
def test_cut_in_a_line_and_in_a_character_it_resumes(client: str, cut: str, main: Main) -> None:
    half = event(3).split(b"\x98")[0]
    assert half.endswith(b"\xe2")

    def answer(connection: Connection) -> None:
        if connection.number > 1:
            go_on(connection)
        else:
            connection.send(CUTS[cut](events(0, 3), half))

    with wrong_server(answer) as server:
        printed = main(client, server.url)
        assert "last-event-id" not in server.connections[0].headers
        assert [c.headers["last-event-id"] for c in server.connections[1:]] == ["2"]
    assert (printed.status, printed.ids) == (0, ALL)
    warning, summary = printed.err
    assert warning.startswith("The stream broke off after event 2 (")
    assert summary.startswith("10 events in ")


@pytest.mark.parametrize("status", [408, 425, 503])
@both_line_readers
def test_try_again_later_is_tried_again(client: str, status: int, main: Main) -> None:
    """Of 408 and 425 RFC 9110 and 8470 say that they are temporary. (429 and 500 are above.)"""
    later = error(f"{status} Later", headers=b"Retry-After: 1\r\n")

    def answer(connection: Connection) -> None:
        if connection.number in (1, 3, 4):
            connection.send(later)
        elif connection.number == 2:
            connection.send(CHUNKED + chunk(events(0, 4)) + END)
        else:
            go_on(connection)

    with wrong_server(answer) as server:
        printed = main(client, server.url, FIRST_DELAY=0.01)
        seen = [connection.headers.get("last-event-id") for connection in server.connections]
    assert seen == [None, None, "3", "3", "3"]
    assert (printed.status, printed.ids) == (0, ALL)
    assert len(printed.err) == 3  # a warning each time that it broke off, not for each attempt


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


@pytest.mark.parametrize("size", [100, 65_536, 10_000_000])
@both_line_readers
def test_a_long_line_is_read_whole(client: str, size: int) -> None:
    """A line of 1 MB, in pieces of this size."""
    data = "☕" * 350_000
    line = event(0, 1, data)

    def answer(connection: Connection) -> None:
        pieces = [chunk(line[i : i + size]) for i in range(0, len(line), size)]
        connection.send(CHUNKED + b"".join(pieces))

    with wrong_server(answer) as server:
        found = read_all(load(client), server.url)
    assert found == ([{"event_id": 0, "data": data, "is_last_event": True}], None)


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


@both_line_readers
@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_no_answer_is_a_traceback(client: str, data: st.DataObject) -> None:
    """Whatever bytes come, the events are the first ones in order, or one sentence says why."""
    whole = data.draw(st.sampled_from([WHOLE, CHUNKED + chunk(event(0)) + chunk(events(1, 10))]))
    start = data.draw(st.integers(0, len(whole)))
    stop = data.draw(st.integers(start, min(start + 20, len(whole))))
    answer = whole[:start] + data.draw(st.binary(max_size=20)) + whole[stop:]
    module = load(
        client, FIRST_DELAY=0.01, STALL_TIMEOUT=0.1, GIVE_UP_AFTER=0.1, CONNECT_TIMEOUT=0.1
    )
    with wrong_server(answer) as server:
        ids, sentence = read(module, server.url)
    assert ids == ALL[: len(ids)]
    assert ids == ALL or sentence
    assert "\n" not in (sentence or "")


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


# From another program -----------------------------------------------------------------------------

READ_ALL = {
    "client_sync": "print([event['event_id'] for event in read_events({url!r})])",
    "client_async": """
import asyncio
async def main():
    print([event['event_id'] async for event in read_events({url!r})])
asyncio.run(main())""",
}


@both_line_readers
def test_copied_away_alone_read_events_works_and_the_script_says_what_it_lacks(
    client: str, shared_server: Process, tmp_path: Path
) -> None:
    def python(*arguments: str) -> tuple[int, str, str]:
        command = [sys.executable, "-X", "dev", *arguments]
        done = subprocess.run(
            command, cwd=tmp_path, capture_output=True, text=True, timeout=LIMIT * 3
        )
        return done.returncode, done.stdout, done.stderr

    shutil.copy(ROOT / f"{client}.py", tmp_path)
    url = f"{shared_server.url}/ndjson?interval=0"
    program = f"from {client} import read_events\n{READ_ALL[client].format(url=url)}\n"
    program += "import logging; print(logging.root.handlers)"  # an import changes nothing
    assert python("-c", program) == (0, f"{ALL}\n[]\n", "")
    assert python(f"{client}.py", url) == (
        1,
        "",
        "Printing needs client.py in this folder too (No module named 'client'); "
        "read_events does not.\n",
    )


def test_what_the_line_readers_share_is_the_same_to_the_letter() -> None:
    def shared(client: str, other: str) -> str:
        heading = f"# From here to `new_event`, this file and {other}.py are identical"
        rest = (ROOT / f"{client}.py").read_text().split(heading)[1]
        return rest[: rest.index("\ndef show_events")]

    assert "class Resume" in shared(*LINE_READERS)
    assert "def new_event" in shared(*LINE_READERS)
    assert shared(*LINE_READERS) == shared(*LINE_READERS[::-1])


def first_sync(url: str) -> client_sync.Event:
    """Leave the loop after the first event. (What types there are, `mypy .` checks.)"""
    for item in client_sync.read_events(url):
        assert_type(item["event_id"], int)
        return item
    raise AssertionError


async def first_async(url: str) -> client_async.Event:
    async with aclosing(client_async.read_events(url)) as stream:
        async for item in stream:
            assert_type(item["data"], str)
            return item
    raise AssertionError


@both_line_readers
def test_leaving_the_loop_closes_the_connection(client: str) -> None:
    with wrong_server(stall(CHUNKED + chunk(events(0, 3)))) as server:
        if client == "client_sync":
            item = dict(first_sync(server.url))
        else:
            item = dict(asyncio.run(first_async(server.url)))
        assert item["event_id"] == 0
        wait_for(lambda: server.connections[0].closed, "the server to see that the reader is gone")
