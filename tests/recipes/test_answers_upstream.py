"""The recipe `answers` asks a server of chat completions: what that one says is what is read."""

import json
import re
from collections.abc import Iterator
from typing import Any

import openai
import pytest

from tests.support.answers import Ask, asked, events_of
from tests.support.chat_upstream import ANSWERS
from tests.support.processes import Process, wait_for


@pytest.fixture(scope="module")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Process, Process]]:
    with Ask(tmp_path_factory.mktemp("upstream")) as ask:
        upstream = ask.serve(app="tests.support.chat_upstream:app")
        yield upstream, ask.serve(upstream=upstream.url, constants={"answers.STALLED": 2})


COMPLETE = ["complete", "comments, usage", "CRLF", "no [DONE]", "more after its end", "gzip"]
BROKE_OFF = "The upstream broke off in the middle of its answer."
BROKEN = {
    "falls silent": "The upstream has stalled.",
    "breaks off": "The connection to the upstream broke.",
    "ends early": BROKE_OFF,
    # The `openai` package does not tell whether a [DONE] came.
    "no reason": BROKE_OFF,
    "strange text": BROKE_OFF,
    "an error, flat": BROKE_OFF,
    "no JSON": "The model failed.",
    "a text": "The model failed.",
    "null": "The model failed.",
    "strange choices": "The model failed.",
    "200 in one piece": "The upstream failed: {",
    "empty": "The upstream failed: Error code: 500",
    "401": "The upstream refuses the key of this server.",
}
EARLY = {"length": "max_output_tokens", "filtered": "content_filter"}


@pytest.mark.parametrize("model", ANSWERS)
def test_an_upstream(servers: tuple[Process, Process], model: str) -> None:
    upstream, server = servers
    response = asked(server).responses.create(model=model, input="What?")
    text, error = response.output_text, response.error
    if model == "half pairs":
        assert (response.status, text.encode("utf-16", "surrogatepass").decode("utf-16")) == (
            "completed",
            "😀",
        )
    elif model in COMPLETE:
        assert (response.status, text) == ("completed", "One two")
        assert events_of(asked(server), response.id)[-1]["type"] == "response.completed"
    elif model in EARLY:
        assert (response.status, text) == ("incomplete", "One two")
        assert response.incomplete_details
        assert response.incomplete_details.reason == EARLY[model]
    else:
        assert response.status == "failed"
        assert text == ("One two" if ANSWERS[model][2].startswith("data: ") else "")
        assert error
        assert BROKEN.get(model, "Enough.") in error.message
        assert "the-key" not in error.message
        assert events_of(asked(server), response.id)[-1]["type"] == "response.failed"
    if model == "falls silent":
        upstream.wait_for_log("the reader has left")


def test_what_is_asked(servers: tuple[Process, Process]) -> None:
    upstream, server = servers
    conversation: Any = [
        {"role": "user", "content": "before"},
        {"role": "user", "content": [{"type": "input_text", "text": "½"}]},
    ]
    asked(server).responses.create(
        model="complete", input=conversation, instructions="Be brief.", max_output_tokens=7
    )
    (found,) = re.findall(r"asked: b'Bearer the-key' (.*7.*)", upstream.log)
    assert json.loads(found) == {
        "model": "complete",
        "messages": [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "before"},
            {"role": "user", "content": "½"},
        ],
        "stream": True,
        "max_tokens": 7,
    }


def test_stop_closes_the_connection(servers: tuple[Process, Process]) -> None:
    upstream, server = servers
    client = asked(server)
    before = upstream.log.count("the reader has left")
    response = client.responses.create(model="falls silent", input="x", background=True)
    wait_for(lambda: client.responses.retrieve(response.id).output_text == "One two", "text")
    assert client.responses.cancel(response.id).status == "cancelled"
    wait_for(lambda: upstream.log.count("the reader has left") > before, "the model to stop")


def test_nobody_is_there(tmp_path_factory: pytest.TempPathFactory) -> None:
    with Ask(tmp_path_factory.mktemp("nobody")) as ask:
        server = ask.serve(upstream="http://127.0.0.1:1")
        response = asked(server).responses.create(model="complete", input="x")
        assert response.error
        assert response.error.message == "The upstream cannot be reached."
        with pytest.raises(openai.BadRequestError):
            asked(server).responses.create(model="complete", input=[])
