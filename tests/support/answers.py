"""Servers of the recipe `answers`, and questions to them."""

from functools import cache
from typing import Any

import httpx2
import openai

from tests.support.processes import LIMIT, Process, Start
from tests.support.recipes import start_changed

# Each request has a connection of its own: a server that is stopped closes those that are kept.
NOT_KEPT = httpx2.Limits(max_keepalive_connections=0)
http = httpx2.Client(timeout=LIMIT, limits=NOT_KEPT)  # one takes longer to make than an answer


def words(count: int) -> str:
    """A text of so many tokens."""
    return " ".join(f"word{number}" for number in range(count))


def serve(
    start: Start, redis: str = "", upstream: str = "", app: str = "answers", **constants: Any
) -> Process:
    """Start a server: with the URL of a Redis or an upstream, and `parrot__SECONDS_PER_TOKEN=0`."""
    settings = {"UPSTREAM_URL": upstream, "UPSTREAM_KEY": "the-key" if upstream else ""}
    return start_changed(start, app, REDIS_URL=redis, **settings, **constants)


@cache
def asked(server: Process) -> openai.OpenAI:
    client = openai.DefaultHttpxClient(limits=NOT_KEPT)
    url = f"{server.url}/v1"
    return openai.OpenAI(base_url=url, api_key="none", max_retries=0, http_client=client)


def events_of(client: openai.OpenAI, response_id: str, after: int = -1) -> list[dict[str, Any]]:
    """Read what comes after an event, to its end."""
    starting: Any = {} if after < 0 else {"starting_after": after}
    stream: Any = client.responses.retrieve(response_id, stream=True, **starting)
    return [event.to_dict() for event in stream]


def text_of(events: list[Any]) -> str:
    return "".join(e.delta for e in events if e.type == "response.output_text.delta")
