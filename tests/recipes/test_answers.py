"""recipes/answers.py as the `openai` package and an EventSource read it, in memory."""

import asyncio
import json
import re
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import openai
import psutil
import pytest

from tests.support.answers import ALL, Ask, asked, events_of, text_of, words
from tests.support.event_sources import EventSource, event_sources
from tests.support.processes import LIMIT, Process, wait_for


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Process]:
    with Ask(tmp_path_factory.mktemp("answers")) as ask:
        yield ask.serve()


@pytest.fixture
def client(server: Process) -> openai.OpenAI:
    return asked(server)


def test_all_events_of_an_answer(client: openai.OpenAI) -> None:
    text = "Hello, <b>world</b>! ☕"
    stream = client.responses.create(
        model="parrot", input=text, stream=True, background=True, metadata={"a": "b"}
    )
    events = list(stream)
    assert [event.sequence_number for event in events] == list(range(len(events)))
    kinds = [event.type.removeprefix("response.") for event in events]
    deltas = kinds.count("output_text.delta")
    assert kinds == [*ALL[:4], *["output_text.delta"] * deltas, *ALL[4:]]
    assert deltas > 5
    assert text_of(events) == text
    (last,) = events[-1:]
    assert last.type == "response.completed"
    assert last.response.output_text == text
    assert last.response.metadata == {"a": "b"}
    assert client.responses.retrieve(last.response.id) == last.response
    # The package's own way to put an answer together finds nothing wrong.
    with client.responses.stream(model="parrot", input=text) as parts:
        assert parts.get_final_response().output_text == text


def test_resumed_from_any_event(client: openai.OpenAI) -> None:
    response = client.responses.create(model="parrot", input=words(15), background=True)
    assert response.status == "in_progress"
    whole = events_of(client, response.id)
    assert whole[-1]["response"]["output"][0]["content"][0]["text"] == words(15)
    for after in range(len(whole)):
        assert events_of(client, response.id, after) == whole[after + 1 :]
    for after in (len(whole), 10**6):
        assert events_of(client, response.id, after) == []


def test_asynchronously(server: Process) -> None:
    async def read() -> None:
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none") as client:
            stream = await client.responses.create(
                model="parrot", input=words(30), stream=True, background=True
            )
            first: list[Any] = []
            async for event in stream:
                first.append(event)
                if event.sequence_number == 10:
                    break  # the reader leaves, the answer goes on
            await stream.close()
            response_id = first[0].response.id
            rest = [
                event
                async for event in await client.responses.retrieve(
                    response_id, stream=True, starting_after=10
                )
            ]
            assert text_of(first + rest) == words(30)
            assert (await client.responses.cancel(response_id)).status == "completed"
            await client.responses.delete(response_id)
            with pytest.raises(openai.NotFoundError):
                await client.responses.retrieve(response_id)

    asyncio.run(read())


def test_without_a_stream(client: openai.OpenAI) -> None:
    parts = [{"type": "input_text", "text": "one"}, {"type": "input_text", "text": "two"}]
    conversation: Any = [
        {"role": "user", "content": "before"},
        {"role": "assistant", "content": [{"type": "output_text", "text": "yes?"}]},
        {"role": "user", "content": parts},
    ]
    response = client.responses.create(model="parrot", input=conversation, instructions="Be brief.")
    assert (response.status, response.output_text) == ("completed", "one\ntwo")
    assert response.instructions == "Be brief."
    assert response.background is False


def test_at_the_limit_it_is_incomplete(client: openai.OpenAI) -> None:
    response = client.responses.create(model="parrot", input=words(9), max_output_tokens=3)
    assert (response.status, response.output_text) == ("incomplete", words(3))
    assert response.incomplete_details
    assert response.incomplete_details.reason == "max_output_tokens"
    # As many as it may have are not too many.
    response = client.responses.create(model="parrot", input=words(3), max_output_tokens=3)
    assert response.status == "completed"


