"""recipes/fastapi_sse.py: what it sends, and what fastapi_sse.md says of FastAPI."""

import re
import signal
from pathlib import Path

import pytest
import requests

from tests.support.browsers import Browser
from tests.support.processes import LIMIT, ROOT, Process, Start, wait_for
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


def test_what_each_path_sends(server: Process) -> None:
    for path in (*BODIES, "/items/slow"):
        with requests.get(server.url + path, stream=True, timeout=LIMIT) as response:
            assert response.headers["Content-Type"] == "text/event-stream; charset=utf-8"
            assert_stream_headers(response)
            assert path == "/items/slow" or response.text == BODIES[path]


def assert_stream_headers(response: requests.Response) -> None:
    """Each of them once, or a reader of the first alone would miss the second."""
    headers = response.raw.headers
    assert headers.getlist("Cache-Control") == ["no-cache, no-transform"]
    assert headers.getlist("X-Accel-Buffering") == ["no"]


def test_a_post_names_the_items(server: Process) -> None:
    names = {"names": ["spoon", "cup", "spoon"]}
    response = requests.post(f"{server.url}/items/stream", json=names, timeout=LIMIT)
    assert_stream_headers(response)
    assert response.text == f"data: {SPOON}\n\ndata: {CUP}\n\ndata: {SPOON}\n\n"
    for wrong in ([], ["cup"] * 101, ["cap"], "cup", None):
        response = requests.post(f"{server.url}/items/stream", json={"names": wrong}, timeout=LIMIT)
        assert response.status_code == 422


def test_resumes_after_the_last_event_until_nothing_is_left(server: Process) -> None:
    def after(last: str) -> requests.Response:
        return requests.get(
            f"{server.url}/items/events", headers={"Last-Event-ID": last}, timeout=LIMIT
        )

    for last in ("0", "1", "001"):
        assert after(last).text == HELLO + "".join(EVENTS[int(last) + 1 :])
    assert after("").text == HELLO + "".join(EVENTS)
    for last in ("2", "3", "9" * 18):
        response = after(last)
        assert (response.status_code, response.content) == (204, b"")
        assert_stream_headers(response)
    for last in ("-1", "+1", "1.0", "1_0", "1e0", "9" * 19, "9" * 4000, "cup", "½"):
        response = after(last.encode("latin-1"))  # type: ignore[arg-type]
        assert response.status_code == 422
        assert response.json()["detail"][0]["loc"] == ["header", "last-event-id"]


def test_docs_show_the_items(server: Process) -> None:
    schema = requests.get(f"{server.url}/openapi.json", timeout=LIMIT).json()
    for path, method in (("stream", "get"), ("stream", "post"), ("sync", "get"), ("slow", "get")):
        ok = schema["paths"][f"/items/{path}"][method]["responses"]["200"]
        data = ok["content"]["text/event-stream"]["itemSchema"]["properties"]["data"]
        assert data["contentSchema"] == {"$ref": "#/components/schemas/Item"}
    assert set(schema["components"]["schemas"]["Item"]["properties"]) == {"name", "price"}
    assert "204" in schema["paths"]["/items/events"]["get"]["responses"]


def test_streams_end_properly_when_the_server_stops(server: Process) -> None:
    paths = ["/items/slow", "/items/sync", "/items/events"]
    readers = [RawReader(server.port, path) for path in paths * 7]
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


@pytest.fixture
def facts(start: Start) -> Process:
    return start_app(start, "tests.recipes.facts:app")


def test_a_sync_generator_is_left_to_the_garbage_collection(facts: Process) -> None:
    reader = RawReader(facts.port, "/sync")
    assert read_until([reader], lambda: reader.arrivals)
    reader.close()
    facts.wait_for_log("resource closed")
    assert "generator closed" not in facts.log
    requests.get(f"{facts.url}/collect", timeout=LIMIT)
    facts.wait_for_log("generator closed")


def test_so_is_an_async_one_whose_reader_was_slow_and_the_log_has_an_error(facts: Process) -> None:
    reader = RawReader(facts.port, "/async", receive_buffer=4096)
    assert read_until([reader], lambda: reader.arrivals)
    wait_until_idle(facts)  # it waits for the reader
    assert "ERROR" not in facts.log
    reader.close()
    facts.wait_for_log("resource closed")
    facts.wait_for_log("BrokenResourceError")
    assert "generator closed" not in facts.log
    requests.get(f"{facts.url}/collect", timeout=LIMIT)
    facts.wait_for_log("generator closed")


def test_what_becomes_of_errors(facts: Process) -> None:
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
