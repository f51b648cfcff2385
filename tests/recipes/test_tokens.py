"""recipes/tokens.py: read by the `openai` package, left by its readers, stopped, relayed."""

import asyncio
import itertools
import json
import re
import signal
import socket
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from openai import AsyncOpenAI, OpenAI

from main import HEADERS, PAGE_HEADERS
from recipes import tokens
from tests.support.processes import LIMIT, Process, free_port
from tests.support.raw_reader import wait_until_idle
from tests.support.tokens import ANSWER, LONG, QUESTION, Serve, asked, long_question, servers
from tests.support.upstreams import BODIES, ERROR, STREAMS

WHOLE = ("is whole", "thinks", "ends at its limit")  # upstreams without a fault

# The tests without a browser share servers, and so are run by one worker.
pytestmark = pytest.mark.xdist_group("tokens")


# The servers --------------------------------------------------------------------------------------

RECIPE = "tokens_servers:parrot"
# Servers that no test harms: the app, its upstream, and its constants.
SHARED: dict[str, tuple[str, str, dict[str, float]]] = {
    "parrot": (RECIPE, "", {"SECONDS_PER_TOKEN": 0}),
    "relay of the parrot": (RECIPE, "parrot", {}),
    "slow parrot": (RECIPE, "", {"SECONDS_PER_TOKEN": 60 / LONG}),
    "relay of the slow parrot": (RECIPE, "slow parrot", {}),
    "upstream": ("upstreams:upstream", "", {}),
    "relay": (RECIPE, "upstream", {}),
    "impatient relay": (RECIPE, "upstream", {"STALLED_AFTER": 3}),
    "relay that keeps alive": (RECIPE, "upstream", {"SILENCE": 0.2}),
}
Shared = Callable[[str], Process]


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shared]:
    """`shared(name)` starts one of them, the first time."""
    with servers(tmp_path_factory.mktemp("tokens")) as serve:

        @cache
        def start(name: str) -> Process:
            app, upstream, constants = SHARED[name]
            return serve(app, upstream and start(upstream).url, **constants)

        yield start


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Serve]:
    """`serve(RECIPE)` starts a server for one test."""
    with servers(tmp_path) as serve:
        yield serve


@pytest.fixture(params=["parrot", "relay of the parrot"])
def either(request: pytest.FixtureRequest, shared: Shared) -> Process:
    """The parrot, and a relay of it: nobody shall see a difference."""
    return shared(request.param)


@cache  # one takes longer to make than an answer
def client_of(server: Process) -> OpenAI:
    return OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=LIMIT)


http = httpx.Client(timeout=LIMIT)


def post(server: Process, body: Any) -> httpx.Response:
    """POST these bytes, or this as JSON."""
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    url = f"{server.url}/v1/chat/completions"
    headers = {"Content-Type": "application/json"}
    return http.post(url, content=content, headers=headers)


# The protocol -------------------------------------------------------------------------------------


def test_the_package_reads_it_in_all_four_ways(either: Process) -> None:
    client = client_of(either)
    completion = client.chat.completions.create(**asked())
    assert completion.object == "chat.completion"
    assert completion.choices[0].message.role == "assistant"
    assert completion.choices[0].message.content == ANSWER
    assert completion.choices[0].finish_reason == "stop"
    made = len(list(tokens.squawk(QUESTION)))
    assert completion.usage
    assert completion.usage.prompt_tokens == len(tokens.to_tokens(QUESTION)) == 5
    assert completion.usage.completion_tokens == made
    assert completion.usage.total_tokens == 5 + made

    question = asked(stream=True, stream_options={"include_usage": True})
    chunks = list(client.chat.completions.create(**question))
    *answer, usage = chunks
    assert {chunk.object for chunk in chunks} == {"chat.completion.chunk"}
    assert len({chunk.id for chunk in chunks}) == 1
    assert answer[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in answer) == ANSWER
    assert len(answer) == made + 2  # a token at a time; the role and the reason have their own
    assert [chunk.choices[0].finish_reason for chunk in answer] == [None] * (made + 1) + ["stop"]
    assert [chunk.usage for chunk in answer] == [None] * len(answer)
    assert usage.choices == []
    assert usage.usage == completion.usage

    async def read_async() -> None:
        async with AsyncOpenAI(base_url=f"{either.url}/v1", api_key="none") as client:
            again = await client.chat.completions.create(**asked())
            assert again.choices == completion.choices
            stream = await client.chat.completions.create(**asked(stream=True))
            text = [chunk.choices[0].delta.content or "" async for chunk in stream]
            assert "".join(text) == ANSWER

    asyncio.run(read_async())
    assert [model.id for model in client.models.list()] == ["parrot"]


