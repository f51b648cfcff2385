"""recipes/relay.py before upstreams that do what real servers do, and what they should not."""

import gzip
import json
import re
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import brotli
import httpx
import openai
import psutil
import pytest

from recipes.common import upstream as upstream_settings
from tests.support.processes import (
    ENVIRONMENT,
    LIMIT,
    ROOT,
    Process,
    Start,
    free_port,
    starting,
    wait_for,
)
from tests.support.raw_reader import wait_until_idle
from tests.support.tokens import asked, client_of, post, raw_post, read, serve
from tests.support.upstreams import (
    BEGINNING,
    Handler,
    Upstream,
    chunk,
    events,
    hang,
    hang_after,
    head,
    http,
    whole,
)

# They share servers, and so are run by one worker.
pytestmark = pytest.mark.xdist_group("relay")

END = chunk({}, "stop")
COMPLETE = events(*BEGINNING, END, "[DONE]")
USAGE = {"prompt_tokens": 1, "completion_tokens": 2, "total_tokens": 3}
TOOL = {"index": 0, "id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}

# Complete streams.
STREAMS: dict[str, bytes] = {
    "ordinary": COMPLETE,
    "comments (OpenRouter)": b": OPENROUTER PROCESSING\n\n" + COMPLETE,
    "CRLF": COMPLETE.replace(b"\n", b"\r\n"),
    "CR": COMPLETE.replace(b"\n", b"\r"),
    "a byte order mark": b"\xef\xbb\xbf" + COMPLETE,
    "no space after the colon (TGI), other fields": COMPLETE.replace(
        b"data: ", b"event: x\nid: 1\nx: y\ndata:"
    ),
    "an event over two lines": COMPLETE.replace(b', "object"', b'\ndata: , "object"'),
    "no [DONE]": events(*BEGINNING, END),
    "no finish_reason": events(*BEGINNING, "[DONE]"),
    "no choices": events(
        json.dumps({"choices": [], "x": []}),  # Azure
        json.dumps({"choices": None, "usage": USAGE}),
        json.dumps({"usage": USAGE}),
        *(*BEGINNING, END),
    ),
    "an emoji in two halves": events(
        chunk({"content": "\ud83d"}), chunk({"content": "\ude80"}, "stop")
    ),
    "UTF-8, and U+2028": b'data: {"own": "\xe2\x98\x95\xe2\x80\xa8"}\n\n' + COMPLETE,
    "half a character": b'data: {"own": "\xf0\x9f"}\n\n' + COMPLETE,
    "tool calls, and fields of its own": events(
        chunk({"tool_calls": [TOOL], "own": "☕"}, "tool_calls", x=float("nan")), "[DONE]"
    ),
    "a large event": events(chunk({"content": "x" * 3_000_000}, "stop"), "[DONE]"),
    "many lines": b"data: {\n" + b"data: \n" * 800_000 + b"data: }\n\n" + COMPLETE,
}
# Ways in which the body of a complete stream comes.
WAYS: dict[str, bytes | Handler] = {
    "way: as another media type": http(COMPLETE, media_type="text/plain; charset=utf-8"),
    "way: gzip": http(gzip.compress(COMPLETE), headers="Content-Encoding: gzip\r\n"),
    "way: br": http(brotli.compress(COMPLETE), headers="Content-Encoding: br\r\n"),
    "way: broken after its last chunk": http(events(*BEGINNING, END), length=9999),
    "way: stalled after its end": hang_after(http(COMPLETE, length=len(COMPLETE) + 9)),
    "way: no last blank line": head() + events(*BEGINNING) + b"data: " + END.encode(),
}


def byte_by_byte(connection: Any) -> None:
    for byte in head() + COMPLETE.replace(b"\n", b"\r\n"):
        connection.sendall(bytes([byte]))


WAYS["way: byte by byte"] = byte_by_byte

# Streams of which something is missing, or that are none, after their beginning.
INCOMPLETE: dict[str, bytes | Handler] = {
    "ends early": head() + events(*BEGINNING),
    "breaks off": http(events(*BEGINNING) + b'data: {"cho', length=9999),
    "stalls": hang_after(head() + events(*BEGINNING) + b'data: {"cho'),
    "half of JSON": head() + events(*BEGINNING, '{"choices": '),
    "null": head() + events(*BEGINNING, "null"),
    "choices of another shape": head() + events(*BEGINNING, '{"choices": 5}'),
    "too large an event": head() + events(*BEGINNING) + b"data: " + b"x" * 7_000_000,
}
# Answers that are none, whether a stream was asked for or not.
NOTHING: dict[str, bytes | Handler] = {
    "nothing": http(b"", media_type="text/event-stream"),
    "no response": lambda connection: None,
    "never answers": hang,
    "HTML": http(b"<h1>Welcome</h1>\n\n<p>data: x</p>", media_type="text/html"),
    "a redirection": http(b"", "307 Moved", headers="Location: http://localhost/\r\n"),
    "an unknown encoding": http(b"\xff\x00", headers="Content-Encoding: gzip\r\n"),
    "a body without a reason": http(whole("One two", None)),
    "a body that breaks off": http(whole("One two"), length=9999),
    "a body that stalls": hang_after(http(whole("One two")[:40], length=9999)),
    "a body that is a stream of its own": http(b'{"response": "x"}\n{"response": "y"}\n'),
}

# What an upstream says of its failure, in several shapes.
WHY = "the prompt has 13055 tokens, the context 4096"
ERROR = json.dumps({"error": {"message": WHY, "type": "a", "own": [1.50]}}).encode()
A_LIST = json.dumps([{"error": {"message": WHY}}]).encode()  # Gemini
FAILURES: dict[str, bytes] = {
    "moderation (OpenRouter)": http(ERROR, "403 X"),
    "plain text": http(f"{WHY} é".encode("latin-1"), "413 X", media_type="text/plain"),
    "an event": http(b"data: " + ERROR + b"\n\n", "500 X"),
    "what JSON and UTF-8 cannot hold": http(
        json.dumps({"error": {"message": WHY + "\ud800", "x": 1e999}}).encode(), "429 X"
    ),
}
IN_A_200 = {"early: an error (OpenRouter)": http(ERROR), "early: plain text": http(WHY.encode())}
IN_MID_STREAM = {
    "an error": b"data: " + ERROR + b"\n\n",
    "a list": b"data: " + A_LIST + b"\n\n",
    "in a chunk (OpenRouter)": events(chunk({}, "error", error={"code": 502, "message": WHY})),
    "as another field (llama.cpp)": b'error: {"message": "%s"}\n\n' % WHY.encode(),
    "plain text": WHY.encode(),
}
ANSWERS: dict[str, bytes | Handler] = {
    **{f"stream: {name}": http(body) for name, body in STREAMS.items()},
    **{f"mid: {name}": head() + events(*BEGINNING) + said for name, said in IN_MID_STREAM.items()},
    **{f"fails: {name}": answer for name, answer in FAILURES.items()},
    **WAYS,
    **INCOMPLETE,
    **NOTHING,
    **IN_A_200,
    "complete": http(whole("One two", own=[None, 1])),
}


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Start]:
    with starting(tmp_path_factory.mktemp("relay")) as start:
        yield start


