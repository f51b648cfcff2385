"""recipes/export.py: complete downloads, cut ones, and what is left behind by readers who leave."""

import asyncio
import csv
import io
import json
import os
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any

import psutil
import psycopg
import pytest
import requests
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from recipes import export
from recipes.common import database_url
from tests.support.postgres import Postgres, running_postgres
from tests.support.processes import ENVIRONMENT, LIMIT, ROOT, Process, Start, starting, wait_for
from tests.support.raw_reader import RawReader, read_until
from tests.support.readme import Readme
from tests.support.recipes import start_app, start_changed
from tests.support.redis_server import BadLine

CUSTOMERS = ("Zoë ☕", "Müller, Söhne & Co", "山田太郎", 'Jack "Mac" O\'Neill')
NOTES = ("", None, "ring twice,\nthen wait", "=1+1", "no hurry")
MANY, LONG = 3000, 10_000 * "x"  # so many rows are more than the kernel keeps for a slow reader
CSV, NDJSON = PATHS = ("/orders.csv", "/orders.ndjson")
SQL = (ROOT / "recipes" / "orders.sql").read_text()
Row = tuple[Any, ...]


def rows_after(path: str, after: int, rows: int, note: str | None = None) -> list[Row]:
    """What a reader must get; in CSV all is text, and NULL an empty one."""
    ids = range(after + 1, rows + 1)
    orders = [(i, CUSTOMERS[i % 4], note or NOTES[i % 5], i % 9 + 1, i * 37 % 10000) for i in ids]
    return orders if path == NDJSON else [tuple(map(as_text, order)) for order in orders]


def as_text(value: Any) -> str:
    return "" if value is None else value.hex() if isinstance(value, bytes) else str(value)


def parse(path: str, body: bytes | bytearray) -> list[Row]:
    """The rows of a body without a line of names. NaN and the like are no JSON."""
    if path == CSV:
        return [tuple(row) for row in csv.reader(io.StringIO(body.decode("utf-8"), newline=""))]
    lines = body.decode().split("\n")[:-1]
    return [tuple(json.loads(line, parse_constant=int).values()) for line in lines]


# Databases, servers and readers -------------------------------------------------------------------


def run(url: str, *sql: str) -> None:
    """Run these statements on a database."""
    if url.startswith("sqlite"):
        with closing(sqlite3.connect(url.removeprefix("sqlite:///"))) as file:
            file.executescript(";".join(("PRAGMA synchronous = OFF", *sql)))
        return
    with psycopg.connect(url, autocommit=True, client_encoding="UTF8") as connection:
        for statement in sql:
            connection.execute(statement.encode())


def fill(url: str, rows: int = 10, note: str = "") -> str:
    """Make the table there, all with this note if there is one; return the URL."""
    sql = SQL.replace("1000000", str(rows))
    if not url.startswith("sqlite"):
        sql = sql.replace("BEGIN IMMEDIATE;", "").replace("COMMIT;", "")
    run(url, sql, *([f"UPDATE orders SET note = '{note}'"] if note else []))
    return url


@pytest.fixture(scope="module")
def postgres() -> Iterator[Postgres]:
    with running_postgres() as postgres:
        yield postgres


def new_database(postgres: Postgres, encoding: str = "UTF8") -> str:
    """Make the database `orders` anew; return its URL."""
    how = f"ENCODING '{encoding}' TEMPLATE template0 LC_COLLATE 'C' LC_CTYPE 'C'"
    drop = "DROP DATABASE IF EXISTS orders WITH (FORCE)"
    run(postgres.database_url, drop, f"CREATE DATABASE orders {how}")
    return postgres.database_url.rpartition("/")[0] + "/orders"


# The tests of each database run in one worker, because they share it and a server.
KINDS = [
    pytest.param(name, marks=pytest.mark.xdist_group(f"export {name}"))
    for name in ("sqlite", "postgres")
]
in_sqlite, in_postgres = (pytest.mark.parametrize("server", [k], indirect=True) for k in KINDS)


