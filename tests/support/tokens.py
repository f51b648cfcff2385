"""Questions to the parrot of recipes/tokens.py, and the servers to put them to."""

import itertools
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from recipes.tokens import squawk
from tests.support.processes import ENVIRONMENT, Process, free_port

QUESTION = "What is a token?"
ANSWER = "".join(squawk(QUESTION))
LONG = 300  # tokens

Serve = Callable[..., Process]


def long_question(beginning: str) -> str:
    """A question whose answer has at least LONG tokens."""
    questions = (f"{beginning} {number}" for number in itertools.count())
    return next(q for q in questions if sum(1 for _ in squawk(q)) >= LONG)


def asked(question: Any = QUESTION, **fields: Any) -> dict[str, Any]:
    """The body of a request."""
    return {"model": "parrot", "messages": [{"role": "user", "content": question}], **fields}


@contextmanager
def servers(folder: Path) -> Iterator[Serve]:
    """`serve("tokens_servers:parrot", "http://…", SILENCE=1)` starts an app of tests/support.

    The URL of an upstream makes a relay of the recipe; then come changes of its constants.
    """
    with ExitStack() as stack:

        def serve(app: str, upstream: str = "", **constants: Any) -> Process:
            port = free_port()
            command = [sys.executable, "-m", "uvicorn", f"tests.support.{app}", "--port", str(port)]
            environment = {**ENVIRONMENT, "CONSTANTS": json.dumps(constants)}
            if upstream:
                environment |= {"UPSTREAM_URL": f"{upstream}/v1", "UPSTREAM_KEY": "the key"}
            process = Process(command, folder / f"{port}.log", port, env=environment)
            stack.callback(process.kill)
            return process

        yield serve
