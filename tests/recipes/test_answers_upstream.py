"""The recipe `answers` asks a server of chat completions: what that one says is what is read."""

import gzip
import json
from collections.abc import Iterator
from typing import Any

import pytest

from tests.support.answers import asked, events_of, serve
from tests.support.processes import Process, Start, starting, wait_for
from tests.support.upstreams import Handler, Upstream, chunk, events, hang_after, head, http

pytestmark = pytest.mark.xdist_group("answers upstream")  # so there is one `server`

ONE, TWO, STOP, DONE = (
    chunk({"content": "One"}),
    chunk({"content": " two"}),
    chunk({}, "stop"),
    "[DONE]",
)
USAGE = '{"choices": null, "usage": {"total_tokens": 5}}'
FILTERED = '{"choices": [{"index": 0, "content_filter_results": {}}]}'  # by Azure
WHOLE = events(ONE, TWO, STOP, DONE)
PLAIN = "text/plain"
# By the model that is asked for: what the upstream sends.
COMPLETE: dict[str, bytes | Handler] = {
    "complete": http(WHOLE),
    "comments": http(WHOLE.replace(b"data:", b": hi\n\ndata:")),
    "no text": http(
        events(chunk({"content": ""}), FILTERED, ONE, '{"choices": []}', TWO, STOP, DONE)
    ),
    "CRLF": http(WHOLE.replace(b"\n", b"\r\n"), media_type="text/event-stream; charset=utf-8"),
    "no [DONE]": http(events(ONE, TWO, STOP)),
    "more after its end": http(events(ONE, TWO, STOP, ONE, STOP, DONE)),
    "gzip": http(gzip.compress(WHOLE), headers="Content-Encoding: gzip\r\n"),
    "another media type": http(WHOLE, media_type="text/plain"),
    "what EventSource reads": http(  # but the openai package does not
        b"\xef\xbb\xbf" + WHOLE.replace(b"\n\n", b"\nid: 1\n\n: hi\n\nretry: 1\n\ndata:\n\n"),
        media_type="Text/Event-Stream",
    ),
    "redirected": http(b"", "307 x", headers="Location: /v1/models\r\n"),
}
EARLY = {"length": "max_output_tokens", "content_filter": "content_filter"}


def endless(said: bytes) -> Handler:
    def talk(connection: Any) -> None:
        connection.sendall(said)
        while True:
            connection.sendall(b"x" * 1_000_000)

    return talk


BROKE_OFF = "The upstream broke off in the middle of its answer."
# After «One two», and what is told then.
BROKEN: dict[str, tuple[bytes | Handler, str]] = {
    "falls silent": (hang_after(head() + events(ONE, TWO)), "The upstream has stalled."),
    "breaks off": (http(events(ONE, TWO), length=999), "The connection to the upstream broke."),
    "ends early": (http(events(ONE, TWO)), BROKE_OFF),
    "no reason": (http(events(ONE, TWO, DONE)), BROKE_OFF),
    **{
        f"reason: {reason}": (http(events(ONE, TWO, chunk({}, reason), DONE)), BROKE_OFF)
        for reason in ("abort", "error")  # vLLM, Mistral
    },
    "an endless event": (
        endless(head() + events(ONE, TWO) + b"data: "),
        "The connection to the upstream broke.",
    ),
    "strange text": (http(events(ONE, TWO, '{"choices": [{"delta": {"content": 5}}]}')), BROKE_OFF),
    "no JSON": (http(events(ONE, TWO, "{")), "The model failed."),
    "a text": (http(events(ONE, TWO, '"Enough."')), "The model failed."),
    "strange choices": (http(events(ONE, TWO, '{"choices": [5]}')), "The model failed."),
    "an error": (http(events(ONE, TWO, '{"error": {"message": "Enough."}}')), "Enough."),
    "no message": (http(events(ONE, TWO, '{"error": {"message": "", "x": "Enough."}}')), "Enough."),
    "an error as text": (http(events(ONE, TWO, '{"error": "Enough."}')), "Enough."),
}
# Instead of an answer, and what is told then.
REFUSED: dict[str, tuple[bytes | Handler, str]] = {
    "an endless reason": (
        endless(b"HTTP/1.1 500 x\r\nContent-Type: text/plain\r\n\r\n"),
        "The upstream answered 500: xxx",
    ),
    "200 with an error": (http(b'{"error": {"message": "Enough."}}'), "Enough."),
    "200 in one piece": (http(b'{"choices": [{"message": {"content": "One"}}]}'), "200: {"),
    "400": (http(b'{"error": {"message": "Enough.", "code": "x"}}', "400 x"), "Enough."),
    "403": (http(b'{"error": {"message": "Enough."}}', "403 x"), "Enough."),
    "detail": (http(b'{"detail": [{"loc": ["body"], "msg": "Enough."}]}', "422 x"), "Enough."),
    "a list": (http(b'[{"error": {"message": "Enough."}}]', "429 x"), "Enough."),
    "plain": (http(b"Enough.", "500 x", media_type=PLAIN), "Enough."),
    "empty": (http(b"", "500 x", media_type=PLAIN), "The upstream answered 500:"),
    "moved": (http(b"Enough.", "302 x", media_type=PLAIN), "Enough."),
    "401": (
        http(b'{"error": {"message": "Incorrect API key provided: the-key"}}', "401 x"),
        "The upstream refuses the key of this server.",
    ),
}


