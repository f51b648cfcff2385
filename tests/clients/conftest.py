"""Clients as people run them, and in this process."""

import json
import logging
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.support.processes import ENVIRONMENT, LIMIT, ROOT, wait_for
from tests.support.wrong_servers import load


class Running:
    """A client in a process of its own, and what it has printed so far."""

    def __init__(self, folder: Path, client: str, *arguments: str) -> None:
        self.out, self.err = folder / f"{client}.out", folder / f"{client}.err"
        with self.out.open("wb") as out, self.err.open("wb") as err:
            command = [sys.executable, str(ROOT / f"{client}.py"), *arguments]
            self.popen = subprocess.Popen(command, stdout=out, stderr=err, env=ENVIRONMENT)

    def lines(self) -> list[str]:
        return self.out.read_text().splitlines()

    def wait_for_lines(self, count: int) -> list[str]:
        wait_for(lambda: len(self.lines()) >= count, f"{count} lines from {self.popen.args!r}")
        return self.lines()

    def wait(self) -> int:
        return self.popen.wait(LIMIT)

    @property
    def errors(self) -> list[str]:
        return self.err.read_text().splitlines()


Run = Callable[..., Running]


@pytest.fixture
def run(tmp_path: Path) -> Iterator[Run]:
    """Start clients: `run(client, url)`."""
    running: list[Running] = []

    def run(client: str, *arguments: str) -> Running:
        running.append(Running(tmp_path, client, *arguments))
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