def test_on_the_wire(either: Process) -> None:
    response = post(either, asked(stream=True, max_tokens=2))
    assert response.headers["Content-Type"].startswith("text/event-stream")
    for name, value in HEADERS.items():
        assert response.headers[name] == value
    *events, end = response.text.split("\n\n")
    assert end == ""
    assert all(event.startswith("data: ") for event in events)
    *chunks, done = [event.removeprefix("data: ") for event in events]
    assert done == "[DONE]"
    choices = [json.loads(chunk)["choices"][0] for chunk in chunks]
    assert [choice["delta"] for choice in choices] == [
        {"role": "assistant", "content": ""},
        {"content": "A"},
        {"content": " token"},
        {},
    ]
    assert [choice["finish_reason"] for choice in choices] == [None, None, None, "length"]
    assert all(json.loads(chunk)["usage"] is None for chunk in chunks)
    assert "☕" in post(either, asked("What is a stream?", stream=True)).text


def test_the_same_question_has_the_same_answer_on_every_server(
    shared: Shared, serve: Serve
) -> None:
    one, other = shared("parrot"), serve(RECIPE, SECONDS_PER_TOKEN=0)
    for question in (QUESTION, "Hello"):
        answers = [read(server, asked(question, stream=False)) for server in (one, one, other)]
        assert answers == [("".join(tokens.squawk(question)), None)] * 3


@pytest.mark.parametrize("field", ["max_tokens", "max_completion_tokens"])
def test_max_tokens(either: Process, field: str) -> None:
    client = client_of(either)
    made = list(tokens.squawk(QUESTION))
    for limit, reason in ((1, "length"), (len(made) - 1, "length"), (len(made), "stop")):
        completion = client.chat.completions.create(**asked(**{field: limit}))
        assert completion.choices[0].message.content == "".join(made[:limit])
        assert completion.choices[0].finish_reason == reason
        assert completion.usage
        assert completion.usage.completion_tokens == limit


def test_stop(either: Process) -> None:
    client = client_of(either)
    for stop, expected in (
        (" piece of te", "A token is a"),
        (["nowhere", "is a piece", "a piece of"], "A token "),
        ("A", ""),
        ("next token.\n!", ANSWER),  # its last token begins a sequence that does not come
    ):
        completion = client.chat.completions.create(**asked(stop=stop))
        assert completion.choices[0].message.content == expected
        assert completion.choices[0].finish_reason == "stop"
        chunks = client.chat.completions.create(**asked(stop=stop, stream=True))
        assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == expected


@settings(deadline=None)
@given(data=st.data(), extra=st.lists(st.text(min_size=1, max_size=3), max_size=2))
def test_any_stop_sequences(data: st.DataObject, extra: list[str]) -> None:
    """Whatever the tokens are cut into, the answer ends where the first stop sequence begins."""
    start = data.draw(st.integers(0, len(ANSWER) - 1))
    stops = [ANSWER[start : start + data.draw(st.integers(1, 30))], *extra]
    question = tokens.Question.model_validate(asked(stop=stops))
    # The sequence that is complete first ends it.
    _, first = min((at + len(s), at) for s in stops if (at := ANSWER.find(s)) >= 0)

    async def read() -> str:
        chunks = [json.loads(c)["choices"][0] async for c in tokens.Parrot().stream(question)]
        assert chunks[-1]["finish_reason"] == "stop"
        return "".join(chunk["delta"].get("content", "") for chunk in chunks)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokens, "SECONDS_PER_TOKEN", 0)
        text = asyncio.run(read())
    assert not any(stop in text for stop in stops)
    assert ANSWER.startswith(text)
    assert len(text) <= first