@pytest.fixture(scope="module", params=KINDS)
def server(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Process]:
    """A server for all tests that do it no harm."""
    directory = tmp_path_factory.mktemp("export")
    url = f"sqlite:///{directory}/own.db"
    if request.param == "postgres":
        url = new_database(request.getfixturevalue("postgres"))
    with starting(directory) as start:
        yield serve(start, url)


@pytest.fixture
def url(request: pytest.FixtureRequest, server: Process) -> Iterator[str]:
    """Its database, in which nothing is."""
    url: str = server.options["env"]["DATABASE_URL"]
    if url.startswith("sqlite"):
        for file in server.log_file.parent.glob("own.*"):
            file.unlink()
    else:
        new_database(request.getfixturevalue("postgres"))
    os.truncate(server.log_file, 0)
    yield url
    assert "Traceback" not in server.log


def serve(start: Start, url: str) -> Process:
    return start_app(start, "recipes.export:app", DATABASE_URL=url)


def serve_impatiently(start: Start, url: str) -> Process:
    """A minute lasts two seconds."""
    return start_changed(start, "export", export__PATIENCE=2, DATABASE_URL=url)


def get(server: Process, target: str) -> requests.Response:
    return requests.get(server.url + target, timeout=LIMIT)


def refused(server: Process, path: str = CSV) -> bool:
    """Whether the answer is a 503, which must come within 5 seconds. (A busy machine has more.)"""
    response = requests.get(server.url + path, timeout=15)
    if response.status_code != 503:
        return False
    assert response.headers["Retry-After"] == "5"
    assert response.json() == {"detail": "The orders cannot be read now. Try again later."}
    return True


def slow_reader(server: Process, target: str) -> RawReader:
    """A reader who has some of the rows, and reads no more until it is told to."""
    reader = RawReader(server.port, target, receive_buffer=4096)
    assert read_until([reader], lambda: reader.body)
    return reader


def read_to_end(reader: RawReader, complete: bool) -> None:
    """Let it read on: it gets all long rows of NDJSON, or its download is cut."""
    assert read_until([reader], lambda: reader.ended_at)
    assert (reader.status, reader.ended_properly) == (200, complete)
    if complete:
        assert parse(NDJSON, reader.body) == rows_after(NDJSON, 0, MANY, LONG)


def wait_for_queries(url: str, count: int, which: str = "state = 'active'") -> None:
    """Until PostgreSQL is at work on so many downloads of this database."""
    sql = f"SELECT count(*) FROM pg_stat_activity WHERE query LIKE 'COPY%' AND {which}".encode()
    with psycopg.connect(url, autocommit=True) as connection:
        wait_for(lambda: connection.execute(sql).fetchall() == [(count,)], f"{count} queries")


# Complete downloads -------------------------------------------------------------------------------

FIRST = {
    CSV: 'id,customer,note,quantity,cents\r\n1,"Müller, Söhne & Co",,2,37\r\n2,山田太郎,"ring',
    NDJSON: '{"id":1,"customer":"Müller, Söhne & Co","note":null,"quantity":2,"cents":37}\n',
}
MEDIA_TYPES = {CSV: "text/csv; charset=utf-8", NDJSON: "application/x-ndjson"}
WRONG_IDS = ("-1", str(2**63), "9" * 20, "9" * 5000, "", "x", "1.5", "1e400", "NaN", "%00")