@pytest.fixture(scope="module")
def upstream() -> Iterator[Upstream]:
    with Upstream(ANSWERS) as upstream:
        yield upstream


@pytest.fixture(scope="module")
def relay(start: Start, upstream: Upstream) -> Process:
    """Its patience is short, so that a test sees its end."""
    return serve(start, "relay", upstream.url, relay__client__timeout=2, relay__MAX_PART=6_000_000)


@pytest.fixture(scope="module")
def lively(start: Start, upstream: Upstream) -> Process:
    return serve(start, "relay", upstream.url, relay__SILENCE=0.2)


# What passes --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", STREAMS)
def test_a_complete_stream_passes_as_it_came(relay: Process, name: str) -> None:
    before = psutil.Process(relay.pid).cpu_times().user
    response = post(relay, asked(model=f"stream: {name}", stream=True))
    assert response.status_code == 200
    assert response.headers["Content-Type"] == "text/event-stream"
    assert response.headers["X-Accel-Buffering"] == "no"
    assert response.content == STREAMS[name]
    assert psutil.Process(relay.pid).cpu_times().user < before + 6  # it held up nobody else


@pytest.mark.parametrize("name", WAYS)
def test_a_complete_stream_passes_however_it_comes(lively: Process, name: str) -> None:
    assert read(lively, model=name, stream=True) == ("One two", None)


def test_an_answer_ends_with_done(lively: Process) -> None:
    """Some upstreams keep the connection open."""
    answer = post(lively, asked(model="way: stalled after its end", stream=True))
    assert answer.content == COMPLETE