def test_nothing_of_the_page_is_inline_and_the_policy_says_so(shared: Shared) -> None:
    url = shared("parrot").url
    for path in ("/", "/pages/tokens.js", "/pages/style.css"):
        headers = http.get(url + path).headers
        assert {name: headers[name] for name in PAGE_HEADERS} == PAGE_HEADERS
    assert not re.search("<style|style=|<script>| on[a-z]+=", http.get(url).text)


# What is wrong with the question ------------------------------------------------------------------

IMAGE = [{"type": "image_url", "image_url": {"url": "https://localhost/x.png"}}]
TOOL = [{"type": "function", "function": {"name": "f"}}]


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize(
    ("fields", "error", "param", "code"),
    [
        ({"model": "owl"}, openai.NotFoundError, "model", "model_not_found"),
        ({"n": 2}, openai.BadRequestError, "n", "unsupported_parameter"),
        ({"tools": TOOL}, openai.BadRequestError, "tools", "unsupported_parameter"),
        ({"question": IMAGE}, openai.BadRequestError, "messages", "unsupported_parameter"),
        ({"messages": []}, openai.BadRequestError, "messages", None),
        ({"messages": [{}]}, openai.BadRequestError, "messages", None),
        ({"max_tokens": 0}, openai.BadRequestError, "max_tokens", None),
        ({"max_tokens": "many"}, openai.BadRequestError, "max_tokens", None),
        ({"stop": ["a"] * 5}, openai.BadRequestError, "stop", None),
        ({"stop": ""}, openai.BadRequestError, "stop", None),
        ({"model": None}, openai.BadRequestError, "model", None),
    ],
    ids=str,
)
def test_a_wrong_question(
    either: Process,
    stream: bool,
    fields: dict[str, Any],
    error: type[openai.APIStatusError],
    param: str,
    code: str | None,
) -> None:
    with pytest.raises(error) as raised:
        client_of(either).chat.completions.create(**asked(**fields, stream=stream))
    assert raised.value.type == "invalid_request_error"
    assert raised.value.param == param
    assert raised.value.code == code
    message = raised.value.body["message"]  # type: ignore[index]
    assert message
    assert "\n" not in message
    for word in fields:
        assert word in message or word == "question"


BROKEN = [
    b"",
    b"{",
    b"[]",
    b"null",
    b'"text"',
    b"\xff",
    b'{"model": "parrot"}',
    *(
        json.dumps(asked(x="X")).replace('"X"', value).encode()
        for value in ("NaN", "Infinity", "1e400", '"\\ud800"', '{"\\ud800": 1}', "9" * 5000)
    ),
    *(
        json.dumps(asked(**{field: "X"})).replace('"X"', value).encode()
        for field in ("question", "model", "max_tokens", "stop", "stream", "n", "stream_options")
        for value in ("NaN", "1e400", '"\\ud800"', '["\\ud800"]')
    ),
    json.dumps(asked(x="X")).replace('"X"', "[" * 100_000 + "]" * 100_000).encode(),
    json.dumps(asked(x="X")).replace('"X"', "[" * 900 + "]" * 900).encode(),
]


@pytest.mark.parametrize("body", BROKEN, ids=lambda body: body[-60:].decode(errors="replace"))
def test_no_input_is_a_500(either: Process, body: bytes) -> None:
    response = post(either, body)
    if response.status_code == 200:
        assert response.json()["choices"][0]["message"]["content"] == ANSWER
    else:
        assert response.status_code in (400, 404)
        assert response.json()["error"]["message"]
        assert response.json()["error"]["type"] == "invalid_request_error"