@pytest.mark.parametrize("path", PATHS)
def test_all_rows_and_those_after_an_id(server: Process, url: str, path: str) -> None:
    fill(url, rows := 10_000)  # some chunks
    response = get(server, path)
    assert response.headers["Content-Type"] == MEDIA_TYPES[path]
    assert response.headers["Content-Disposition"] == f'attachment; filename="{path[1:]}"'
    # None of the headers of a stream of events: a proxy may compress it.
    assert "Cache-Control" not in response.headers
    assert "X-Accel-Buffering" not in response.headers
    assert response.content.startswith(FIRST[path].encode())
    body = response.content.partition(b"\r\n")[2] if path == CSV else response.content
    assert parse(path, body) == rows_after(path, 0, rows)
    schema = get(server, "/openapi.json").json()["paths"][path]["get"]["responses"]
    assert [*schema["200"]["content"]] == [MEDIA_TYPES[path].partition(";")[0]]
    for after in (rows // 2, rows - 2, rows, 2**31, 2**63 - 1):
        response = get(server, f"{path}?after={after}")
        assert response.status_code == 200
        # No line of names: it can be put behind what is there.
        assert parse(path, response.content) == rows_after(path, after, rows), after
    for wrong in WRONG_IDS:
        response = get(server, f"{path}?after={wrong}")
        assert response.status_code == 422, wrong
        assert [error["loc"] for error in response.json()["detail"]] == [["query", "after"]]


def test_memory_is_bounded_by_bytes(server: Process, url: str) -> None:
    fill(url, rows := 600, 100_000 * "x")
    last = {path: get(server, f"{path}?after={rows - 1}").content for path in PATHS}
    process = psutil.Process(server.pid)
    idle = most = process.memory_info().rss
    for path in PATHS:
        slow, quick = slow_reader(server, path), RawReader(server.port, path)
        while not read_until([quick], lambda: quick.ended_at, limit=0.05):  # noqa: B023
            most = max(most, process.memory_info().rss)
        assert quick.ended_properly
        assert quick.body.endswith(last[path])
        assert len(quick.body) > 60_000_000
        slow.close()
    assert most - idle < 20_000_000


def test_a_download_shows_one_moment(server: Process, url: str) -> None:
    """PostgreSQL and SQLite in WAL mode are written to meanwhile. Otherwise SQLite is locked."""
    fill(url, MANY, LONG)
    change = ("UPDATE orders SET note = 'later'", "DELETE FROM orders WHERE id > 9")
    if url.startswith("sqlite"):
        reader = slow_reader(server, NDJSON)
        with pytest.raises(sqlite3.OperationalError, match="locked"):
            run(url, "PRAGMA busy_timeout = 0", *change)
        read_to_end(reader, complete=True)
        run(url, "PRAGMA journal_mode = WAL")
    reader = slow_reader(server, NDJSON)
    run(url, *change)
    read_to_end(reader, complete=True)


# Values -------------------------------------------------------------------------------------------

NUMBER = st.integers(-(2**63), 2**63 - 1)
ANY = st.none() | NUMBER | st.floats(allow_nan=False) | st.text() | st.binary()


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(orders=st.dictionaries(NUMBER, st.tuples(ANY, ANY, ANY, ANY), max_size=10))
@example(orders={2**53 + 1: ("a\0b", "\U0001f600", float("inf"), b"\0\xff")})
@example(orders={1: ("a,b", "\r", "\n", 'a "b"')})
def test_whatever_is_in_a_row_of_sqlite_comes_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, orders: dict[int, Row]
) -> None:
    rows = sorted((key, *values) for key, values in orders.items())
    monkeypatch.setattr(export, "DATABASE_URL", f"sqlite:///{tmp_path}/own.db")
    with closing(sqlite3.connect(tmp_path / "own.db")) as file, file:
        file.execute("PRAGMA synchronous = OFF")
        file.execute("DROP TABLE IF EXISTS orders")
        file.execute("CREATE TABLE orders (id, customer, note, quantity, cents)")
        file.executemany("INSERT INTO orders VALUES (?, ?, ?, ?, ?)", rows)
    texts, values = (
        parse(path, b"".join(export.read_sqlite(form, "", asyncio.Timeout(None))))
        for path, form in ((CSV, export.CSV), (NDJSON, export.NDJSON))
    )
    assert texts[1:] == [tuple(map(as_text, row)) for row in rows]
    infinite = {float("inf"): "Infinity", float("-inf"): "-Infinity"}
    assert values == [
        tuple(v.hex() if isinstance(v, bytes) else infinite.get(v, v) for v in row) for row in rows
    ]