def test_stopped(client: openai.OpenAI, server: Process) -> None:
    before = len(re.findall("the parrot stopped", server.log))
    response = client.responses.create(model="parrot", input=words(5000), background=True)
    came: list[Any] = []
    stream = client.responses.retrieve(response.id, stream=True)
    for event in stream:
        came.append(event)
        if event.sequence_number == 20:
            stopped = client.responses.cancel(response.id)
            assert stopped.status == "cancelled"
            assert words(5000).startswith(stopped.output_text)
    assert came[-1].response == stopped
    assert text_of(came) == stopped.output_text
    assert client.responses.cancel(response.id) == client.responses.retrieve(response.id) == stopped
    wait_for(lambda: len(re.findall("the parrot stopped", server.log)) > before, "the model")


@pytest.mark.parametrize("stream", [True, False])
def test_what_is_not_in_the_background_stops_with_its_reader(server: Process, stream: bool) -> None:
    before = len(re.findall("the parrot stopped", server.log))
    body = {"model": "parrot", "input": words(5000), "stream": stream}
    with httpx.stream("POST", f"{server.url}/v1/responses", json=body) as answer:
        assert answer.status_code == 200
        if stream:
            next(answer.iter_raw())
    wait_for(lambda: len(re.findall("the parrot stopped", server.log)) > before, "the model")


def test_deleted_while_it_is_made(client: openai.OpenAI, server: Process) -> None:
    before = len(re.findall("the parrot stopped", server.log))
    response = client.responses.create(model="parrot", input=words(5000), background=True)
    stream = client.responses.retrieve(response.id, stream=True)
    next(stream)
    client.responses.delete(response.id)
    assert [*stream][-1].response.status == "cancelled"
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(response.id)
    wait_for(lambda: len(re.findall("the parrot stopped", server.log)) > before, "the model")


def more_than(reader: EventSource, count: int) -> bool:
    return len(reader.events) > count


def test_an_event_source(client: openai.OpenAI, server: Process) -> None:
    response = client.responses.create(model="parrot", input=words(60), background=True)
    with event_sources() as sources:
        path = f"/v1/responses/{response.id}?stream=true"
        (reader,) = sources.open(server.port, path=path)
        for count in (5, 20, 40):
            wait_for(partial(more_than, reader, count), "events")
            sources.reset(reader)
        wait_for(lambda: reader.status == 204, "the end")
    numbers = [json.loads(event.data)["sequence_number"] for event in reader.events]
    assert numbers == [int(event.id) for event in reader.events] == list(range(len(numbers)))
    assert reader.events[-1].name == "response.completed"
    assert reader.opened >= 4


def test_headers(client: openai.OpenAI, server: Process) -> None:
    response = client.responses.create(model="parrot", input="a", background=True)
    url = f"{server.url}/v1/responses/{response.id}?stream=true"
    for headers in ({}, {"Last-Event-ID": ""}, {"Last-Event-ID": "3"}, {"Last-Event-ID": "999"}):
        answer = httpx.get(url, headers=headers)
        assert answer.status_code == (204 if "999" in headers.values() else 200)
        assert answer.headers["cache-control"] == "no-cache, no-transform"
        assert answer.headers["x-accel-buffering"] == "no"
        if answer.status_code == 200:
            assert answer.headers["content-type"].startswith("text/event-stream")
            first = 4 if "3" in headers.values() else 0
            assert answer.text.partition("\n")[2].startswith(f"id: {first}\n")