@pytest.mark.parametrize("content_type", ["", "text/plain", "application/xml", "x", "☕"])
def test_what_is_not_sent_as_json(either: Process, content_type: str) -> None:
    response = http.post(
        f"{either.url}/v1/chat/completions",
        content=json.dumps(asked()),
        headers=[(b"Content-Type", content_type.encode())],
    )
    assert response.status_code == 400
    assert "JSON" in response.json()["error"]["message"]


def test_what_is_not_there(either: Process) -> None:
    for method, path, status in (
        ("GET", "/v1/embeddings", 404),
        ("GET", "/v1/chat/completions", 405),
    ):
        response = http.request(method, either.url + path)
        assert response.status_code == status
        assert response.json()["error"]["type"] == "invalid_request_error"


def test_what_the_parrot_does_not_know_is_ignored(either: Process) -> None:
    question = asked(
        [{"type": "text", "text": QUESTION, "x": 1}],
        temperature=0.1,
        seed=7,
        tools=[],
        response_format={"type": "text"},
        extra_body={"anything": {"at": "all"}},
    )
    completion = client_of(either).chat.completions.create(**question)
    assert completion.choices[0].message.content == ANSWER


# Who leaves, and what is stopped ------------------------------------------------------------------


def stopped_after(parrot: Process, question: str) -> int:
    """After how many tokens the parrot stopped; fails if it does not stop."""
    return int(parrot.wait_for_log(rf"the parrot stopped after (\d+) tokens: {question}")[0])


@pytest.fixture(params=["slow parrot", "relay of the slow parrot"])
def slow(request: pytest.FixtureRequest, shared: Shared) -> tuple[Process, Process, str]:
    """A server, the one in which the parrot is, and a question that it answers for a minute."""
    name = f"{request.function.__name__}, {request.param}"
    return shared(request.param), shared("slow parrot"), long_question(name)


Slow = tuple[Process, Process, str]


def test_each_token_comes_when_it_is_made_and_none_when_the_reader_has_left(slow: Slow) -> None:
    server, parrot, question = slow
    stream = client_of(server).chat.completions.create(**asked(question, stream=True))
    for token in ["", *itertools.islice(tokens.squawk(question), 3)]:
        assert next(stream).choices[0].delta.content == token
    assert f"tokens: {question}" not in parrot.log
    stream.close()
    assert stopped_after(parrot, question) < LONG


def test_the_async_reader_leaves(slow: Slow) -> None:
    server, parrot, question = slow

    async def read_a_little() -> None:
        async with AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none") as client:
            stream = await client.chat.completions.create(**asked(question, stream=True))
            async for chunk in stream:
                if chunk.choices[0].delta.content:
                    break
            await stream.close()

    asyncio.run(read_a_little())
    assert stopped_after(parrot, question) < LONG


def test_who_waits_for_a_whole_answer_leaves(slow: Slow) -> None:
    server, parrot, question = slow
    with raw_post(server, asked(question)):
        parrot.wait_for_log(f"the parrot begins: {question}")
    assert stopped_after(parrot, question) < LONG


@contextmanager
def raw_post(server: Process, question: dict[str, Any]) -> Iterator[socket.socket]:
    """Ask, and leave at the end of the `with` block."""
    body = json.dumps(question)
    head = "POST /v1/chat/completions HTTP/1.1\r\nHost: test\r\nContent-Type: application/json\r\n"
    with socket.create_connection(("127.0.0.1", server.port), LIMIT) as reader:
        reader.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n{body}".encode())
        yield reader


# The upstream -------------------------------------------------------------------------------------


def read(server: Process, question: dict[str, Any]) -> tuple[str, openai.APIError | None]:
    """Ask; return the text that came, and the error, if there was one."""
    text = ""
    try:
        answer = client_of(server).chat.completions.create(**question)
        if not question["stream"]:
            return answer.choices[0].message.content, None
        for chunk in answer:
            text += chunk.choices[0].delta.content or ""
    except openai.APIError as error:
        return text, error
    return text, None