# In PostgreSQL's spelling, in JSON, in CSV.
TYPES = [
    (r"'\x00ff'::bytea", r"\x00ff", r"\x00ff"),
    ("'NaN'::numeric", "NaN", "NaN"),
    ("'-infinity'::float8", "-Infinity", "-Infinity"),
    ("12345678901234567890.12::numeric", 12345678901234567890.12, "12345678901234567890.12"),
    (r"""'{"a": "\\ \n"}'::jsonb""", {"a": "\\ \n"}, r'{"a": "\\ \n"}'),
    (r"""E'{"b":\n\r\t"\\u0001"}'::json""", {"b": "\1"}, '{"b":\n\r\t"\\u0001"}'),
    ("""ARRAY['x"', 'y,z', NULL, E'\\n']""", ['x"', "y,z", None, "\n"], '{"x\\"","y,z",NULL,"\n"}'),
    ("ARRAY[gen_random_uuid(), NULL] = '{}'", False, "f"),
    ("(1, 'x, y')::pair", {"a": 1, "b": "x, y"}, '(1,"x, y")'),
    ("'so, so'::mood", "so, so", "so, so"),
    ("'infinity'::timestamptz", "infinity", "infinity"),
    (r"E'\\.'", r"\.", r"\."),
    (r"E'\001\002\b\x7f'", "\1\2\b\x7f", "\1\2\b\x7f"),
    ("'Müller'", "Müller", "Müller"),
]


@in_postgres
def test_any_type_of_postgresql(server: Process, postgres: Postgres) -> None:
    """Its texts are in another encoding there, and UTF-8 in a download."""
    url = new_database(postgres, "LATIN1")
    run(url, "CREATE TYPE mood AS ENUM ('so, so')", "CREATE TYPE pair AS (a int, b text)")
    for sql, value, text in TYPES:
        columns = f"gen_random_uuid() id, {sql} customer, {sql} note, 1 quantity, NULL cents"
        run(url, "DROP VIEW IF EXISTS orders", f"CREATE VIEW orders AS SELECT {columns}")
        ((_, *values),) = parse(NDJSON, get(server, NDJSON).content)
        assert values == [value, value, 1, None], sql
        _, (_, *texts) = parse(CSV, get(server, CSV).content)
        assert texts == [text, text, "1", ""], sql


def test_text_that_is_not_utf_8_cuts_the_download_it_is_in(
    request: pytest.FixtureRequest, start: Start, server: Process, url: str
) -> None:
    wrong = "CAST(x'4dfc6c6c6572' AS TEXT)"
    if is_postgres := url.startswith("postgres"):
        new_database(request.getfixturevalue("postgres"), "SQL_ASCII")
        wrong = r"E'M\xfcller'"
    run(fill(url), f"UPDATE orders SET customer = {wrong} WHERE id = 7")
    for path in PATHS:
        reader = RawReader(server.port, path)
        read_to_end(reader, complete=False)
        assert b"ller" not in reader.body.partition(b"\r\n")[2]
        curl = subprocess.run(["curl", "-s", server.url + path], stdout=subprocess.DEVNULL)
        assert curl.returncode == 18  # "transfer closed with outstanding read data remaining"
        server.wait_for_log(rf"{path[1:]} was cut: .*(?:UTF-?8|utf-8)", 2)
        response = get(server, f"{path}?after=7")
        assert parse(path, response.content) == rows_after(path, 7, 10)
    assert server.log.count("was cut") == 4
    if not is_postgres:  # export.md warns of a middleware. When Starlette has changed, that can go.
        spoiled = start_app(start, "tests.support.behind:export", DATABASE_URL=url)
        reader = RawReader(spoiled.port, NDJSON)
        assert read_until([reader], lambda: reader.ended_at)
        assert reader.ended_properly