def test_a_complete_body_passes_as_it_came(relay: Process) -> None:
    response = post(relay, asked(model="complete"))
    assert response.content == whole("One two", own=[None, 1])
    assert response.headers["Content-Type"] == "application/json"
    assert read(relay, model="complete") == ("One two", None)


QUESTIONS = [
    json.dumps({**asked(model="complete"), "max_tokens": -1, "n": 10**9}, indent=1).encode(),
    json.dumps({"model": "complete", "own": {"é": [1.5, None], "stream": True}}).encode(),
    *(b"", b"{", b"[]", b"\xff", b'"\\ud800"', b"NaN"),
]


def test_any_question_passes_as_it_came(relay: Process, upstream: Upstream) -> None:
    refusal = upstream.answers[""] = http(b'{"error": {"message": "What?"}}', "400 Bad Request")
    for question in QUESTIONS:
        response = post(relay, question)
        assert upstream.asked[-1][1] == question
        if response.status_code != 200:
            assert b"complete" not in question
            assert refusal.endswith(response.content)
    url = f"{relay.url}/v1/chat/completions?api-version=2&x=a%20b"  # as Azure has it
    assert httpx.post(url, content=QUESTIONS[0], timeout=LIMIT).status_code == 200
    assert "/chat/completions?api-version=2&x=a%20b " in upstream.asked[-1][0]


ASKED_WITH = {
    "Authorization": "Bearer the-readers",
    "Cookie": "session=the-readers",
    **dict.fromkeys(("X-Api-Key", "X-Goog-Api-Key", "X-Auth-Token"), "the-readers"),
    "Content-Encoding": "own",
    "OpenAI-Organization": "o",
    "X-Title": b"caf\xe9",
}
ANSWERED_WITH = {
    "X-Request-ID": "r-1",
    "X-RateLimit-Remaining-Tokens": "7",
    "Retry-After": "7",
    "Retry-After-Ms": "900",
    "OpenAI-Processing-Ms": "3",
    "Anthropic-RateLimit-Requests-Limit": "5",
    "Apim-Request-Id": "a",
    "X-Own": "café",
}
NOT_PASSED_ON = {"Set-Cookie", "X-Accel-Redirect", "Access-Control-Allow-Origin", "Server"}


@pytest.mark.parametrize("answer", [http(COMPLETE), http(b"{}", "429 X")], ids=["fine", "slow"])
def test_headers(relay: Process, upstream: Upstream, answer: bytes) -> None:
    headers = ANSWERED_WITH | dict.fromkeys(NOT_PASSED_ON, "upstream")
    lines = "".join(f"{name}: {value}\r\n" for name, value in headers.items()).encode("latin-1")
    upstream.answers["headers"] = answer.replace(b"\r\n", b"\r\n" + lines, 1)
    response = httpx.post(
        f"{relay.url}/v1/chat/completions",
        json=asked(model="headers", stream=True),
        headers=ASKED_WITH,  # type: ignore[arg-type]
        timeout=LIMIT,
    )
    assert ANSWERED_WITH.items() <= {n: response.headers.get(n) for n in ANSWERED_WITH}.items()
    assert "upstream" not in {response.headers.get(name) for name in NOT_PASSED_ON}
    head = upstream.asked[-1][0].lower()
    assert "authorization: bearer the-key\r\n" in head
    for line in ("openai-organization: o", "content-encoding: own", "x-title: caf\xe9"):
        assert f"{line}\r\n" in head
    assert "the-readers" not in head


def test_models(relay: Process, upstream: Upstream) -> None:
    assert "complete" in [model.id for model in client_of(relay.url).models.list()]
    assert httpx.head(f"{relay.url}/v1/models", timeout=LIMIT).status_code == 200
    for answer in (http(b"<h1>Hello</h1>", media_type="text/html"), http(b"null"), http(b"")):
        upstream.answers["models"] = answer
        response = httpx.get(f"{relay.url}/v1/models", timeout=LIMIT)
        assert response.status_code == 502
        assert response.json()["error"]["message"]


# What fails ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", INCOMPLETE)
def test_an_incomplete_stream_does_not_look_complete(relay: Process, name: str) -> None:
    text, error = read(relay, model=name, stream=True)
    assert text == "One two"
    assert type(error) is openai.APIError  # an event, and not a connection that broke
    assert "upstream" in error.message
    assert ("stalled" in error.message) == (name == "stalls")