def test_what_the_readme_says_of_the_package(shared: Shared) -> None:
    for fault in ("ends early", "says [DONE] early"):  # asked without a relay in between
        assert read(shared("upstream"), asked(model=fault, stream=True)) == ("One two", None)
    assert openai.DEFAULT_MAX_RETRIES == 2
    assert openai.DEFAULT_TIMEOUT.read == 600


@pytest.mark.parametrize("fault", [fault for fault in STREAMS if fault not in WHOLE])
def test_no_broken_answer_looks_whole(shared: Shared, fault: str) -> None:
    relay = shared("impatient relay" if fault == "falls silent" else "relay")
    text, error = read(relay, asked(model=fault, stream=True))
    assert error
    assert "upstream" in error.message or error.code == ERROR["code"]
    if fault == "sends nothing":
        assert isinstance(error, openai.InternalServerError)
        assert error.status_code == 502
    elif fault == "falls silent":
        # On a busy machine it may be too slow for its impatient relay before.
        assert "stalled" in error.message
        assert "One two".startswith(text)
    else:
        assert text == "One two"
        # An event, and then the proper end: not a connection that broke.
        assert type(error) is openai.APIError


@pytest.mark.parametrize("fault", [fault for fault in BODIES if fault not in WHOLE])
def test_no_broken_body_looks_whole(shared: Shared, fault: str) -> None:
    _, error = read(shared("relay"), asked(model=fault, stream=False))
    assert isinstance(error, openai.InternalServerError)
    assert error.status_code == 502
    assert "upstream" in error.message


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize(
    ("fault", "status"),
    [
        ("answers 429", 429),
        ("answers 400", 400),
        ("answers 500", 500),
        ("answers 500 in HTML", 500),
        ("answers 503 in another shape", 503),
        ("answers 401", 502),  # the key is the relay's, not the reader's
        ("answers 302 to nowhere", 502),
        ("answers in HTML", 502),
        ("answers an error with 200", 502),
        ("is silent", 504),
    ],
)
def test_a_refusal_is_passed_on(shared: Shared, fault: str, status: int, stream: bool) -> None:
    relay = shared("impatient relay" if fault == "is silent" else "relay")
    times_asked = shared("upstream").log.count(f"{fault}: asked")
    text, error = read(relay, asked(model=fault, stream=stream))
    assert text == ""
    assert isinstance(error, openai.APIStatusError)
    assert error.status_code == status
    if fault in ("answers 429", "answers 400", "answers 500"):
        assert error.body == ERROR
        assert error.response.headers["Retry-After"] == "7"
        # Asked once: who retries is the reader.
        assert shared("upstream").log.count(f"{fault}: asked") == times_asked + 1
    else:
        assert "upstream" in error.message
        assert error.type == "server_error"
    assert "<h1>" not in error.message


def test_who_leaves_while_the_upstream_is_silent(shared: Shared) -> None:
    upstream = shared("upstream")
    for stream in (True, False):
        before = upstream.log.count("is silent: the reader has left")
        with raw_post(shared("relay"), asked(model="is silent", stream=stream, seed=stream)):
            upstream.wait_for_log(f'is silent: .*"seed": {json.dumps(stream)}')
        upstream.wait_for_log("is silent: the reader has left", before + 1)


def test_who_reads_nothing_leaves(shared: Shared) -> None:
    """The relay waits in `send` then, and not for the upstream."""
    with raw_post(shared("relay"), asked(model="talks for ever", stream=True)) as reader:
        reader.recv(1)
        wait_until_idle(shared("relay"))
    shared("upstream").wait_for_log("talks for ever: the reader has left")