@pytest.fixture(scope="module")
def upstream() -> Iterator[Upstream]:
    early = {reason: http(events(ONE, TWO, chunk({}, reason), DONE)) for reason in EARLY}
    halves = {
        "halves": http(events(chunk({"content": "\ud83d"}), chunk({"content": "\ude00"}), STOP))
    }
    broken = {model: answer for model, (answer, _) in [*BROKEN.items(), *REFUSED.items()]}
    moved = {"models": http(WHOLE)}  # where "redirected" leads to
    with Upstream(COMPLETE | early | halves | broken | moved) as upstream:
        yield upstream


@pytest.fixture(scope="module")
def server(upstream: Upstream, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Process]:
    with starting(tmp_path_factory.mktemp("upstream")) as start:
        yield serve(start, upstream=upstream.url, answers__http__timeout=2)


@pytest.mark.parametrize("model", COMPLETE)
def test_complete(server: Process, model: str) -> None:
    response = asked(server).responses.create(model=model, input="What?")
    assert (response.status, response.output_text) == ("completed", "One two")
    events = events_of(asked(server), response.id)
    assert [event["delta"] for event in events if "delta" in event] == ["One", " two"]
    assert events[-1]["type"] == "response.completed"


def test_half_pairs_become_a_character(server: Process) -> None:
    text = asked(server).responses.create(model="halves", input="What?").output_text
    assert text.encode("utf-16", "surrogatepass").decode("utf-16") == "😀"


@pytest.mark.parametrize("reason", EARLY)
def test_ended_early(server: Process, reason: str) -> None:
    response = asked(server).responses.create(model=reason, input="What?")
    assert (response.status, response.output_text) == ("incomplete", "One two")
    assert response.incomplete_details
    assert response.incomplete_details.reason == EARLY[reason]


@pytest.mark.parametrize("model", [*BROKEN, *REFUSED])
def test_failed(server: Process, upstream: Upstream, model: str) -> None:
    response = asked(server).responses.create(model=model, input="What?")
    text = "One two" if model in BROKEN else ""
    assert (response.status, response.output_text) == ("failed", text)
    assert response.error
    assert (BROKEN | REFUSED)[model][1] in response.error.message
    assert "the-key" not in response.error.message
    assert events_of(asked(server), response.id)[-1]["type"] == "response.failed"
    wait_for(lambda: model in upstream.left, "the connection to be closed")


def test_what_is_asked(server: Process, upstream: Upstream) -> None:
    conversation: Any = [
        {"role": "user", "content": "before"},
        {"role": "user", "content": [{"type": "input_text", "text": "½"}]},
    ]
    asked(server).responses.create(
        model="complete", input=conversation, instructions="Be brief.", max_output_tokens=7
    )
    sent, body = upstream.asked[-1]
    assert "authorization: bearer the-key\r\n" in sent.lower()
    assert json.loads(body) == {
        "model": "complete",
        "messages": [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "before"},
            {"role": "user", "content": "½"},
        ],
        "stream": True,
        "max_tokens": 7,
    }


def test_stop_closes_the_connection(server: Process, upstream: Upstream) -> None:
    client = asked(server)
    before = upstream.left.count("falls silent")
    response = client.responses.create(model="falls silent", input="x", background=True)
    wait_for(lambda: client.responses.retrieve(response.id).output_text == "One two", "text")
    assert client.responses.cancel(response.id).status == "cancelled"
    wait_for(lambda: upstream.left.count("falls silent") > before, "the model to stop")


def test_nobody_is_there(start: Start) -> None:
    server = serve(start, upstream="http://127.0.0.1:1/v1")
    error = asked(server).responses.create(model="complete", input="x").error
    assert error
    assert error.message == "The upstream cannot be reached."
