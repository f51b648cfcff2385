"""The clients' `main()` in this process, and a clock that need not be waited for."""

import asyncio
import json
import logging
import sys
import threading
import time
from collections.abc import Callable
from typing import NamedTuple

import pytest

from tests.support.wrong_servers import load


class Printed(NamedTuple):
    status: object
    out: list[str]
    err: list[str]

    @property
    def ids(self) -> list[int]:
        return [json.loads(line.split("  ")[1])["event_id"] for line in self.out]


Main = Callable[..., Printed]


@pytest.fixture
def main(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Main:
    """Run a client's `main()` in this process: quicker, and its constants can be changed."""

    def main(client: str, url: str, **constants: float) -> Printed:
        # Without pytest's handlers a warning goes where a person sees it.
        monkeypatch.setattr(logging.getLogger(client), "propagate", False)
        monkeypatch.setattr(sys, "argv", [f"{client}.py", url])
        try:
            status = load(client, **constants).main()
        except SystemExit as end:
            status = end.code
        out, err = capfd.readouterr()
        return Printed(status, out.splitlines(), err.splitlines())

    return main


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make a clock of this process that only sleeping moves, and sleeping takes no time.

    In other threads sleep is as always: a thread that an earlier test left behind moves no clock.
    """
    now, tester = time.monotonic(), threading.get_ident()
    sleep_really, sleep_async = time.sleep, asyncio.sleep

    def sleep(seconds: float) -> None:
        nonlocal now
        if threading.get_ident() == tester:
            now += seconds
        else:
            sleep_really(seconds)

    async def sleep_on_the_loop(seconds: float) -> None:
        sleep(seconds)
        await sleep_async(0)

    monkeypatch.setattr(time, "monotonic", lambda: now)
    monkeypatch.setattr(time, "sleep", sleep)
    monkeypatch.setattr(asyncio, "sleep", sleep_on_the_loop)
