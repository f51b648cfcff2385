"""recipes/tokens.py: read by the `openai` package, left by its readers, stopped."""

import asyncio
import json
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import openai
import psutil
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from openai import AsyncOpenAI

from main import HEADERS
from recipes.parrot import to_tokens
from recipes.tokens import Question, plan
from tests.support.processes import Process, Start, starting
from tests.support.tokens import (
    LONG,
    QUESTION,
    asked,
    client_of,
    post,
    raw_post,
    read,
    serve,
    stopped_after,
)

# They share servers, and so are run by one worker.
pytestmark = pytest.mark.xdist_group("tokens")
TOKENS = to_tokens(QUESTION)


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Start]:
    with starting(tmp_path_factory.mktemp("tokens")) as start:
        yield start


@pytest.fixture(scope="module")
def parrot(shared: Start) -> Process:
    return serve(shared, "tokens", parrot__SECONDS_PER_TOKEN=0)


@pytest.fixture(scope="module", params=["tokens", "relay"])
def either(request: pytest.FixtureRequest, shared: Start) -> Process:
    """The parrot, and the relay, which relays it by itself: nobody shall see a difference."""
    return serve(shared, request.param, parrot__SECONDS_PER_TOKEN=0)


@pytest.fixture(scope="module", params=["tokens", "relay"])
def slow(request: pytest.FixtureRequest, shared: Start) -> Process:
    """The same, but a long answer takes minutes."""
    return serve(shared, request.param, parrot__SECONDS_PER_TOKEN=0.1)


# The protocol -------------------------------------------------------------------------------------


def test_the_package_reads_it_in_all_four_ways(either: Process) -> None:
    client = client_of(either.url)
    completion = client.chat.completions.create(**asked())
    assert completion.object == "chat.completion"
    assert completion.choices[0].message.role == "assistant"
    assert completion.choices[0].message.content == QUESTION
    assert completion.choices[0].finish_reason == "stop"
    assert completion.usage
    assert completion.usage.prompt_tokens == completion.usage.completion_tokens == len(TOKENS)
    assert completion.usage.total_tokens == 2 * len(TOKENS)

    question = asked(stream=True, stream_options={"include_usage": True})
    chunks = list(client.chat.completions.create(**question))
    role, *spoken, end, usage = chunks
    assert {chunk.object for chunk in chunks} == {"chat.completion.chunk"}
    assert len({chunk.id for chunk in chunks}) == 1
    assert role.choices[0].delta.role == "assistant"
    assert [chunk.choices[0].delta.content for chunk in spoken] == TOKENS
    assert {chunk.choices[0].finish_reason for chunk in [role, *spoken]} == {None}
    assert end.choices[0].finish_reason == "stop"
    assert [chunk.usage for chunk in [role, *spoken, end]] == [None] * (len(TOKENS) + 2)
    assert usage.choices == []
    assert usage.usage == completion.usage

    async def read_async() -> None:
        async with AsyncOpenAI(base_url=f"{either.url}/v1", api_key="none") as client:
            again = await client.chat.completions.create(**asked())
            assert again.choices == completion.choices
            stream = await client.chat.completions.create(**asked(stream=True))
            assert [c.choices[0].delta.content async for c in stream] == ["", *TOKENS, None]

    asyncio.run(read_async())
    assert [model.id for model in client.models.list()] == ["parrot"]


def test_on_the_wire(either: Process) -> None:
    response = post(either, asked(stream=True, max_tokens=1))
    assert response.headers["Content-Type"].startswith("text/event-stream")
    for name, value in HEADERS.items():
        assert response.headers[name] == value
    *events, nothing = response.text.split("\n\n")
    assert nothing == ""
    *chunks, done = [event.removeprefix("data: ") for event in events]
    assert done == "[DONE]"
    choices = [json.loads(chunk)["choices"][0] for chunk in chunks]
    deltas = [choice["delta"] for choice in choices]
    assert deltas == [{"role": "assistant", "content": ""}, {"content": "What"}, {}]
    assert [choice["finish_reason"] for choice in choices] == [None, None, "length"]
    assert all(json.loads(chunk)["usage"] is None for chunk in chunks)


@settings(deadline=None, max_examples=50)
@given(
    text=st.text(),
    stops=st.lists(st.text(min_size=1, max_size=3), max_size=4),
    limit=st.none() | st.integers(1, 9),
    field=st.sampled_from(["max_tokens", "max_completion_tokens"]),
)
def test_what_the_parrot_says(text: str, stops: list[str], limit: int | None, field: str) -> None:
    """All of the text up to the first stop sequence, or as many of its tokens as are asked for."""
    question = Question.model_validate(asked(text, stop=stops, **{field: limit}))
    said, reason, usage = plan(question)
    assert text.startswith(said)
    assert not any(stop in said for stop in stops)
    assert usage["completion_tokens"] == len(to_tokens(said)) <= (limit or len(text))
    if reason == "length":
        assert usage["completion_tokens"] == limit
    else:
        rest = text.removeprefix(said)
        assert not rest or any(rest.startswith(stop) for stop in stops)


def test_stop(either: Process) -> None:
    for stream in (True, False):
        assert read(either, stop=" <b>tok", stream=stream) == ("What is a", None)
        assert read(either, stop=["nowhere", "A piece"], stream=stream)[0].endswith("? ")


def test_the_last_message_is_what_it_says(parrot: Process) -> None:
    parts = [{"type": "text", "text": "One"}, {"type": "text", "text": "two", "own": 1}]
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": parts}]
    completion = client_of(parrot.url).chat.completions.create(**asked(messages=messages))
    assert completion.choices[0].message.content == "One\ntwo"
    assert completion.usage
    assert completion.usage.prompt_tokens == len(to_tokens("Be brief.") + to_tokens("One\ntwo"))
    assert read(parrot, question=None) == ("", None)


