"""recipes/answers.py as the `openai` package and an EventSource read it, in memory."""

import asyncio
import json
import re
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import openai
import psutil
import pytest

from tests.support.answers import asked, events_of, http, serve, text_of, words
from tests.support.event_sources import EventSource, event_sources
from tests.support.processes import Process, Start, starting, wait_for

pytestmark = pytest.mark.xdist_group("answers")  # so there is one `server`
# The events of an answer around its text.
BEFORE = ["created", "in_progress", "output_item.added", "content_part.added"]
AFTER = ["output_text.done", "content_part.done", "output_item.done", "completed"]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Process]:
    """The time from one token to the next counts as silence: readers see many comments."""
    with starting(tmp_path_factory.mktemp("answers")) as start:
        yield serve(start, answers__SILENCE=0.01)


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
    assert kinds == [*BEFORE, *["output_text.delta"] * deltas, *AFTER]
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


@pytest.fixture
def stops(server: Process) -> Iterator[None]:
    """At the end of the test, one more model has stopped."""
    before = server.log.count("the parrot stopped")
    yield
    wait_for(lambda: server.log.count("the parrot stopped") > before, "the model to stop")


@pytest.mark.usefixtures("stops")
def test_stopped(client: openai.OpenAI) -> None:
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


@pytest.mark.usefixtures("stops")
@pytest.mark.parametrize("stream", [True, False])
def test_what_is_not_in_the_background_stops_with_its_reader(server: Process, stream: bool) -> None:
    body = {"model": "parrot", "input": words(5000), "stream": stream}
    with http.stream("POST", f"{server.url}/v1/responses", json=body) as answer:
        assert answer.status_code == 200
        if stream:
            next(answer.iter_raw())


@pytest.mark.usefixtures("stops")
def test_deleted_while_it_is_made(client: openai.OpenAI) -> None:
    response = client.responses.create(model="parrot", input=words(5000), background=True)
    stream = client.responses.retrieve(response.id, stream=True)
    next(stream)
    client.responses.delete(response.id)
    assert [*stream][-1].response.status == "cancelled"
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(response.id)


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
    response = client.responses.create(model="parrot", input="a")
    url = f"{server.url}/v1/responses/{response.id}?stream=true"
    for last_event_id, status, first in (("", 200, 0), ("3", 200, 4), ("999", 204, None)):
        answer = http.get(url, headers={"Last-Event-ID": last_event_id})
        assert answer.status_code == status
        assert answer.headers["cache-control"] == "no-cache, no-transform"
        assert answer.headers["x-accel-buffering"] == "no"
        if status == 200:
            assert answer.headers["content-type"].startswith("text/event-stream")
            assert re.findall("^id: (.*)", answer.text, re.MULTILINE)[0] == str(first)


def test_silence_is_told_with_comments(server: Process) -> None:
    """The `openai` package and an EventSource read on, as the other tests see."""
    body = {"model": "parrot", "input": words(20), "stream": True}
    answer = http.post(f"{server.url}/v1/responses", json=body)
    assert answer.text.count(": keep-alive\n") > 5
    answer = http.post(f"{server.url}/v1/responses", json=body | {"stream": False})
    assert answer.text.startswith("\n\n")  # so nobody on the way takes it for dead
    assert answer.json()["status"] == "completed"


NOBODY = f"/resp_{'0' * 32}"
WRONG_QUESTIONS: list[dict[str, Any]] = [
    {"input": None},
    {"input": 5},
    {"input": []},
    {"input": ""},
    {"input": [{"role": "nobody", "content": "x"}]},
    {"input": [{"type": "input_image"}]},
    {"max_output_tokens": 0},
    {"metadata": {"a": 1}},
    # These would change the answer.
    {"tools": [{"type": "x"}]},
    {"previous_response_id": "y"},
    {"conversation": "y"},
]
WRONG: list[tuple[int, str, str, Any]] = [
    *((400, "POST", "", {"model": "parrot", "input": "x", **wrong}) for wrong in WRONG_QUESTIONS),
    (404, "POST", "", {"model": "other", "input": "x"}),
    (404, "POST", "", {"model": "\ud800", "input": "x"}),
    (404, "GET", NOBODY, None),
    (404, "GET", f"{NOBODY}?stream=true", None),
    (404, "POST", f"{NOBODY}/cancel", None),
    (404, "DELETE", NOBODY, None),
    (400, "GET", "/ID?stream=perhaps", None),
    (400, "GET", "/ID?stream=true&starting_after=-1", None),
    (405, "PUT", "/ID", None),
]


def test_bad_input(client: openai.OpenAI, server: Process) -> None:
    """What is wrong in any recipe is in test_every_recipe.py."""
    response = client.responses.create(model="parrot", input="a", background=True)
    for status, method, path, body in WRONG:
        url = f"{server.url}/v1/responses{path.replace('ID', response.id)}"
        headers = {"Content-Type": "application/json"}
        answer = http.request(method, url, content=json.dumps(body), headers=headers)
        assert answer.status_code == status, (method, path, body, answer.text)
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
    answer = http.post(f"{server.url}/v1/responses", content=body, headers=headers)
    assert json.loads(answer.text)["output"][0]["content"][0]["text"] == "\ud83d \ud800"


def test_an_answer_is_forgotten_after_a_while_and_memory_is_given_back(start: Start) -> None:
    server = serve(start, answers__KEEP=0.5)
    body = {"model": "parrot", "input": "x" * 50_000, "background": True}

    def memory_after(answers: int) -> int:
        """Let so many answers be made, and wait until they are forgotten."""
        url = f"{server.url}/v1/responses"
        with ThreadPoolExecutor(8) as pool:
            made = [*pool.map(lambda _: http.post(url, json=body).json()["id"], range(answers))]
        wait_for(lambda: all(http.get(f"{url}/{i}").status_code == 404 for i in made), "the end")
        return int(psutil.Process(server.pid).memory_info().rss)

    before = memory_after(40)
    for _ in range(5):
        after = memory_after(40)
    assert after < before + 20_000_000  # an answer has 250,000 bytes and more


def test_a_server_that_is_stopped(start: Start) -> None:
    """It tells its readers of what goes on, and finishes what does not."""
    server = serve(start)
    client = asked(server)
    response = client.responses.create(model="parrot", input=words(5000), background=True)
    url = f"{server.url}/v1/responses/{response.id}?stream=true"
    with (
        http.stream("GET", url) as answer,
        client.responses.stream(model="parrot", input=words(60)) as stream,
    ):
        pieces = answer.iter_raw()
        next(pieces)
        next(stream)
        server.signal(signal.SIGTERM)
        for _ in pieces:  # ends properly: nothing is raised
            pass
        assert stream.get_final_response().output_text == words(60)
    server.wait()
    assert "Traceback" not in server.log


def test_a_wrong_setting_is_told_at_the_start(start: Start) -> None:
    with pytest.raises(pytest.fail.Exception) as told:
        serve(start, redis="redis://:secret/word@host")
    said = str(told.value)
    assert "REDIS_URL should be like redis://" in said
    assert "secret" not in said
    assert "Traceback" not in said
