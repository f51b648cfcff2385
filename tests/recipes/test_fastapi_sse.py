"""recipes/fastapi_sse.py: what it sends, and what fastapi_sse.md says of FastAPI."""

import re
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import requests

from main import HEADERS
from tests.support.browsers import Browser
from tests.support.processes import LIMIT, ROOT, Process, Start, starting, wait_for
from tests.support.raw_reader import RawReader, read_until, wait_until_idle
from tests.support.recipes import start_app, start_recipe

CUP, POT, SPOON = (
    '{"name":"cup","price":2.5}',
    '{"name":"pot","price":19.0}',
    '{"name":"spoon","price":1.2}',
)
ITEMS = "".join(f"data: {item}\n\n" for item in (CUP, POT, SPOON))
HELLO = ": come again after a second\nretry: 1000\n\n"
EVENTS = [f"event: item\ndata: {item}\nid: {i}\n\n" for i, item in enumerate((CUP, POT, SPOON))]
BODIES = {
    "/items/stream": ITEMS,
    "/items/sync": ITEMS,
    "/items/events": HELLO + "".join(EVENTS),
    "/items/raw": "data: text, on\ndata: two lines\n\n"
    "event: html\ndata: <p>A <b>cup</b></p>\n\ndata: cup,2.50\n\n",
    "/items/mixed": 'data: {"item": {"name": "cup", "price": 2.5}, '
    '"shelf": {"room": "kitchen", "number": 3}, "next": "pot"}\n\n',
}


@pytest.fixture
def server(start: Start, tmp_path: Path) -> Process:
    return start_recipe(start, "recipes.fastapi_sse", tmp_path)


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Process]:
    folder = tmp_path_factory.mktemp("fastapi_sse")
    with starting(folder) as start:
        yield start_recipe(start, "recipes.fastapi_sse", folder)


def test_what_each_path_sends(shared: Process) -> None:
    for path, body in BODIES.items():
        assert requests.get(shared.url + path, timeout=LIMIT).text == body


def test_a_post_names_the_items(shared: Process) -> None:
    names = {"names": ["spoon", "cup", "spoon"]}
    response = requests.post(f"{shared.url}/items/stream", json=names, timeout=LIMIT)
    assert HEADERS.items() <= response.headers.items()
    assert response.text == f"data: {SPOON}\n\ndata: {CUP}\n\ndata: {SPOON}\n\n"
    for wrong in ([], ["cup"] * 101, ["cap"]):
        response = requests.post(f"{shared.url}/items/stream", json={"names": wrong}, timeout=LIMIT)
        assert response.status_code == 422


def test_resumes_after_the_last_event_until_nothing_is_left(shared: Process) -> None:
    def after(last: str) -> requests.Response:
        return requests.get(
            f"{shared.url}/items/events", headers={"Last-Event-ID": last}, timeout=LIMIT
        )

    for last in ("0", "1", "001"):
        assert after(last).text == HELLO + "".join(EVENTS[int(last) + 1 :])
    assert after("").text == HELLO + "".join(EVENTS)
    for last in ("2", "3", "9" * 18):
        response = after(last)
        assert (response.status_code, response.content) == (204, b"")
        assert HEADERS.items() <= response.headers.items()
    for last in ("-1", "+1", "1.0", "1_0", "1e0", "9" * 19, "9" * 4000, "cup", "½"):
        response = after(last.encode("latin-1"))  # type: ignore[arg-type]
        assert response.status_code == 422
        assert response.json()["detail"][0]["loc"] == ["header", "last-event-id"]


def test_docs_show_the_items(shared: Process) -> None:
    schema = requests.get(f"{shared.url}/openapi.json", timeout=LIMIT).json()
    for path, method in (("stream", "get"), ("stream", "post"), ("sync", "get"), ("slow", "get")):
        ok = schema["paths"][f"/items/{path}"][method]["responses"]["200"]
        data = ok["content"]["text/event-stream"]["itemSchema"]["properties"]["data"]
        assert data["contentSchema"] == {"$ref": "#/components/schemas/Item"}
    assert set(schema["components"]["schemas"]["Item"]["properties"]) == {"name", "price"}
    assert "204" in schema["paths"]["/items/events"]["get"]["responses"]