WRONG: list[tuple[int, str, str, dict[str, Any]]] = [
    (400, "POST", "", {"json": {"model": "parrot"}}),
    (400, "POST", "", {"json": {"model": "parrot", "input": None}}),
    (400, "POST", "", {"json": {"model": "parrot", "input": 5}}),
    (400, "POST", "", {"json": {"model": "parrot", "input": []}}),
    (400, "POST", "", {"json": {"model": "parrot", "input": ""}}),
    (400, "POST", "", {"json": {"model": "parrot", "input": [{"role": "nobody", "content": "x"}]}}),
    (400, "POST", "", {"json": {"model": "parrot", "input": [{"type": "input_image"}]}}),
    (400, "POST", "", {"json": {"model": "parrot", "input": "x", "max_output_tokens": 0}}),
    (400, "POST", "", {"json": {"model": "parrot", "input": "x", "metadata": {"a": 1}}}),
    (400, "POST", "", {"json": {"model": "parrot", "input": "x", "tools": [{"type": "x"}]}}),
    (400, "POST", "", {"json": {"model": "parrot", "input": "x", "previous_response_id": "y"}}),
    (400, "POST", "", {"json": ["x"]}),
    (400, "POST", "", {"content": b"{"}),
    (400, "POST", "", {"content": b'{"model": "parrot", "input": NaN}'}),
    (404, "POST", "", {"content": b'{"model": "\\ud800", "input": "x"}'}),
    (
        400,
        "POST",
        "",
        {"content": b'{"model": "parrot", "input": "x", "max_output_tokens": 1e400}'},
    ),
    (400, "POST", "", {"content": b'{"input": ' + b"[" * 100_000}),
    (400, "POST", "", {"content": b'{"max_output_tokens": ' + b"9" * 5000 + b"}"}),
    (400, "POST", "", {"content": b"\xff"}),
    (413, "POST", "", {"content": b'{"model": "' + b"x" * 2**20}),
    (404, "POST", "", {"json": {"model": "other", "input": "x"}}),
    (404, "GET", "/resp_0", {}),
    (404, "GET", f"/resp_{'0' * 32}", {}),
    (404, "GET", f"/resp_{'0' * 32}?stream=true", {}),
    (404, "GET", "/%00%ff", {}),
    (404, "POST", f"/resp_{'0' * 32}/cancel", {}),
    (404, "DELETE", f"/resp_{'0' * 32}", {}),
    (400, "GET", "/ID?stream=perhaps", {}),
    (400, "GET", "/ID?stream=true&starting_after=-1", {}),
    (400, "GET", "/ID?stream=true&starting_after=x", {}),
    (400, "GET", f"/ID?stream=true&starting_after={'9' * 5000}", {}),
    (400, "GET", "/ID?stream=true", {"headers": {"Last-Event-ID": "x"}}),
    (400, "GET", "/ID?stream=true", {"headers": {"Last-Event-ID": "9" * 5000}}),
    (405, "PUT", "/ID", {}),
]


def test_bad_input(client: openai.OpenAI, server: Process) -> None:
    response = client.responses.create(model="parrot", input="a", background=True)
    for status, method, path, options in WRONG:
        headers = {"Content-Type": "application/json", **options.get("headers", {})}
        url = f"{server.url}/v1/responses{path.replace('ID', response.id)}"
        answer = httpx.request(method, url, **{**options, "headers": headers})
        assert answer.status_code == status, (method, path, options, answer.text)
        error = answer.json()["error"]
        assert error["message"]
        assert error["type"] == "invalid_request_error"
    with pytest.raises(openai.NotFoundError, match="`other` does not exist"):
        client.responses.create(model="other", input="x")
    with pytest.raises(openai.BadRequestError, match="input"):
        client.responses.create(model="parrot", input=[])
    assert "Traceback" not in server.log


def test_half_of_a_surrogate_pair_is_said_again(server: Process) -> None:
    body = b'{"model": "parrot", "input": "\\ud83d \\ud800"}'
    headers = {"Content-Type": "application/json"}
    answer = httpx.post(f"{server.url}/v1/responses", content=body, headers=headers)
    assert json.loads(answer.text)["output"][0]["content"][0]["text"] == "\ud83d \ud800"