# Readers who leave, and too many of them ----------------------------------------------------------


@in_postgres
def test_readers_who_leave_give_back_their_connections(server: Process, url: str) -> None:
    fill(url, MANY, LONG)
    readers = [slow_reader(server, CSV) for _ in range(10)]
    assert refused(server)  # an eleventh
    for reader in readers[:5]:
        reader.close()
    for reader in readers[5:]:
        reader.reset()
    wait_for_queries(url, 0)
    assert not refused(server, f"{CSV}?after=9")
    assert "was cut" not in server.log


@in_postgres
def test_readers_who_stand_still_are_cut(start: Start, url: str) -> None:
    """The limit is not on the length of a download: one that takes a little each time gets all."""
    server = serve_impatiently(start, fill(url, MANY, LONG))
    reader = slow_reader(server, NDJSON)
    others = [slow_reader(server, CSV) for _ in range(2)]
    while server.log.count("orders.csv was cut: TimeoutError") < 2:
        more = len(reader.body) + 500_000
        assert read_until([reader], lambda: len(reader.body) > more)  # noqa: B023
        time.sleep(0.1)
    read_to_end(reader, complete=True)
    wait_for_queries(url, 0)
    for other in others:
        other.close()
    assert "Traceback" not in server.log


@in_postgres
def test_a_query_that_computes_is_cancelled(server: Process, url: str) -> None:
    """It sends nothing now, so it would not notice by itself that its reader has left."""
    run(
        fill(url, 400, LONG),  # more than fits on the way to the reader, and less than twice that
        # With a sort, it would send nothing before it has computed all.
        "ALTER DATABASE orders SET enable_sort = off",
        "ALTER TABLE orders RENAME TO base",
        "CREATE VIEW orders AS SELECT * FROM base WHERE id < 400 OR pg_sleep(600) IS NOT NULL",
    )
    reader = slow_reader(server, CSV)
    wait_for_queries(url, 1, "wait_event = 'PgSleep'")
    reader.close()
    wait_for_queries(url, 0)


# Downloads that could not be finished -------------------------------------------------------------


@in_sqlite
def test_the_server_ends(start: Start, url: str, capsys: pytest.CaptureFixture[str]) -> None:
    """It is killed, or waits for a download, or cuts it after the time that it is given."""
    server = serve(start, fill(url, MANY, LONG))
    program: dict[str, Any] = {}
    exec(Readme("recipes/export.md").tested("a reader that goes on"), program)
    orders = program["read_orders"](server.url + NDJSON)
    rows = [tuple(next(orders).values())]
    server.kill()
    with ThreadPoolExecutor() as threads:
        threads.submit(server.start)
        rows += [tuple(order.values()) for order in orders]
    assert rows == rows_after(NDJSON, 0, MANY, LONG)
    assert "Going on after order" in capsys.readouterr().out

    reader = slow_reader(server, NDJSON)
    server.signal(signal.SIGTERM)
    server.wait_for_log("Shutting down")
    read_to_end(reader, complete=True)
    assert server.wait() == -signal.SIGTERM

    server.command += ["--timeout-graceful-shutdown", "1"]
    server.start()
    reader = slow_reader(server, NDJSON)
    server.signal(signal.SIGTERM)
    server.wait()
    read_to_end(reader, complete=False)


@in_postgres
def test_postgresql_dies_or_hangs(start: Start, url: str, postgres: Postgres) -> None:
    server = serve_impatiently(start, fill(url, MANY, LONG))
    for dies in (True, False):
        reader = slow_reader(server, CSV)
        postgres.kill() if dies else postgres.signal(signal.SIGSTOP, everyone=True)
        assert refused(server)
        read_to_end(reader, complete=False)
        postgres.start() if dies else postgres.signal(signal.SIGCONT, everyone=True)
        wait_for(lambda: not refused(server, f"{CSV}?after=9999"), "the database to be back")
        complete_rows = reader.body[: reader.body.rindex(b"\r\n") + 2]
        _, *rows = parse(CSV, complete_rows)
        assert 0 < len(rows) < MANY
        rows += parse(CSV, get(server, f"{CSV}?after={rows[-1][0]}").content)
        assert rows == rows_after(CSV, 0, MANY, LONG)
    assert "Traceback" not in server.log