# What is wrong with the question ------------------------------------------------------------------

IMAGE = [{"type": "image_url", "image_url": {"url": "https://localhost/x.png"}}]
TOOL = [{"type": "function", "function": {"name": "f"}}]


@pytest.mark.parametrize(
    "fields",
    [
        {"model": "owl"},
        {"model": None},
        {"n": 2},
        {"tools": TOOL},
        {"messages": [{"role": "user", "content": IMAGE}]},
        {"messages": []},
        {"max_tokens": 0},
        {"stop": ["a"] * 5},
        {"stop": ""},
    ],
    ids=str,
)
def test_a_wrong_question(parrot: Process, fields: dict[str, Any]) -> None:
    _, error = read(parrot, **fields, stream=True)
    unknown = fields == {"model": "owl"}
    assert type(error) is (openai.NotFoundError if unknown else openai.BadRequestError)
    assert error.type == "invalid_request_error"
    assert error.param in fields
    assert error.param in error.message
    assert error.code == ("model_not_found" if unknown else None)
    assert "\n" not in error.message


@pytest.mark.parametrize("wrong", ["[%s]", '[{"role": "user", "content": [%s]}]'])
def test_the_first_of_many_errors_is_told(parrot: Process, wrong: str) -> None:
    """For FastAPI to list them all takes seconds, in which everybody else waits."""
    messages = wrong % ",".join(["{}"] * 300_000)
    before = psutil.Process(parrot.pid).cpu_times().user
    response = post(parrot, f'{{"model": "parrot", "messages": {messages}}}'.encode())
    assert response.status_code == 400
    assert psutil.Process(parrot.pid).cpu_times().user < before + 1


def test_errors_have_the_shape_that_the_api_has(either: Process) -> None:
    for method, path, status in (
        ("GET", "/v1/embeddings", 404),
        ("GET", "/v1/chat/completions", 405),
        ("POST", "/v1/chat/completions", 400),
    ):
        content = b"{" if method == "POST" else None
        response = httpx.request(method, either.url + path, content=content)
        assert response.status_code == status
        assert response.json()["error"]["type"] == "invalid_request_error"


# Who leaves, and what is stopped ------------------------------------------------------------------


def test_each_token_comes_when_it_is_made_and_none_when_the_reader_has_left(slow: Process) -> None:
    before = slow.log.count("the parrot stopped after")
    stream = client_of(slow.url).chat.completions.create(**asked(LONG, stream=True))
    for token in ["", *to_tokens(LONG)[:3]]:
        assert next(stream).choices[0].delta.content == token
    assert slow.log.count("the parrot stopped after") == before
    stream.close()
    assert int(stopped_after(slow, before + 1)[-1]) < 1000

    async def read_a_little() -> None:
        async with AsyncOpenAI(base_url=f"{slow.url}/v1", api_key="none") as client:
            stream = await client.chat.completions.create(**asked(LONG, stream=True))
            async for chunk in stream:
                if chunk.choices[0].delta.content:
                    break
            await stream.close()

    asyncio.run(read_a_little())
    assert int(stopped_after(slow, before + 2)[-1]) < 1000


def test_who_waits_for_a_complete_answer_leaves(slow: Process) -> None:
    begun, stopped = (slow.log.count(f"the parrot {what}") for what in ("begins", "stopped after"))
    with raw_post(slow, asked(LONG)):
        slow.wait_for_log("the parrot begins", begun + 1)
    assert int(stopped_after(slow, stopped + 1)[-1]) < 1000


@pytest.mark.parametrize("recipe", ["tokens", "relay"])
def test_when_the_server_is_stopped(start: Start, recipe: str) -> None:
    """Who reads a stream is told. Who waits for a complete answer gets it."""
    server = serve(start, recipe, parrot__SECONDS_PER_TOKEN=0.1)
    stream = client_of(server.url).chat.completions.create(**asked(LONG, stream=True))
    next(stream)
    with raw_post(server, asked(LONG, stream=True)) as reader, ThreadPoolExecutor() as threads:
        received = b""
        while received.count(b"data: ") < 3:
            received += reader.recv(65536)
        answer = threads.submit(read, server)
        server.wait_for_log("the parrot begins", 3)
        server.signal(signal.SIGTERM)
        with pytest.raises(openai.APIError, match="The server is stopping") as raised:
            list(stream)
        assert type(raised.value) is openai.APIError  # no connection that broke
        while data := reader.recv(65536):
            received += data
        assert received.endswith(b"\r\n0\r\n\r\n")  # the proper end of the body
        assert b"[DONE]" not in received
        assert answer.result() == (QUESTION, None)
    server.wait()
    assert "Traceback" not in server.log


def test_an_answer_that_is_cut_does_not_look_complete(start: Start) -> None:
    server = serve(start, "tokens")
    stream = client_of(server.url).chat.completions.create(**asked(LONG, stream=True))
    next(stream)
    server.kill()
    with pytest.raises(openai.APIConnectionError):
        list(stream)


def test_a_middleware_that_repeats_the_body(start: Start) -> None:
    """Repeated, it is more than 1 MB."""
    server = serve(start, "tests.support.tokens_servers:repeated")
    assert read(server, question=QUESTION + LONG, max_tokens=9)[1] is None


def test_a_model_that_fails(start: Start) -> None:
    text, error = read(serve(start, "tests.support.tokens_servers:failing"), stream=True)
    assert text == "What is"
    assert type(error) is openai.APIError
    assert error.message == "The model failed."
