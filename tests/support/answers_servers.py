"""The recipe `answers` as tests run it: `uvicorn tests.support.answers_servers:app`.

CONSTANTS (JSON) in the environment changes constants of its modules: {"answers.KEEP": 1}.
FAIL makes every third round of its loop in the background fail.
"""

import importlib
import itertools
import json
import os
from collections.abc import Awaitable, Callable

importlib.import_module("recipes.answers")  # it imports the others
for name, value in json.loads(os.environ.get("CONSTANTS", "{}")).items():
    module, constant = f"recipes.{name}".rsplit(".", 1)
    holder = importlib.import_module(module)
    assert hasattr(holder, constant), name
    setattr(holder, constant, value)

from recipes.answers import app, store  # noqa: E402

__all__ = ["app"]


def failing(work: Callable[[], Awaitable[None]]) -> Callable[[], Awaitable[None]]:
    rounds = itertools.count(1)

    async def fail_at_times() -> None:
        if next(rounds) % 3 == 0:
            raise ZeroDivisionError("nobody expected this")
        await work()

    return fail_at_times


if os.environ.get("FAIL"):
    setattr(store, "go_round", failing(getattr(store, "go_round")))  # noqa: B009, B010
