"""Other people's middlewares around main.py's streams, and protocols behind its `EndStreams`."""

import asyncio

import brotli
import pytest
import requests
from mcp import Client
from openai import AsyncOpenAI

from tests.support.processes import LIMIT, Start, start_app, wait_for
from tests.support.raw_reader import FORMATS, RawReader, event_ids, read_until
from tests.support.stopping import assert_no_error, terminate


def test_what_looks_at_the_scope_afterwards(start: Start) -> None:
    """OpenTelemetry knows the route; so does a middleware after its `call_next`."""
    server = start_app(start, "tests.others.around:observed", "--factory")
    readers = [RawReader(server.port, f"{path}?steps=3&interval=0.5") for path in FORMATS]
    readers.append(RawReader(server.port, "/of/ada"))
    assert read_until(readers, lambda: all(reader.ended_at for reader in readers))
    for path, reader in zip((*FORMATS, "/sse"), readers, strict=True):
        assert reader.ended_properly
        assert event_ids(path, bytes(reader.body)) == [0, 1, 2]
    for reader in readers[:3]:
        assert reader.arrivals[-1] - reader.arrivals[0] > 0.4

    told = requests.get(f"{server.url}/seen", timeout=LIMIT).json()
    assert sorted(told["seen"]) == [
        ["/ndjson", "ndjson", {}, None],
        ["/of/{user}", "of_user", {"user": "ada"}, "ada"],
        ["/sse", "sse", {}, None],
        ["/text", "text", {}, None],
    ]
    for route in (*FORMATS, "/of/{user}"):
        assert told["spans"].count(f"GET {route}") == 1
    assert_no_error(server)


@pytest.mark.parametrize("order", ["inside", "outside"])
def test_brotli(order: str, start: Start) -> None:
    """Inside of it `EndStreams` ends a stream properly. Around it, it tells the app, and cuts."""
    server = start_app(start, f"tests.others.around:brotli_{order}", "--factory")
    headers = "Accept-Encoding: br\r\n"
    readers = [RawReader(server.port, f"{path}?interval=0.1", headers) for path in FORMATS]
    assert read_until(readers, lambda: all(len(reader.arrivals) > 3 for reader in readers))
    terminate(server)
    assert read_until(readers, lambda: all(reader.ended_at for reader in readers))
    for path, reader in zip(FORMATS, readers, strict=True):
        assert reader.ended_properly == (order == "outside")
        events = event_ids(path, brotli.Decompressor().process(bytes(reader.body)))
        assert events == list(range(len(events)))
        assert len(events) > 3
    server.wait()
    assert "Traceback" not in server.log


def test_answers_to_a_post_are_finished(start: Start) -> None:
    """Tool calls of MCP and a chat completion go on when their server is stopped, to their end.

    The GET stream of an MCP session ends, or the server would not go down before its client.
    """
    server = start_app(start, "tests.others.around:protocols", "--factory")

    async def call_tool(mode: str, begun: asyncio.Event) -> None:
        done: list[float] = []

        async def count(progress: float, total: float | None, message: str | None) -> None:
            done.append(progress)
            begun.set()

        async with Client(f"{server.url}/mcp", mode=mode) as client:
            if mode == "legacy":
                get = '"GET /mcp HTTP/1.1" 200'
                await asyncio.to_thread(wait_for, lambda: get in server.log, "the GET stream")
            await client.list_tools()  # it asks for them after a call otherwise
            result = await client.call_tool("work", progress_callback=count)
            assert "done" in str(result.content)
            assert done == list(range(20))
            await asyncio.to_thread(server.wait)

    async def complete(begun: asyncio.Event) -> None:
        client = AsyncOpenAI(base_url=server.url, api_key="x", max_retries=0)
        stream = await client.chat.completions.create(model="x", messages=[], stream=True)
        words = ""
        async for chunk in stream:
            words += chunk.choices[0].delta.content or ""
            begun.set()
        assert words.split() == [f"word{number}" for number in range(20)]

    async def main() -> None:
        begun = [asyncio.Event() for _ in range(3)]
        async with asyncio.TaskGroup() as group:
            group.create_task(call_tool("legacy", begun[0]))
            group.create_task(call_tool("auto", begun[1]))
            group.create_task(complete(begun[2]))
            for each in begun:
                await each.wait()
            terminate(server)

    asyncio.run(asyncio.wait_for(main(), LIMIT))
    server.wait()
