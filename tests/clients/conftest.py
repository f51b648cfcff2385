"""Clients as people run them, and in this process."""

import json
import logging
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.support.processes import RunningClient
from tests.support.wrong_servers import load

Run = Callable[..., RunningClient]


@pytest.fixture
def run(tmp_path: Path) -> Iterator[Run]:
    """Start clients: `run(client, url)`."""
    running: list[RunningClient] = []

    def run(client: str, *arguments: str) -> RunningClient:
        running.append(RunningClient(tmp_path, client, *arguments))
        return running[-1]

    yield run
    for client in running:
        client.popen.kill()
        client.wait()


class Printed(NamedTuple):
    status: int
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
        status = load(client, **constants).main()
        out, err = capfd.readouterr()
        return Printed(status, out.splitlines(), err.splitlines())

    return main
