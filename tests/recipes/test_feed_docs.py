"""recipes/feed.md: its log in PostgreSQL, and its dependency that says who may read."""

from pathlib import Path

import psycopg
import requests

from tests.support.event_sources import event_sources
from tests.support.feed import numbers, publish
from tests.support.postgres import running_postgres
from tests.support.processes import LIMIT, Process, Start, wait_for
from tests.support.readme import Readme
from tests.support.recipes import start_app

README = Readme("recipes/feed.md")


def start_program(start: Start, tmp_path: Path, program: str, **environment: str) -> Process:
    (tmp_path / "program.py").write_text(program)
    return start_app(start, "program:app", "--app-dir", str(tmp_path), **environment)


LOG = """\
import asyncio, os
from contextlib import suppress
from weakref import WeakValueDictionary

import psycopg
from psycopg import AsyncConnection

import recipes.feed
from recipes.common import keep_going
from recipes.feed import KEEP, Channel, Log, LogIsAway, to_sse

"""


def test_a_log_in_postgresql(start: Start, tmp_path: Path) -> None:
    program = LOG + README.tested("a log in PostgreSQL")
    program += "\n\napp = recipes.feed.app\nrecipes.feed.log = PostgresLog(os.environ['URL'])\n"
    with running_postgres() as postgres, event_sources() as readers:
        with psycopg.connect(postgres.database_url) as db:
            db.execute(program.partition('"""')[2].partition('"""')[0])
        one, two = (
            start_program(start, tmp_path, program, URL=postgres.database_url) for _ in range(2)
        )
        crowd = [source for server in (one, two) for source in readers.open(server.port, 3)]
        ids = publish(one, "0", "1") + publish(two, "2") + publish(two, "x", path="/feed/other")
        (back,) = readers.open(two.port, last_event_id=ids[0])
        wait_for(lambda: all(source.data[-1:] == ["2"] for source in (*crowd, back)), "the events")
        postgres.kill()
        answer = requests.post(f"{one.url}/feed/goals", json={"data": "lost"}, timeout=LIMIT)
        assert answer.status_code == 503
        postgres.start()
        publish(two, "3")
        wait_for(lambda: all(source.data[-1:] == ["3"] for source in (*crowd, back)), "the last")
        assert all(source.data == numbers(0, 4) for source in crowd)
        assert back.data == numbers(1, 4)
        assert not any(source.gaps for source in (*crowd, back))
        assert all(source.opened == 1 for source in crowd)


RULE = """\
from typing import Annotated

from fastapi import Cookie, Depends, FastAPI, HTTPException, Request

import recipes.feed
from main import EndStreams
from recipes.common import prepare

"""


def test_a_users_channel_is_only_that_users(start: Start, tmp_path: Path) -> None:
    program = RULE + README.tested("who may read and post what")
    server = start_program(start, tmp_path, program)
    expected = {
        ("user:ann", "a-secret-of-ann"): (200, 201),
        ("goals", "a-secret-of-ann"): (200, 201),
        ("user:ann", "a-secret-of-bob"): (403, 403),
        ("user:ann", "another"): (401, 401),
        ("user:ann", ""): (401, 401),
        ("goals", ""): (401, 401),
    }
    for (channel, session), statuses in expected.items():
        options = {"cookies": {"session": session}, "timeout": LIMIT, "stream": True}
        url = f"{server.url}/feed/{channel}"
        posted = requests.post(url, json={"data": "x"}, **options)  # type: ignore[arg-type]
        with requests.get(f"{url}?last=1", **options) as read:  # type: ignore[arg-type]
            assert (read.status_code, posted.status_code) == statuses
