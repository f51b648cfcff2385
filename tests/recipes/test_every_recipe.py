"""What every recipe promises: its page's policy, and bad input that is never a 500 or a hang.

The requests come from the recipe's own schema, /openapi.json. Of a good answer only the headers are
waited for, since it may be a stream without an end; a fault behind them is in the server's log.
"""

import itertools
import json
import re
import shutil
import socket
import sys
from collections.abc import Callable, Iterator
from typing import Any
from urllib.error import HTTPError
from urllib.parse import quote
from urllib.request import Request, urlopen

import pytest
import requests
import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis import GenerationMode

from main import HEADERS
from recipes.common import PAGE_HEADERS
from tests.support.processes import ENVIRONMENT, LIMIT, ROOT, Process, starting
from tests.support.recipes import RECIPES

SLOW_MACHINE = settings(deadline=None, suppress_health_check=list(HealthCheck), database=None)

# In place of a value in a JSON body, or of the whole.
JSON = [
    *("NaN", "-Infinity", "1e400", "-1", "1.5", "9" * 20, "9" * 5000),
    *("null", "true", "[]", "{}", "[" * 20_000 + "]" * 20_000),
    *('"\\ud800"', '{"\\ud800": NaN}', '"\\u0000"', '"\\r\\n"', '"☕"', '""'),
    '"' + "x" * 100_000 + '"',
]
# In place of a parameter in a path, a query or a header.
TEXTS = [
    *("", "-1", "+1", "1_0", "1.5", "1e400", "NaN", "Infinity", "9" * 20, "9" * 4400),
    *("\0", "\r\nx: y", "☕", "½", "../..", "a b", "x" * 10_000),
]


@pytest.fixture(
    scope="module",
    params=[pytest.param(name, marks=pytest.mark.xdist_group(name)) for name in RECIPES],
)
def server(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Process]:
    """Each variable is set, to nothing, which counts as unset.

    In a copy, because each recipe makes its own files then.
    """
    folder = tmp_path_factory.mktemp("server")
    ignored = shutil.ignore_patterns("__pycache__", "*.db*", "*.sqlite*", "*.log")
    shutil.copytree(ROOT / "recipes", folder / "recipes", ignore=ignored)
    shutil.copy(ROOT / "main.py", folder)
    sources = "".join(file.read_text() for file in (ROOT / "recipes").glob("*.py"))
    names = set(re.findall(r"""environ(?:\.get\(|\[)["'](\w+)""", sources))
    assert "DATABASE_URL" in names
    command = (sys.executable, "-m", "uvicorn", f"{request.param}:app", "--port", "{port}")
    with starting(folder) as start:
        server = start(*command, cwd=folder, env=ENVIRONMENT | dict.fromkeys(names, ""))
        yield server
        requests.get(f"{server.url}/openapi.json", timeout=LIMIT).raise_for_status()
        # FastAPI logs an error of its own when a reader goes away that is not waited for:
        # https://github.com/fastapi/fastapi/discussions/15725
        faults = server.log.count("Exception in ASGI application")
        assert faults == server.log.count("anyio.BrokenResourceError"), server.log


def test_nothing_of_its_page_is_inline_and_the_policy_says_so(server: Process) -> None:
    index = requests.get(server.url, timeout=LIMIT)
    if index.url == f"{server.url}/docs":  # it has no page
        return
    assert not re.search("<style|style=|<script>| on[a-z]+=", index.text)
    assets = re.findall(r'(?:src|href)="/?(pages/[^"]+)"', index.text)
    assert assets
    for answer in (index, *(requests.get(f"{server.url}/{a}", timeout=LIMIT) for a in assets)):
        assert answer.status_code == 200
        assert {name: answer.headers[name] for name in PAGE_HEADERS} == PAGE_HEADERS


def operations(server: Process) -> list[Any]:
    schema: Any = schemathesis.openapi.from_url(f"{server.url}/openapi.json")
    return [result.ok() for result in schema.get_all_operations()]


def answer(**request: Any) -> None:
    with requests.request(**request, stream=True, allow_redirects=False, timeout=LIMIT) as response:
        assert response.status_code < 500, response.text
        if response.status_code >= 400:
            response.json()


def try_on(operation: Any, examples: int, check: Callable[[dict[str, Any]], None]) -> None:
    """Call `check` with good requests for this operation, as `requests.request` takes them."""

    @given(case=operation.as_strategy(generation_mode=GenerationMode.POSITIVE))
    @settings(SLOW_MACHINE, max_examples=examples)
    def test(case: Any) -> None:
        check(case.as_transport_kwargs())

    test()