@in_postgres
def test_postgresql_lets_us_in_and_is_silent(
    start: Start, server: Process, url: str, postgres: Postgres
) -> None:
    """As a pooler is whose database is away: from COPY on, nothing passes the line."""
    fill(url)
    line = BadLine(postgres.port)
    line.silent_from = b"COPY"
    behind = serve(start, url.replace(f":{postgres.port}", f":{line.port}"))
    assert refused(behind)
    # The recipe has hung up, before psycopg waited for the end of the query.
    assert "orders.csv got 503: OperationalError" in behind.log


# What keeps any database from answering, and what mends it.
AWAY, BACK = "ALTER TABLE orders RENAME TO kept", "ALTER TABLE kept RENAME TO orders"
COMPUTES = (
    "CREATE VIEW orders AS WITH RECURSIVE n(id) AS (SELECT 1 UNION ALL SELECT id + 1 FROM n)"
    " SELECT id, id AS customer, id AS note, id AS quantity, id AS cents FROM n WHERE id < 0"
)
RENAME = "ALTER TABLE orders RENAME COLUMN"
FAULTS = [
    (CSV, [AWAY], [BACK]),
    (NDJSON, [AWAY, COMPUTES], ["DROP VIEW orders", BACK]),
    (NDJSON, [f"{RENAME} cents TO euros"], [f"{RENAME} euros TO cents"]),
]


def test_a_database_that_gives_no_answer(server: Process, url: str) -> None:
    fill(url)
    for path, broken, mended in FAULTS:
        run(url, *broken)
        assert refused(server, path), broken
        run(url, *mended)
        assert not refused(server, path), mended
    is_sqlite = url.startswith("sqlite")
    lock = "BEGIN EXCLUSIVE" if is_sqlite else "BEGIN; LOCK TABLE orders"
    connect: Any = sqlite3.connect if is_sqlite else psycopg.connect
    with closing(connect(url.removeprefix("sqlite:///"))) as connection:
        connection.execute(lock)
        assert refused(server)
    assert not refused(server)


@in_sqlite
def test_who_leaves_before_the_answer_behind_a_middleware(start: Start, url: str) -> None:
    """For the middleware that was an error of this server."""
    server = start_app(start, "tests.support.behind:export", DATABASE_URL=fill(url))
    file = url.removeprefix("sqlite:///")
    with closing(sqlite3.connect(file)) as connection:
        connection.execute("BEGIN EXCLUSIVE")
        reader = RawReader(server.port, CSV)
        asks = psutil.Process(server.pid).open_files
        wait_for(lambda: file in [each.path for each in asks()], "the database to be asked")
        reader.close()
    wait_for(lambda: file not in [each.path for each in asks()], "the question to end")
    assert get(server, CSV).status_code == 200
    assert "Traceback" not in server.log


@in_sqlite
def test_a_file_that_is_no_database_now(server: Process, url: str) -> None:
    file = Path(fill(url, 1000).removeprefix("sqlite:///"))
    good = file.read_bytes()
    for bad in (b"no database" * 1000, good[:8192]):
        file.write_bytes(bad)
        reader = RawReader(server.port, CSV)
        assert read_until([reader], lambda: reader.ended_at)  # noqa: B023
        assert reader.status == 503 or not reader.ended_properly
    file.write_bytes(good)
    assert not refused(server)


# The start ----------------------------------------------------------------------------------------