def test_all_fields_pass_the_relay_both_ways(shared: Shared) -> None:
    question = asked(model="is whole", own={"é": [1.5, None]}, n=None)
    question["messages"][0]["content"] = [{"type": "image_url", "image_url": {"url": "x"}}]
    assert post(shared("relay"), question).json() == json.loads(BODIES["is whole"])
    assert f"is whole: {json.dumps(question, sort_keys=True)}" in shared("upstream").log
    question["stream"] = True
    events = post(shared("relay"), question).text.removesuffix("\n\n").split("\n\n")
    *chunks, done = [event.removeprefix("data: ") for event in events]
    assert [*map(json.loads, chunks)] == [*map(json.loads, STREAMS["is whole"][:-1])]
    assert done == "[DONE]"
    assert f"is whole: {json.dumps(question, sort_keys=True)}" in shared("upstream").log


def test_the_key_of_the_relay_is_used_and_the_readers_is_not_passed_on(shared: Shared) -> None:
    client = OpenAI(base_url=f"{shared('relay').url}/v1", api_key="the reader's", timeout=LIMIT)
    client.chat.completions.create(**asked(model="is whole"))
    assert "is whole: asked with Bearer the key\n" in shared("upstream").log
    assert "reader's" not in shared("upstream").log


def test_nobody_listens_upstream(serve: Serve) -> None:
    relay = serve(RECIPE, f"http://127.0.0.1:{free_port()}")
    for stream in (True, False):
        _, error = read(relay, asked(stream=stream))
        assert isinstance(error, openai.InternalServerError)
        assert error.status_code == 502
    with pytest.raises(openai.InternalServerError, match="upstream"):
        client_of(relay).models.list()


def test_the_models_of_an_upstream(shared: Shared, serve: Serve) -> None:
    models = client_of(shared("relay")).models.list()
    assert "is whole" in [model.id for model in models]
    relay = serve(RECIPE, f"{shared('upstream').url}/html")
    with pytest.raises(openai.InternalServerError, match="none of this API"):
        client_of(relay).models.list()


def test_a_silent_stream_is_kept_alive(shared: Shared) -> None:
    """Also before the upstream has said anything: what then goes wrong is an event."""
    relay = shared("relay that keeps alive")
    for fault in ("is silent", "falls silent"):
        with raw_post(relay, asked(model=fault, stream=True)) as reader:
            received = b""
            while received.count(b": keep-alive\n\n") < 3:
                received += reader.recv(65536)
        assert received.startswith(b"HTTP/1.1 200 OK\r\n")
    # The package does not mind.
    text, error = read(relay, asked(model="thinks", stream=True))
    assert (text, error) == ("One two", None)


# The server is stopped ----------------------------------------------------------------------------


def test_who_reads_when_the_server_is_stopped_is_told(serve: Serve) -> None:
    server = serve(RECIPE, SECONDS_PER_TOKEN=60 / LONG)
    question = asked(long_question("stopped"), stream=True)
    stream = client_of(server).chat.completions.create(**question)
    with raw_post(server, question) as reader:
        received = b""
        while received.count(b"data: ") < 3:
            received += reader.recv(65536)
        server.signal(signal.SIGTERM)
        with pytest.raises(openai.APIError, match="The server is stopping") as raised:
            list(stream)
        assert type(raised.value) is openai.APIError  # no connection that broke
        while data := reader.recv(65536):
            received += data
    assert received.endswith(b"\r\n0\r\n\r\n")  # the proper end of the body
    assert b"[DONE]" not in received
    server.wait()
    assert "Traceback" not in server.log


def test_a_whole_answer_is_given_before_the_server_stops(serve: Serve) -> None:
    server = serve(RECIPE, SECONDS_PER_TOKEN=0.05)
    with ThreadPoolExecutor() as threads:
        answer = threads.submit(read, server, asked(stream=False))
        server.wait_for_log("the parrot begins")
        server.signal(signal.SIGTERM)
        assert answer.result() == (ANSWER, None)
    server.wait()


def test_an_answer_that_is_cut_does_not_look_whole(serve: Serve) -> None:
    server = serve(RECIPE, SECONDS_PER_TOKEN=60 / LONG)
    question = asked(long_question("killed"), stream=True)
    stream = client_of(server).chat.completions.create(**question)
    next(stream)
    server.kill()
    with pytest.raises(openai.APIConnectionError):
        list(stream)