def test_streams_end_properly_when_the_server_stops(server: Process) -> None:
    paths = ["/items/slow", "/items/sync", "/items/events"]
    readers = [RawReader(server.port, path) for path in paths * 3]
    assert read_until(readers, lambda: all(b"data" in reader.body for reader in readers))
    server.signal(signal.SIGTERM)
    assert read_until(readers, lambda: all(reader.ended_at for reader in readers))
    for reader in readers:
        assert reader.ended_properly
        assert reader.body.endswith(b"\n\n")
        if reader.path == "/items/slow":  # it was not its own end
            assert reader.body.count(b"data") == 1
    server.wait()
    assert "ERROR" not in server.log


def test_the_catalogue_is_closed_when_the_reader_goes_away(start: Start) -> None:
    server = start_app(start, "tests.recipes.facts:fastapi_sse_app")
    for count, path in enumerate(("/items/stream", "/items/sync", "/items/events"), start=1):
        reader = RawReader(server.port, path)
        assert read_until([reader], lambda: reader.arrivals)  # noqa: B023
        reader.close()
        server.wait_for_log("catalogue closed", count)


def test_an_eventsource_sees_each_item_once_and_stops(browser: Browser, server: Process) -> None:
    browser.open(f"{server.url}/items/mixed")
    browser.run(
        """window.seen = [];
        window.source = new EventSource('/items/events');
        source.addEventListener('item', (event) => seen.push([event.lastEventId, event.data]))
        """
    )
    wait_for(lambda: browser.run("return source.readyState") == 2, "the source to be closed")
    assert browser.run("return seen") == [["0", CUP], ["1", POT], ["2", SPOON]]
    assert '"GET /items/events HTTP/1.1" 204' in server.log


# What the README says of FastAPI ------------------------------------------------------------------


def test_what_is_left_to_the_garbage_collection_and_what_becomes_of_errors(start: Start) -> None:
    facts = start_app(start, "tests.recipes.facts:app")
    # A sync generator, of a `StreamingResponse` too. An async one whose reader was slow, which
    # puts an error in the log.
    for count, path in enumerate(("/left-alone", "/sync", "/async"), start=1):
        reader = RawReader(facts.port, path, receive_buffer=4096)
        assert read_until([reader], lambda: reader.arrivals)  # noqa: B023
        if path == "/async":
            wait_until_idle(facts)  # it waits for the reader
        assert "ERROR" not in facts.log
        reader.close()
        facts.wait_for_log("resource closed", count)
        assert facts.log.count("generator closed") == count - 1
        requests.get(f"{facts.url}/collect", timeout=LIMIT)
        facts.wait_for_log("generator closed", count)
    facts.wait_for_log("BrokenResourceError")

    for path in ("/raises", "/wrong-type"):  # an error in the generator cuts the stream
        reader = RawReader(facts.port, path)
        assert read_until([reader], lambda: reader.ended_at)  # noqa: B023
        assert reader.status == 200
        assert not reader.ended_properly
    for last in ("+1", "-1", "9" * 20):  # an `int` takes ids that no event has
        headers = {"Last-Event-ID": last}
        assert requests.get(f"{facts.url}/int", headers=headers, timeout=LIMIT).json() == int(last)
    for value in ("NaN", "1e400", '"\\ud800"'):  # its 422 cannot repeat them
        response = requests.post(
            f"{facts.url}/body",
            data=f'{{"names": [{value}]}}',
            headers={"Content-Type": "application/json"},
            timeout=LIMIT,
        )
        assert response.status_code == 500


def test_the_price_is_the_one_that_was_measured() -> None:
    results = (ROOT / "bench" / "results.md").read_text()
    ours, fastapis = (
        float(re.findall(rf"^\| {name} \| (\d+)", results, re.MULTILINE)[0])
        for name in ("main.py /sse", "FastAPI EventSourceResponse")
    )
    assert 7 < fastapis / ours < 15, "fastapi_sse.md says ten times"