@pytest.mark.parametrize("name", [*NOTHING, *IN_A_200])
def test_what_fails_at_once_has_a_status(relay: Process, name: str) -> None:
    for stream in (True, False):
        _, error = read(relay, model=name, stream=stream)
        assert isinstance(error, openai.InternalServerError)
        stalls = name in ("never answers", "a body that stalls")
        assert error.status_code == (504 if stalls else 502)
        assert "upstream" in error.message.lower() or name in IN_A_200
        assert WHY in error.response.text or name in NOTHING


@pytest.mark.parametrize("name", FAILURES)
def test_what_the_upstream_says_of_its_failure(relay: Process, name: str) -> None:
    head, _, body = FAILURES[name].partition(b"\r\n\r\n")
    for stream in (True, False):
        _, error = read(relay, model=f"fails: {name}", stream=stream)
        assert isinstance(error, openai.APIStatusError)
        assert error.status_code == int(head.split()[1])
        assert error.response.content == body
        assert f"Content-Type: {error.response.headers['content-type']}\r\n".encode() in head


@pytest.mark.parametrize("name", IN_MID_STREAM)
def test_a_failure_in_mid_stream(relay: Process, name: str) -> None:
    text, error = read(relay, model=f"mid: {name}", stream=True)
    assert text == "One two"
    assert type(error) is openai.APIError
    assert WHY in f"{error} {error.body}"


def test_a_401_is_the_fault_of_the_key_of_the_relay(relay: Process, upstream: Upstream) -> None:
    refusal = http(b'{"error": {"message": "Wrong key: the-key"}}', "401 Unauthorized")
    upstream.answers["wrong key"] = refusal
    _, error = read(relay, model="wrong key")
    assert isinstance(error, openai.InternalServerError)
    assert error.status_code == 502
    assert "UPSTREAM_KEY is wrong" in error.message
    assert "the-key" not in error.response.text + relay.log


def test_nobody_listens(start: Start) -> None:
    port = free_port()
    relay = serve(start, "relay", f"http://127.0.0.1:{port}/v1")
    for stream in (True, False):
        response = post(relay, asked(stream=stream))
        assert response.status_code == 503
        assert int(response.headers["Retry-After"]) > 0
        assert response.elapsed.total_seconds() < 5
        assert "cannot be reached" in response.json()["error"]["message"]
    # It goes on when the upstream is there, without a restart.
    with Upstream({"complete": http(whole("Hi"))}, port):
        assert read(relay, model="complete") == ("Hi", None)


def memory_of(server: Process) -> int:
    return int(psutil.Process(server.pid).memory_info().rss)


def test_a_large_reason_takes_no_memory(lively: Process, upstream: Upstream) -> None:
    def talk(connection: Any) -> None:
        connection.sendall(b"HTTP/1.1 500 X\r\nContent-Type: text/plain\r\n\r\n")
        while True:
            connection.sendall(b"x" * 1_000_000)

    upstream.answers["talks of its failure"] = talk
    before = memory_of(lively)
    assert post(lively, asked(model="talks of its failure")).status_code == 500
    assert memory_of(lively) < before + 150_000_000


# Silence, and who leaves --------------------------------------------------------------------------


def test_a_silent_stream_is_kept_alive(lively: Process) -> None:
    """Also before the upstream has said anything: what then goes wrong is an event."""
    for model, before in (("never answers", 0), ("stalls", 3)):
        with raw_post(lively, asked(model=model, stream=True)) as reader:
            received = b""
            while received.count(b": keep-alive\n\n") < 3:
                received += reader.recv(65536)
        assert received.startswith(b"HTTP/1.1 200 OK\r\n")
        assert received.count(b"data: ") == before
        assert received.count(b"content-type: text/event-stream") == 1


@pytest.mark.parametrize("said", ['[{"error": {"message": "no"}}]', ""])
def test_what_fails_after_a_comment_is_an_event(
    lively: Process, upstream: Upstream, said: str
) -> None:
    def refuse_later(connection: Any) -> None:
        connection.settimeout(1)
        with pytest.raises(TimeoutError):
            connection.recv(1)
        connection.settimeout(LIMIT)
        connection.sendall(http(said.encode(), "429 X"))

    upstream.answers["refuses later"] = refuse_later
    text, error = read(lively, model="refuses later", stream=True)
    assert (text, type(error)) == ("", openai.APIError)
    assert "The upstream answered 429." in str(error)
    assert said in str(error)


