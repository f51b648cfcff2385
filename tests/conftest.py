"""The fixtures of all tests: servers that are started for one test, and stopped after it."""

import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import cache
from pathlib import Path

import pytest

from tests.support.browsers import BROWSERS, EACH, Browser, leave
from tests.support.postgres import Postgres, running_postgres
from tests.support.processes import UVICORN, Process, Start, starting


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Start servers: `start(*command)` runs any, with `{port}` in it replaced by a free port."""
    with starting(tmp_path) as start:
        yield start


@pytest.fixture
def server(start: Start) -> Process:
    """The server as a person runs it, on a port of its own."""
    return start(*UVICORN)


@pytest.fixture(scope="session")
def shared_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Process]:
    """One server for all tests of a worker that do it no harm."""
    with starting(tmp_path_factory.mktemp("server")) as start:
        yield start(*UVICORN)


@pytest.fixture(scope="session")
def browsers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], Browser]]:
    """`browsers(name)` starts a browser the first time, and gives it to all tests of a worker.

    A test leaves it on an empty page, and its console empty.
    """
    with ExitStack() as stack:

        @cache
        def started(name: str) -> Browser:
            return stack.enter_context(BROWSERS[name](tmp_path_factory.mktemp(name)))

        yield started


@pytest.fixture(params=EACH)
def browser(
    request: pytest.FixtureRequest, browsers: Callable[[str], Browser]
) -> Iterator[Browser]:
    """Each browser in turn. If the test's file has a pattern `NETWORK`, nothing else may be on the
    console at the end.
    """
    browser = browsers(request.param)
    yield browser
    unexpected = leave(browser, getattr(request.module, "NETWORK", re.compile("")))
    assert not unexpected, "\n".join(unexpected)


@pytest.fixture
def postgres() -> Iterator[Postgres]:
    """A PostgreSQL server with an empty database, for one test."""
    with running_postgres() as server:
        yield server