def test_good_requests_by_machine(server: Process) -> None:
    for operation in operations(server):
        try_on(operation, 10, lambda request: answer(**request))


def test_bad_requests_from_a_list(server: Process) -> None:
    """Each value in place of each parameter and each field of a good request."""
    for operation in operations(server):

        def check(good: dict[str, Any], operation: Any = operation) -> None:
            for request in worse(good, operation):
                answer(**request)

        try_on(operation, 1, check)


def worse(good: dict[str, Any], operation: Any) -> Iterator[dict[str, Any]]:
    """Yield the request with one thing in it wrong."""
    for parameter, text in itertools.product(operation.iter_parameters(), TEXTS):
        if parameter.location == "path":
            path = re.sub("{.*?}", quote(text, safe=""), operation.path)
            yield {**good, "url": operation.base_url + path}
        elif parameter.location == "query":
            yield {**good, "params": {**good["params"], parameter.name: text}}
        elif text.isprintable() and text.isascii():  # all that a header can hold
            yield {**good, "headers": {**good["headers"], parameter.name: text}}
    if "json" not in good:
        return
    body = good.pop("json")
    schema = operation.definition.raw["requestBody"]["content"]["application/json"]["schema"]
    name = schema["$ref"].rpartition("/")[2]
    fields = operation.schema.raw_schema["components"]["schemas"][name]["properties"]
    for field, value in itertools.product(fields, JSON):
        data = json.dumps({**body, field: "HERE"}).replace('"HERE"', value).encode()
        yield {**good, "data": data}
    for whole in (*map(str.encode, JSON), b"", b"{", b"\xff"):
        yield {**good, "data": whole}
    for data in (json.dumps(body).encode(), b"\xff"):
        yield {**good, "data": data, "headers": {"Content-Type": "text/plain"}}


# The kinds that the lists do not have -------------------------------------------------------------


@pytest.mark.parametrize("how", ["Content-Length: 60000000", "Transfer-Encoding: chunked"])
def test_a_large_body_is_refused_before_it_is_in_memory(server: Process, how: str) -> None:
    """The rest of it never comes. The answer looks like the recipe's other errors."""
    part = b" " * 250_000
    for operation in operations(server):
        if operation.method.upper() != "POST":
            continue
        path = re.sub("{.*?}", "x", operation.path)
        head = f"POST {path} HTTP/1.1\r\nHost: test\r\nContent-Type: application/json\r\n{how}\r\n"
        with socket.create_connection(("127.0.0.1", server.port), LIMIT) as connection:
            connection.sendall(f"{head}\r\n".encode())
            for _ in range(5):
                connection.sendall(
                    b"%x\r\n%b\r\n" % (len(part), part) if "chunked" in how else b"x"
                )
            answer = b""
            while b"}" not in answer:
                data = connection.recv(65536)
                assert data, answer
                answer += data
        # What does not exist is told before the body is read.
        assert answer.startswith((b"HTTP/1.1 413 ", b"HTTP/1.1 404 ")), operation.path
        assert b'{"detail":' in answer or b'{"error":' in answer


def test_who_sends_all_of_a_large_body_before_reading_gets_the_413(server: Process) -> None:
    """As urllib does, which also says `Connection: close`."""
    for operation in operations(server):
        # (To cancel an answer needs no body, and nobody reads one.)
        if operation.method.upper() == "POST" and not operation.path.endswith("/cancel"):
            url = server.url + re.sub("{.*?}", "x", operation.path)
            for body in (b" " * 10_000_000, iter([b" " * 1_000_000] * 10)):  # the latter is chunked
                with pytest.raises(HTTPError) as told:
                    urlopen(Request(url, body, {"Content-Type": "application/json"}), timeout=LIMIT)
                assert told.value.code in (404, 413), operation.path


def test_the_headers_of_streams_and_an_empty_last_event_id(server: Process) -> None:
    """An empty one counts as absent."""
    for operation in operations(server):
        if operation.method.upper() != "GET":
            continue
        url = server.url + re.sub("{.*?}", "x", operation.path)
        statuses = set()
        for headers in ({}, {"Last-Event-ID": ""}):
            with requests.get(url, headers=headers, stream=True, timeout=LIMIT) as response:
                statuses.add(response.status_code)
                if response.headers.get("Content-Type", "").startswith("text/event-stream"):
                    # Each of them once, or a reader of the first alone would miss the second.
                    for name, value in HEADERS.items():
                        assert response.raw.headers.getlist(name) == [value], operation.path
        assert len(statuses) == 1, operation.path