@pytest.mark.parametrize("model", ["never answers", "stalls", "a body that stalls"])
@pytest.mark.parametrize("stream", [True, False])
def test_the_model_stops_when_the_reader_leaves(
    lively: Process, upstream: Upstream, model: str, stream: bool
) -> None:
    asked_before, before = len(upstream.asked), upstream.left.count(model)
    with raw_post(lively, asked(model=model, stream=stream)):
        wait_for(lambda: len(upstream.asked) > asked_before, "the question")
        assert upstream.left.count(model) == before
    wait_for(lambda: upstream.left.count(model) > before, "the connection to be closed")
    assert "Traceback" not in lively.log


def test_who_leaves_in_the_middle_of_a_question(relay: Process) -> None:
    with socket.create_connection(("127.0.0.1", relay.port), LIMIT) as reader:
        head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: test\r\nContent-Length: 9\r\n\r\n"
        reader.sendall(head + b"{")
        assert read(relay, model="complete") == ("One two", None)  # by now it waits for the rest
    assert read(relay, model="complete") == ("One two", None)
    assert "Traceback" not in relay.log


def test_who_leaves_a_relay_behind_a_middleware(start: Start, upstream: Upstream) -> None:
    """Before the answer begins: for the middleware that was an error of this server."""
    relay = serve(start, "tests.support.behind:relay", upstream.url)
    asked_before, before = len(upstream.asked), upstream.left.count("never answers")
    with raw_post(relay, asked(model="never answers")):
        wait_for(lambda: len(upstream.asked) > asked_before, "the question")
    wait_for(lambda: upstream.left.count("never answers") > before, "the connection to be closed")
    assert read(relay, model="complete") == ("One two", None)
    assert "Traceback" not in relay.log


def test_who_reads_nothing_takes_no_memory(lively: Process, upstream: Upstream) -> None:
    def talk(connection: Any) -> None:
        connection.sendall(head())
        while True:
            connection.sendall(events(chunk({"content": "x" * 10_000})))

    upstream.answers["talks for ever"] = talk
    before = memory_of(lively)
    with raw_post(lively, asked(model="talks for ever", stream=True)) as reader:
        reader.recv(1)
        wait_until_idle(lively)
        assert memory_of(lively) < before + 100_000_000
    wait_for(lambda: "talks for ever" in upstream.left, "the connection to be closed")


def test_many_at_once(lively: Process, upstream: Upstream) -> None:
    """More than the hundred connections that an HTTP client opens by default."""
    before = upstream.left.count("stalls")
    with ExitStack() as stack:
        for _ in range(120):
            reader = stack.enter_context(raw_post(lively, asked(model="stalls", stream=True)))
            assert reader.recv(1) == b"H"
    left = lambda: upstream.left.count("stalls") == before + 120  # noqa: E731
    wait_for(left, "the connections to be closed")


# The settings -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "url", ["api.openai.com/v1", "http://localhost:x/v1", "http://256.0.0.1/v1"]
)
def test_a_wrong_address(monkeypatch: pytest.MonkeyPatch, url: str) -> None:
    monkeypatch.setenv("UPSTREAM_URL", url)
    with pytest.raises(SystemExit, match="UPSTREAM_URL must be an address such as https://"):
        upstream_settings()


def test_a_wrong_key_is_told_at_the_start() -> None:
    command = [sys.executable, "-m", "uvicorn", "recipes.relay:app", "--port", str(free_port())]
    environment = {**ENVIRONMENT, "UPSTREAM_KEY": "s3cret☕"}
    result = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=LIMIT
    )
    assert result.returncode != 0
    assert "UPSTREAM_KEY" in result.stderr
    assert not re.search("Traceback|s3cret", result.stderr)


def test_what_the_readme_says_of_the_package(upstream: Upstream) -> None:
    client = openai.OpenAI(base_url=upstream.url, api_key="none")
    chunks = client.chat.completions.create(**asked(model="ends early", stream=True))
    assert len(list(chunks)) == 3  # without a relay in between, nothing is said of it
    assert openai.DEFAULT_MAX_RETRIES == 2


@pytest.mark.parametrize(
    ("name", "value"),
    [("SSL_CERT_FILE", "/nowhere"), ("ALL_PROXY", "socks5://me:secret@localhost:1")],
)
def test_surroundings_in_which_no_upstream_can_be_asked(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str
) -> None:
    monkeypatch.setenv(name, value)
    upstream_settings()  # the embedded parrot is on this machine
    monkeypatch.setenv("UPSTREAM_URL", "https://example.org/v1")
    with pytest.raises(SystemExit, match=f"UPSTREAM_URL cannot be used: .*{name}") as told:
        upstream_settings()
    assert "secret" not in str(told.value)