@in_postgres
def test_a_database_that_cannot_be_read_yet(
    start: Start, tmp_path: Path, postgres: Postgres, url: str
) -> None:
    """The log says so at the start, without a password; when it is well, so are the downloads."""
    postgres.kill()
    missing, place = f"sqlite:///{tmp_path}/missing.db", f"127.0.0.1:{postgres.port}"
    with socket.create_server(("127.0.0.1", 0)) as silent, ThreadPoolExecutor() as threads:
        # The first of two addresses takes connections, and says nothing.
        two = f"127.0.0.1:{silent.getsockname()[1]},{place}"
        urls = (
            missing,
            f"postgres://postgres:geh%20eim@{place}/orders",
            f"postgresql+psycopg://{two}/orders?user=postgres&password=geheim",
        )
        servers = list(threads.map(lambda url: serve(start, url), urls))
        for server, word in zip(servers, ("missing.db", "PostgreSQL", "PostgreSQL"), strict=True):
            server.wait_for_log(f"ERROR.*503 until .*{word}.*(unable to open|onnection refused)")
            assert refused(server)
        assert not (tmp_path / "missing.db").exists()
        postgres.start()
        fill(url)
        fill(missing)
        for server in servers:
            wait_for(lambda: not refused(server), "orders")  # noqa: B023
            assert "Traceback" not in server.log
            assert "eim" not in server.log


WRONG_URLS = [
    *("mysql://u:geheim@host/db", "orders.db", "sqlite://", "sqlite:///", "geheim"),
    *("postgresql://u:ge/heim@host/db", "postgresql://u:ge@heim@host/db", "postgresql://"),
    *("postgresql://u:geheim%@host/db", "postgresql+psycopg://u:geheim"),
    *("postgresql://u:geheim@host/db?sslmode", "postgresql://u:geheim@host/db?tls=true"),
]


def test_a_wrong_setting_is_told_in_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    said = set()
    for url in WRONG_URLS:
        monkeypatch.setenv("DATABASE_URL", url)
        with pytest.raises(SystemExit) as ended:
            database_url(default="")
        said.add(f"{ended.value}\n")
    command = [sys.executable, "-m", "uvicorn", "recipes.export:app", "--port", "0"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=LIMIT)
    assert done.returncode != 0
    assert said == {done.stdout + done.stderr}
    assert done.stderr.startswith("DATABASE_URL should be ")
    assert "heim" not in done.stderr


def test_the_file_is_filled_once_and_completely(start: Start, tmp_path: Path) -> None:
    """In a copy of the project, a worker is killed while it does so; then two start at once."""
    recipes = tmp_path / "project" / "recipes"
    shutil.copytree(ROOT / "recipes", recipes, ignore=shutil.ignore_patterns("*.db*"))
    shutil.copy(ROOT / "main.py", recipes.parent)
    file = recipes / "orders.db"
    command = [sys.executable, "-m", "uvicorn", "recipes.export:app", "--port"]
    options: dict[str, Any] = {"cwd": recipes.parent, "env": ENVIRONMENT | {"DATABASE_URL": ""}}

    endless = "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i FROM n) SELECT max(i) FROM n;"
    rows = SQL.replace("1000000", "100000")
    (recipes / "orders.sql").write_text(rows.replace("COMMIT;", endless))
    killed = subprocess.Popen([*command, "0"], stderr=subprocess.DEVNULL, **options)
    try:
        wait_for(lambda: file.exists() and file.stat().st_size > 1_000_000, "the filling")
    finally:
        killed.kill()
        killed.wait()
    assert file.with_name("orders.db-journal").exists()  # it was in the middle

    (recipes / "orders.sql").write_text(rows)
    with ThreadPoolExecutor() as threads:
        servers = list(threads.map(lambda _: start(*command, "{port}", **options), range(2)))
    with closing(sqlite3.connect(file)) as connection:
        assert connection.execute("SELECT count(*) FROM orders").fetchone() == (100_000,)
    for server in servers:
        last = get(server, f"{NDJSON}?after=99999").content
        assert parse(NDJSON, last) == rows_after(NDJSON, 99_999, 100_000)