def test_silence_is_told_with_comments(tmp_path: Path) -> None:
    with Ask(tmp_path) as ask:
        constants = {"answers.SILENCE": 0.1, "parrot.SECONDS_PER_TOKEN": 1.0}
        server = ask.serve(constants=constants)
        body = {"model": "parrot", "input": "one two", "stream": True}
        with httpx.stream("POST", f"{server.url}/v1/responses", json=body) as answer:
            text = "".join(answer.iter_text())
        assert text.count(": keep-alive\n") > 5
        del body["stream"]
        answer = httpx.post(f"{server.url}/v1/responses", json=body, timeout=LIMIT)
        assert answer.text.startswith("\n\n")  # so nobody on the way takes it for dead
        client = asked(server)
        assert client.responses.create(model="parrot", input="a b").output_text == "a b"
        stream: Any = client.responses.create(model="parrot", input="a b", stream=True)
        assert text_of(list(stream)) == "a b"


def test_an_answer_is_forgotten_after_a_while_and_memory_is_given_back(tmp_path: Path) -> None:
    with Ask(tmp_path) as ask:
        constants = {"answers.KEEP": 1, "parrot.SECONDS_PER_TOKEN": 0}
        server = ask.serve(constants=constants)
        client = asked(server)
        kept = client.responses.create(model="parrot", input=words(20))

        def make(count: int) -> None:
            with httpx.Client() as session, ThreadPoolExecutor(8) as pool:
                body = {"model": "parrot", "input": words(20), "background": True}
                url = f"{server.url}/v1/responses"
                for answer in pool.map(lambda _: session.post(url, json=body), range(count)):
                    assert answer.status_code == 200

        def memory() -> int:
            return int(psutil.Process(server.pid).memory_info().rss)

        make(1000)
        before = memory()
        make(3000)
        with pytest.raises(openai.NotFoundError):
            wait_for(lambda: not client.responses.retrieve(kept.id), "it to be forgotten")
        assert memory() < before + 20_000_000


def test_a_server_that_is_stopped_tells_its_readers(tmp_path: Path) -> None:
    with Ask(tmp_path) as ask:
        server = ask.serve()
        client = asked(server)
        response = client.responses.create(model="parrot", input=words(5000), background=True)
        url = f"{server.url}/v1/responses/{response.id}?stream=true"
        with httpx.stream("GET", url) as answer:
            pieces = answer.iter_raw()
            next(pieces)
            server.signal(signal.SIGTERM)
            for _ in pieces:  # ends properly: nothing is raised
                pass
        server.wait()
        assert "Traceback" not in server.log


def test_what_is_not_in_the_background_is_finished_by_a_server_that_stops(tmp_path: Path) -> None:
    with Ask(tmp_path) as ask:
        server = ask.serve()
        with asked(server).responses.stream(model="parrot", input=words(60)) as stream:
            next(stream)
            server.signal(signal.SIGTERM)
            assert stream.get_final_response().output_text == words(60)
        server.wait()


@pytest.mark.parametrize(
    ("name", "value", "should"),
    [
        ("REDIS_URL", "localhost:secret", "should be like redis://"),
        ("REDIS_URL", "redis://:secret/word@host", "should be like redis://"),
        ("REDIS_URL", "redis://:secret@host?no=option", "should be like redis://"),
        ("UPSTREAM_URL", "secret", "must be an address such as https://"),
    ],
)
def test_a_wrong_setting_is_told_at_the_start(
    tmp_path: Path, name: str, value: str, should: str
) -> None:
    with Ask(tmp_path) as ask, pytest.raises(pytest.fail.Exception) as told:
        ask.serve(environment={name: value})
    said = str(told.value)
    assert f"{name} {should}" in said
    assert "secret" not in said
    assert "Traceback" not in said


def test_settings_that_are_empty_are_unset(tmp_path: Path) -> None:
    with Ask(tmp_path) as ask:
        server = ask.serve(environment={"REDIS_URL": "", "UPSTREAM_URL": "", "UPSTREAM_KEY": ""})
        assert asked(server).responses.create(model="parrot", input="a b").output_text == "a b"
