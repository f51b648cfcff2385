"""Servers of the recipe `answers`, and questions to them."""

import json
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import openai

from tests.support.processes import ENVIRONMENT, Process, free_port

# The events of an answer around its text.
ALL = ["created", "in_progress", "output_item.added", "content_part.added"]
ALL += ["output_text.done", "content_part.done", "output_item.done", "completed"]


def words(count: int) -> str:
    """A text of so many tokens."""
    return " ".join(f"word{number}" for number in range(count))


def asked(server: Process) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


def events_of(client: openai.OpenAI, response_id: str, after: int = -1) -> list[dict[str, Any]]:
    """Read what comes after an event, to its end."""
    starting: Any = {} if after < 0 else {"starting_after": after}
    stream: Any = client.responses.retrieve(response_id, stream=True, **starting)
    return [event.to_dict() for event in stream]


def text_of(events: list[Any]) -> str:
    return "".join(e.delta for e in events if e.type == "response.output_text.delta")


class Ask(ExitStack):
    """Starts servers, and ends them."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder = folder

    def serve(
        self,
        redis: int = 0,
        upstream: str = "",
        environment: dict[str, str] | None = None,
        app: str = "tests.support.answers_servers:app",
        constants: dict[str, Any] | None = None,
    ) -> Process:
        """Start a server: with the port of a Redis, the URL of an upstream, other constants."""
        port = free_port()
        command = [sys.executable, "-m", "uvicorn", app]
        command += ["--port", str(port), "--log-level", "debug"]
        settings = {**ENVIRONMENT, "CONSTANTS": json.dumps(constants or {}), **(environment or {})}
        if redis:
            settings["REDIS_URL"] = f"redis://127.0.0.1:{redis}"
        if upstream:
            settings |= {"UPSTREAM_URL": f"{upstream}/v1", "UPSTREAM_KEY": "the-key"}
        log = self.folder / f"answers-{port}.log"
        server = Process(command, log, port, env=settings)
        self.callback(server.kill)
        return server
