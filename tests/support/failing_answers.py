"""The recipe `answers` on Redis: every third round of its loop in the background fails."""

import itertools
from typing import Any

import recipes.answers
from tests.support.changed import answers as app

__all__ = ["app"]

store: Any = recipes.answers.store
go_round = store.go_round
rounds = itertools.count(1)


async def fail_at_times() -> None:
    if next(rounds) % 3 == 0:
        raise ZeroDivisionError("nobody expected this")
    await go_round()


store.go_round = fail_at_times
