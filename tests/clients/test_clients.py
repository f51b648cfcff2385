"""The three clients: what a person sees of them, and what a program that uses them gets."""

import ast
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import zlib
from datetime import datetime
from pathlib import Path

import pytest

from tests.clients.conftest import Main
from tests.support.processes import (
    LIMIT,
    ROOT,
    Process,
    RunningClient,
    free_port,
    run_client,
    wait_for,
)
from tests.support.wrong_servers import (
    ALL,
    CHUNKED,
    CLOSED,
    END,
    LINE_READERS,
    STREAM,
    WHOLE,
    Connection,
    all_clients,
    both_line_readers,
    chunk,
    error,
    event,
    for_each,
    load,
    stall,
    wrong_server,
)

TIME = r"\d\d:\d\d:\d\d\.\d{3}"


def path_of(client: str) -> str:
    return "/text" if client == "client" else "/ndjson"


def first_two(client: str) -> list[bytes]:
    """Two pieces of a stream, an A and a B; each is one arrival for this client."""
    return [b"A\n", b"B\n"] if client == "client" else [event(0, 2, "A"), event(1, 2, "B")]


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
        # The cut through a cup is shown, and the cup is put together again: see the README's test.
        texts = [ast.literal_eval(line[31:]) for line in shown]
        assert "".join(texts) == "".join(f"Step {i + 1} of 10: ☕\n" for i in range(10))
    else:
        assert [json.loads(line)["event_id"] for line in shown] == ALL
        assert "☕" in shown[0]
    what = "pieces" if client == "client" else "events"
    summary = rf"{len(shown)} {what} in \d+\.\d\d s, the first after \d+\.\d\d s\.\n"
    assert re.fullmatch(summary, copy.stderr)


@pytest.mark.parametrize("framing", ["chunked", "gzip", "length", "closed"])
@all_clients
def test_live(client: str, framing: str) -> None:
    """An arrival is shown before the next one is sent, however the body is framed."""
    shown = threading.Semaphore(0)
    pieces = first_two(client)
    # It compresses as a server does that keeps its stream live: each piece can be read at once.
    gzip = zlib.compressobj(wbits=31)
    head, frame, end = {
        "chunked": (CHUNKED, chunk, END),
        "gzip": (
            STREAM + b"Content-Encoding: gzip\r\nTransfer-Encoding: chunked\r\n\r\n",
            lambda piece: chunk(gzip.compress(piece) + gzip.flush(zlib.Z_SYNC_FLUSH)),
            END,
        ),
        "length": (STREAM + b"Content-Length: %d\r\n\r\n" % sum(map(len, pieces)), bytes, b""),
        "closed": (CLOSED, bytes, b""),
    }[framing]
    sent = 0

    def answer(connection: Connection) -> None:
        nonlocal sent
        connection.send(head)
        for piece in pieces:
            sent += 1
            connection.send(frame(piece))
            shown.acquire(timeout=LIMIT)
        connection.send(end)

    sent_when_shown = []

    def note(_: str) -> None:
        sent_when_shown.append(sent)
        shown.release()

    module = load(client)
    show = module.show_chunks if client == "client" else module.show_events
    with wrong_server(answer) as server:
        show(server.url, note)
    assert sent_when_shown == [1, 2]


# When each of the two pieces is sent, in seconds, and whether something held the stream back.
@pytest.mark.parametrize(
    ("times", "held"), [((1.2, 0), True), ((0, 1.2), False), ((0.2, 0), False)]
)
def test_says_when_something_held_the_stream_back(
    times: tuple[float, float], held: bool, main: Main
) -> None:
    def answer(connection: Connection) -> None:
        connection.send(CHUNKED)
        for seconds, piece in zip(times, first_two("client"), strict=True):
            time.sleep(seconds)
            connection.send(chunk(piece))
        connection.send(END)

    with wrong_server(answer) as server:
        printed = main("client", server.url)
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
def test_ctrl_c(client: str, tmp_path: Path) -> None:
    """While it waits for the next event, and while it waits to resume the stream."""
    with wrong_server(stall(CHUNKED + chunk(first_two(client)[0]))) as server:
        before = datetime.now().time().isoformat("milliseconds")
        running = RunningClient(tmp_path, client, server.url)
        (line,) = running.wait_for_lines(1)
        after = datetime.now().time().isoformat("milliseconds")
        assert before <= line[:12] <= after or after < before  # at midnight
        running.popen.send_signal(signal.SIGINT)
        assert running.wait() == 130
        wait_for(lambda: server.connections[0].closed, "the server to see that the client is gone")
    (summary,) = running.errors
    assert re.fullmatch(r"1 (events|pieces) in .* s\.", summary)
    if client != "client":
        with wrong_server(error("503 Service Unavailable")) as server:
            running = RunningClient(tmp_path, client, server.url)
            wait_for(lambda: len(server.connections) > 2, "some attempts")
            running.popen.send_signal(signal.SIGINT)
            assert running.wait() == 130
        warning, summary = running.errors
        assert "resuming it" in warning
        assert re.fullmatch(r"0 events in .* s\.", summary)


@pytest.mark.parametrize(
    ("client", "output", "reason"),
    [
        ("client", ">/dev/full", "No space left on device"),
        ("client_sync", "| head -2", "Broken pipe"),
        ("client_async", "| head -2", "Broken pipe"),
    ],
)
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
def test_help(client: str, main: Main) -> None:
    shown = main(client, "--help")
    assert shown.status == 0
    text = "\n".join(shown.out)
    assert "Exit status: 0 the stream is complete, 1 it is not (one line" in text
    assert f"http://localhost:8000{path_of(client)}" in text


def test_a_terminal_that_is_not_utf8(shared_server: Process) -> None:
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    read = run_client("client.py", f"{shared_server.url}/text?interval=0", env=environment)
    assert read.returncode == 0, read.stderr
    assert r"\u2615" in read.stdout


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
        # All warnings, as of what was not closed. (`-X dev` also tells when a machine is busy.)
        command = [sys.executable, "-W", "default", *arguments]
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


@both_line_readers
def test_an_error_of_the_program_goes_through_and_closes_the_connection(client: str) -> None:
    """Only what the network does becomes a StreamError."""

    def fail(_: object) -> None:
        raise ConnectionResetError("of the program's own")

    with wrong_server(stall(WHOLE.removesuffix(END))) as server:
        with pytest.raises(ConnectionResetError, match="program's own"):
            for_each(load(client), server.url, fail)
        wait_for(lambda: server.connections[0].closed, "the server to see that the reader is gone")
