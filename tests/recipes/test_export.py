"""recipes/export.py: complete downloads, cut ones, and what is left behind by readers who leave."""

import csv
import io
import json
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from functools import cache
from pathlib import Path
from typing import Any

import psutil
import psycopg
import pytest
import requests
from hypothesis import example, given, settings
from hypothesis import strategies as st

from recipes import export
from tests.support.postgres import Postgres, running_postgres
from tests.support.processes import (
    ENVIRONMENT,
    LIMIT,
    ROOT,
    Process,
    Start,
    free_port,
    starting,
    wait_for,
)
from tests.support.raw_reader import RawReader, read_until
from tests.support.readme import Readme
from tests.support.recipes import start_app

# More than is kept between a server and a reader with a small buffer who does not read...
ROWS = 150_000
MANY = 400_000  # ...and with a large one, or than a server may hold in its memory
CUSTOMERS = ("Zoë ☕", "Müller, Söhne & Co", "山田太郎", 'Jack "Mac" O\'Neill')
NOTES = ("", None, "ring twice,\nthen wait", "=1+1", "no hurry")
CSV, NDJSON = PATHS = ("/orders.csv", "/orders.ndjson")
SQL = (ROOT / "recipes" / "orders.sql").read_text()
TABLE = (
    "CREATE TABLE orders (id bigint PRIMARY KEY, customer text, note text, quantity int, cents int)"
)

Row = tuple[Any, ...]

# Those that share a server or a database run in one worker.
sharing = pytest.mark.xdist_group("export")
each_format = pytest.mark.parametrize("path", PATHS)


def row(i: int) -> Row:
    return (i, CUSTOMERS[i % 4], NOTES[i % 5], i % 9 + 1, i * 37 % 10000)


@cache
def rows_after(path: str, after: int, last: int = ROWS) -> list[Row]:
    """What a reader must get; in CSV NULL is an empty string."""
    rows = [row(i) for i in range(after + 1, last + 1)]
    return [(i, c, n or "", *rest) for i, c, n, *rest in rows] if path == CSV else rows


def parse(path: str, body: bytes | bytearray, cut: bool = False) -> list[Row]:
    """The rows of a body without a line of names. The last one of a body that was cut may not be
    complete, so it does not count."""
    if path == NDJSON:
        lines = body.split(b"\n")
        assert cut or lines[-1] == b""
        return [tuple(json.loads(line).values()) for line in lines[:-1]]
    records = list(csv.reader(io.StringIO(body.decode(errors="ignore"), newline="")))
    return [(int(i), c, n, *map(int, rest)) for i, c, n, *rest in records[: -1 if cut else None]]


def strict_json(body: bytes) -> list[list[Any]]:
    """The values of each line, which must be JSON without JavaScript's constants."""

    def no_json(constant: str) -> None:
        raise ValueError(constant)

    lines = body.decode().split("\n")[:-1]
    return [list(json.loads(line, parse_constant=no_json).values()) for line in lines]


# Databases, servers and readers -------------------------------------------------------------------


def run(database_url: str, *sql: str) -> None:
    """Run these statements on a database."""
    if database_url.startswith("sqlite"):
        with closing(sqlite3.connect(database_url.removeprefix("sqlite:///"))) as file:
            file.executescript(";".join(sql))
        return
    with psycopg.connect(database_url, autocommit=True, client_encoding="UTF8") as connection:
        for statement in sql:
            connection.execute(statement.encode())


def fill(database_url: str, rows: int = ROWS) -> str:
    """Make the table there; return the URL."""
    sql = SQL.replace("1000000", str(rows))
    if not database_url.startswith("sqlite"):
        sql = sql.replace("BEGIN IMMEDIATE;", "").replace("COMMIT;", "")
    run(database_url, sql)
    return database_url


@pytest.fixture
def sqlite_url(tmp_path: Path) -> str:
    """An empty file."""
    (tmp_path / "own.db").touch()
    return f"sqlite:///{tmp_path}/own.db"


@pytest.fixture(params=["sqlite", "postgres"])
def empty_url(request: pytest.FixtureRequest) -> str:
    """A database without the table."""
    if request.param == "sqlite":
        return str(request.getfixturevalue("sqlite_url"))
    return str(request.getfixturevalue("postgres").database_url)


@pytest.fixture(scope="module")
def filled_sqlite(tmp_path_factory: pytest.TempPathFactory) -> str:
    return fill(f"sqlite:///{tmp_path_factory.mktemp('export')}/orders.db")


@pytest.fixture(scope="module")
def filled_postgres() -> Iterator[str]:
    with running_postgres() as postgres:
        yield fill(postgres.database_url)


@pytest.fixture(scope="module", params=["sqlite", "postgres"])
def shared(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Process]:
    """One server for the tests that do it no harm."""
    with starting(tmp_path_factory.mktemp("server")) as start:
        yield serve(start, request.getfixturevalue(f"filled_{request.param}"))


def serve(start: Start, database_url: str, *options: str, app: str = "") -> Process:
    """Run the recipe, or one of tests/support/export_apps.py, on this database."""
    name = f"tests.support.export_apps:{app}" if app else "recipes.export:app"
    return start_app(start, name, *options, DATABASE_URL=database_url)


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
    assert read_until([reader], lambda: len(reader.body) > 10_000)
    return reader


def assert_complete(reader: RawReader) -> None:
    """Let it read on: it gets all rows of NDJSON."""
    assert read_until([reader], lambda: reader.ended_at)
    assert reader.ended_properly
    assert parse(NDJSON, reader.body) == rows_after(NDJSON, 0)


def assert_cut(reader: RawReader) -> None:
    """Let it read on: its download is cut, so that it does not look finished."""
    assert read_until([reader], lambda: reader.ended_at)
    assert reader.status == 200
    assert not reader.ended_properly


def go_on(server: Process, path: str, body: bytes | bytearray, last: int = ROWS) -> None:
    """The rows of a body that was cut, and those that a second download brings, are all rows."""
    rows = parse(path, body.partition(b"\r\n")[2] if path == CSV else body, cut=True)
    assert 0 < len(rows) < last
    rest = get(server, f"{path}?after={rows[-1][0]}")
    assert rest.status_code == 200
    assert rows + parse(path, rest.content) == rows_after(path, 0, last)


def queries(postgres_url: str) -> int:
    """How many downloads PostgreSQL is at work on."""
    with psycopg.connect(postgres_url) as connection:
        (count,) = connection.execute(
            "SELECT count(*) FROM pg_stat_activity WHERE query LIKE 'COPY%' AND state = 'active'"
        ).fetchone() or (0,)
    return int(count)


# Complete downloads -------------------------------------------------------------------------------

FIRST = {
    CSV: "id,customer,note,quantity,cents\r\n"
    '1,"Müller, Söhne & Co",,2,37\r\n'
    '2,山田太郎,"ring twice,\nthen wait",3,74\r\n'
    '3,"Jack ""Mac"" O\'Neill",=1+1,4,111\r\n'
    "4,Zoë ☕,no hurry,5,148\r\n",
    NDJSON: '{"id":1,"customer":"Müller, Söhne & Co","note":null,"quantity":2,"cents":37}\n',
}
MEDIA_TYPES = {CSV: "text/csv; charset=utf-8", NDJSON: "application/x-ndjson"}


@sharing
@each_format
def test_all_rows_as_a_download(shared: Process, path: str) -> None:
    response = get(shared, path)
    assert response.headers["Content-Type"] == MEDIA_TYPES[path]
    assert response.headers["Content-Disposition"] == f'attachment; filename="{path[1:]}"'
    # None of the headers of a stream of events: a proxy may compress it.
    assert not {"Cache-Control", "X-Accel-Buffering"} & set(response.headers)
    assert response.content.startswith(FIRST[path].encode())
    rows = response.content.partition(b"\r\n")[2] if path == CSV else response.content
    assert parse(path, rows) == rows_after(path, 0)
    schema = get(shared, "/openapi.json").json()["paths"][path]["get"]["responses"]
    assert [*schema["200"]["content"]] == [MEDIA_TYPES[path].partition(";")[0]]


@sharing
@each_format
def test_the_rows_after_an_id(shared: Process, path: str) -> None:
    for after in (ROWS // 2, ROWS - 2, ROWS, 2**31, 2**63 - 1):
        response = get(shared, f"{path}?after={after}")
        assert response.status_code == 200
        # No line of names: it can be put behind what is there.
        assert parse(path, response.content) == rows_after(path, after), after
    for wrong in ("-1", str(2**63), "9" * 20, "9" * 5000, "", "x", "1.5", "1e400", "NaN", "%00"):
        response = get(shared, f"{path}?after={wrong}")
        assert response.status_code == 422, wrong
        assert [error["loc"] for error in response.json()["detail"]] == [["query", "after"]]


@each_format
def test_memory_is_bounded_by_bytes(start: Start, empty_url: str, path: str) -> None:
    """Of many rows, and of large ones."""
    server = serve(start, fill(empty_url, MANY))
    run(empty_url, f"UPDATE orders SET customer = '☕', note = '{100_000 * 'x'}' WHERE id <= 1000")
    process = psutil.Process(server.pid)
    get(server, f"{path}?after={MANY - 1}")
    idle = process.memory_info().rss
    slow, quick = slow_reader(server, path), RawReader(server.port, path)
    seen: list[int] = []

    def ended() -> float:
        seen.append(process.memory_info().rss)
        return quick.ended_at

    assert read_until([quick], ended)
    assert quick.ended_properly
    assert quick.body.endswith(get(server, f"{path}?after={MANY - 1}").content)
    assert len(quick.body) > 100_000_000
    slow.close()
    assert max(seen) - idle < 20_000_000


@pytest.mark.parametrize("mode", ["", "DELETE", "WAL"])
def test_a_download_shows_one_moment(
    start: Start, request: pytest.FixtureRequest, mode: str
) -> None:
    """PostgreSQL and SQLite in WAL mode are written to meanwhile. Otherwise SQLite is locked."""
    if mode:
        url = fill(request.getfixturevalue("sqlite_url"))
        run(url, f"PRAGMA journal_mode = {mode}")
    else:
        url = fill(request.getfixturevalue("postgres").database_url)
    reader = slow_reader(serve(start, url), NDJSON)
    change = ("UPDATE orders SET note = 'later'", "DELETE FROM orders WHERE id > 9")
    if mode == "DELETE":
        with pytest.raises(sqlite3.OperationalError, match="locked"):
            run(url, "PRAGMA busy_timeout = 0", *change)
    else:
        run(url, *change)
    assert_complete(reader)


# Values -------------------------------------------------------------------------------------------


NUMBER = st.integers(-(2**63), 2**63 - 1)
ANY = st.none() | NUMBER | st.floats(allow_nan=False) | st.text() | st.binary()


@settings(deadline=None)
@given(st.dictionaries(NUMBER, st.tuples(ANY, ANY, ANY, ANY), max_size=10))
@example({2**53 + 1: ("a\0b", "\U0001f600", float("inf"), b"\0\xff")})
def test_whatever_is_in_a_row_of_sqlite_comes_back(orders: dict[int, Row]) -> None:
    def shown(value: Any) -> Any:
        if isinstance(value, bytes):
            return value.hex()
        return {"inf": "Infinity", "-inf": "-Infinity"}.get(repr(value), value)

    rows = sorted((key, *values) for key, values in orders.items())
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(export, "DATABASE_URL", f"sqlite:///{folder}/own.db")
        run(export.DATABASE_URL, "CREATE TABLE orders (id, customer, note, quantity, cents)")
        with closing(sqlite3.connect(f"{folder}/own.db")) as file, file:
            file.executemany("INSERT INTO orders VALUES (?, ?, ?, ?, ?)", rows)
        lines = b"".join(export.read_sqlite(export.NDJSON, ""))
        text = b"".join(export.read_sqlite(export.CSV, "")).decode()
    assert strict_json(lines) == [[*map(shown, row)] for row in rows]
    assert [*csv.reader(io.StringIO(text, newline=""))][1:] == [
        ["" if v is None else v.hex() if isinstance(v, bytes) else str(v) for v in row]
        for row in rows
    ]


# In PostgreSQL's spelling, in JSON, in CSV.
TYPES = [
    (r"'\x00ff'::bytea", r"\x00ff", r"\x00ff"),
    ("'NaN'::numeric", "NaN", "NaN"),
    ("'-infinity'::float8", "-Infinity", "-Infinity"),
    ("12345678901234567890.12::numeric", 12345678901234567890.12, "12345678901234567890.12"),
    (r"""'{"a": "\\ \n"}'::jsonb""", {"a": "\\ \n"}, r'{"a": "\\ \n"}'),
    (r"""E'{"b":\n\r\t"\\u0000"}'::json""", {"b": "\0"}, '{"b":\n\r\t"\\u0000"}'),
    ("""ARRAY['x"', 'y,z', NULL, E'\\n']""", ['x"', "y,z", None, "\n"], '{"x\\"","y,z",NULL,"\n"}'),
    ("ARRAY[gen_random_uuid(), NULL] = '{}'", False, "f"),
    ("(1, 'x, y')::pair", {"a": 1, "b": "x, y"}, '(1,"x, y")'),
    ("'so, so'::mood", "so, so", "so, so"),
    ("'[1,5)'::int4range", "[1,5)", "[1,5)"),
    ("'infinity'::timestamptz", "infinity", "infinity"),
    ("'1 day 2 h'::interval", "1 day 02:00:00", "1 day 02:00:00"),
    ("'<a>&amp;</a>'::xml", "<a>&amp;</a>", "<a>&amp;</a>"),
    ("B'101'", "101", "101"),
    (r"E'\\.'", r"\.", r"\."),
    (r"E'\001\b\x7f'", "\1\b\x7f", "\1\b\x7f"),
]


def test_any_type_of_postgresql(start: Start, postgres: Postgres) -> None:
    url = postgres.database_url
    run(url, "CREATE TYPE mood AS ENUM ('so, so')", "CREATE TYPE pair AS (a int, b text)")
    server = serve(start, url)
    for sql, value, text in TYPES:
        run(
            url,
            "DROP VIEW IF EXISTS orders",
            f"CREATE VIEW orders AS SELECT gen_random_uuid() id, {sql} customer, {sql} note,"
            " 1 quantity, NULL cents",
        )
        ((_, *values),) = strict_json(get(server, NDJSON).content)
        assert values == [value, value, 1, None], sql
        body = get(server, CSV).content.decode()
        (_, *texts) = list(csv.reader(io.StringIO(body, newline="")))[1]
        assert texts == [text, text, "1", ""], sql


def other_encoding(postgres: Postgres, encoding: str) -> str:
    """A database in it, with the table."""
    collation = "TEMPLATE template0 LC_COLLATE 'C' LC_CTYPE 'C'"
    run(postgres.database_url, f"CREATE DATABASE other ENCODING '{encoding}' {collation}")
    url = postgres.database_url.rpartition("/")[0] + "/other"
    run(url, TABLE)
    return url


@pytest.mark.parametrize(("encoding", "text"), [("LATIN1", "Müller"), ("EUC_JP", "山田太郎")])
def test_postgresql_converts_its_encoding(
    start: Start, postgres: Postgres, encoding: str, text: str
) -> None:
    url = other_encoding(postgres, encoding)
    run(url, f"INSERT INTO orders VALUES (1, '{text}', NULL, 1, 1)")
    server = serve(start, url)
    assert strict_json(get(server, NDJSON).content)[0][1] == text
    assert get(server, f"{CSV}?after=0").content == f"1,{text},,1,1\r\n".encode()


@pytest.mark.parametrize("where", ["sqlite", "postgres"])
def test_text_that_is_not_utf_8_cuts_the_download_it_is_in(
    start: Start, request: pytest.FixtureRequest, where: str
) -> None:
    if where == "sqlite":
        url, wrong = request.getfixturevalue("sqlite_url"), "CAST(x'4dfc6c6c6572' AS TEXT)"
        run(url, TABLE)
    else:
        url = other_encoding(request.getfixturevalue("postgres"), "SQL_ASCII")
        wrong = "E'M\\xfcller'"
    run(url, f"INSERT INTO orders VALUES (7, {wrong}, '', 1, 1), (8, 'Zoë', 'ok', 1, 1)")
    server = serve(start, url)
    for path in PATHS:
        reader = RawReader(server.port, path)
        assert_cut(reader)
        assert b"ller" not in reader.body
        curl = subprocess.run(["curl", "-s", server.url + path], capture_output=True, check=False)
        assert curl.returncode == 18  # "transfer closed with outstanding read data remaining"
        server.wait_for_log(rf"{path[1:]} was cut: .*(?:UTF-?8|utf-8)")
        assert parse(path, get(server, f"{path}?after=7").content) == [(8, "Zoë", "ok", 1, 1)]
    assert "Traceback" not in server.log
    assert server.log.count("was cut") == 4


def test_a_middleware_of_starlettes_makes_a_cut_download_look_complete(
    start: Start, sqlite_url: str
) -> None:
    """So export.md warns of it. When Starlette no longer does that, the warning can go."""
    run(sqlite_url, TABLE, "INSERT INTO orders VALUES (1, CAST(x'fc' AS TEXT), '', 1, 1)")
    server = serve(start, sqlite_url, app="with_middleware")
    reader = RawReader(server.port, NDJSON)
    assert read_until([reader], lambda: reader.ended_at)
    assert reader.ended_properly
    server.wait_for_log("orders.ndjson was cut")


# Readers who leave, and too many of them ----------------------------------------------------------


@sharing
def test_readers_who_leave_give_back_their_connections(start: Start, filled_postgres: str) -> None:
    server = serve(start, filled_postgres)
    readers = [slow_reader(server, CSV) for _ in range(10)]
    assert refused(server)  # an eleventh
    for reader in readers[:5]:
        reader.close()
    for reader in readers[5:]:
        reader.reset()
    wait_for(lambda: queries(filled_postgres) == 0, "the queries to end")
    assert not refused(server, f"{CSV}?after={ROWS - 1}")
    assert "Traceback" not in server.log
    assert "was cut" not in server.log


@sharing
@pytest.mark.parametrize("database", ["sqlite", "postgres"])
def test_readers_who_never_read_give_their_connections_back(
    start: Start, request: pytest.FixtureRequest, database: str
) -> None:
    url = request.getfixturevalue(f"filled_{database}")
    server = serve(start, url, app="impatient")
    sockets = []
    for _ in range(10):
        sockets.append(socket.socket())
        sockets[-1].setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        sockets[-1].connect(("127.0.0.1", server.port))
        sockets[-1].sendall(f"GET {CSV} HTTP/1.1\r\nHost: test\r\n\r\n".encode())
    server.wait_for_log("orders.csv was cut: TimeoutError", 10)
    assert get(server, f"{CSV}?after={ROWS - 1}").status_code == 200
    if database == "postgres":
        wait_for(lambda: queries(url) == 0, "the queries to end")
    for each in sockets:
        each.close()
    assert "Traceback" not in server.log


@sharing
def test_a_reader_who_takes_a_little_each_time_gets_all(start: Start, filled_sqlite: str) -> None:
    """The limit is on standing still, not on the length of a download."""
    reader = slow_reader(serve(start, filled_sqlite, app="impatient"), NDJSON)
    for part in range(5):
        assert read_until([reader], lambda: len(reader.body) > part * 1_500_000)  # noqa: B023
        time.sleep(1)
    assert_complete(reader)


def test_a_query_that_computes_is_cancelled(start: Start, postgres: Postgres) -> None:
    """It sends nothing now, so it would not notice by itself that its reader has left."""
    url = fill(postgres.database_url, 9999)
    run(
        url,
        "ALTER DATABASE postgres SET enable_sort = off",  # or it would sort before it sends
        "ALTER TABLE orders RENAME TO base",
        "CREATE VIEW orders AS SELECT * FROM base WHERE id < 9999 OR pg_sleep(600) IS NOT NULL",
    )
    reader = slow_reader(serve(start, url), CSV)
    assert queries(url) == 1
    reader.close()
    wait_for(lambda: queries(url) == 0, "the query to end")


# Downloads that could not be finished -------------------------------------------------------------


@sharing
def test_a_reader_that_goes_on(start: Start, filled_sqlite: str) -> None:
    server = serve(start, filled_sqlite)
    program: dict[str, Any] = {}
    exec(Readme("recipes/export.md").tested("a reader that goes on"), program)
    orders = program["read_orders"](server.url + NDJSON)
    rows = [tuple(next(orders).values())]
    server.kill()
    with ThreadPoolExecutor() as threads:
        threads.submit(server.start)
        rows += [tuple(order.values()) for order in orders]
    assert rows == rows_after(NDJSON, 0)


@sharing
@pytest.mark.parametrize("options", [(), ("--timeout-graceful-shutdown", "1")])
def test_the_server_is_asked_to_stop(
    start: Start, filled_sqlite: str, options: tuple[str, ...]
) -> None:
    """It waits for the download, or cuts it after the time that it is given."""
    server = serve(start, filled_sqlite, *options)
    reader = slow_reader(server, NDJSON)
    server.signal(signal.SIGTERM)
    server.wait_for_log("Shutting down")
    if options:
        server.wait()
        assert_cut(reader)
    else:
        assert_complete(reader)
        assert server.wait() == -signal.SIGTERM


@pytest.mark.parametrize(("path", "dies"), [(CSV, True), (NDJSON, False)])
def test_postgresql_dies_or_hangs(start: Start, postgres: Postgres, path: str, dies: bool) -> None:
    server = serve(start, fill(postgres.database_url, MANY), app="impatient")
    reader = slow_reader(server, path)
    postgres.kill() if dies else postgres.signal(signal.SIGSTOP, everyone=True)
    assert refused(server, path)
    assert_cut(reader)
    postgres.start() if dies else postgres.signal(signal.SIGCONT, everyone=True)
    wait_for(lambda: not refused(server, f"{path}?after={MANY - 1}"), "the database to be back")
    go_on(server, path, reader.body, MANY)
    assert "Traceback" not in server.log


def test_postgresql_fails_over(start: Start, postgres: Postgres) -> None:
    """The first of two addresses takes connections, and says nothing."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        (_, port), other = silent.getsockname(), f"127.0.0.1:{postgres.port}"
        url = fill(postgres.database_url, 10).replace(other, f"127.0.0.1:{port},{other}")
        server = serve(start, url)
        assert not refused(server)


# What keeps any database from answering, and what mends it.
AWAY, BACK = "ALTER TABLE orders RENAME TO kept", "ALTER TABLE kept RENAME TO orders"
COMPUTES = (
    "CREATE VIEW orders AS WITH RECURSIVE n(id) AS (SELECT 1 UNION ALL SELECT id + 1 FROM n)"
    " SELECT id, id AS customer, id AS note, id AS quantity, id AS cents FROM n WHERE id < 0"
)
FAULTS = [
    ([AWAY], [BACK]),
    ([AWAY, COMPUTES], ["DROP VIEW orders", BACK]),
    (
        ["ALTER TABLE orders RENAME COLUMN cents TO euros"],
        ["ALTER TABLE orders RENAME COLUMN euros TO cents"],
    ),
]


def test_a_database_that_gives_no_answer(start: Start, empty_url: str) -> None:
    server = serve(start, fill(empty_url, 10))
    for broken, mended in FAULTS:
        run(empty_url, *broken)
        for path in PATHS:
            assert refused(server, path), broken
        run(empty_url, *mended)
        assert not refused(server), mended
    is_sqlite = empty_url.startswith("sqlite")
    lock = "BEGIN EXCLUSIVE" if is_sqlite else "BEGIN; LOCK TABLE orders"
    connect: Any = sqlite3.connect if is_sqlite else psycopg.connect
    with closing(connect(empty_url.removeprefix("sqlite:///"))) as connection:
        connection.execute(lock)
        assert refused(server)
    assert not refused(server)
    assert "Traceback" not in server.log


def test_a_file_that_is_no_database_now(start: Start, sqlite_url: str) -> None:
    server = serve(start, fill(sqlite_url, 1000))
    file = Path(sqlite_url.removeprefix("sqlite:///"))
    kept = file.rename(file.with_suffix(".kept"))
    for spoil in (Path.mkdir, lambda file: file.write_bytes(b"no database" * 1000)):
        assert refused(server)
        spoil(file)
        assert refused(server)
        shutil.rmtree(file) if file.is_dir() else file.unlink()
    file.write_bytes(kept.read_bytes()[:8192])
    reader = RawReader(server.port, CSV)
    assert read_until([reader], lambda: reader.ended_at)
    assert reader.status == 503 or not reader.ended_properly
    kept.rename(file)
    assert not refused(server)
    assert "Traceback" not in server.log


# The start ----------------------------------------------------------------------------------------


def test_a_database_that_cannot_be_read_yet(
    start: Start, tmp_path: Path, postgres: Postgres
) -> None:
    """The log says so at the start; when it is well, so are the downloads."""
    postgres.kill()
    missing = f"sqlite:///{tmp_path}/missing.db"
    words = {postgres.database_url: "onnection refused", missing: "missing.db.*unable to open"}
    servers = {url: serve(start, url) for url in words}
    for url, server in servers.items():
        server.wait_for_log(f"ERROR.*503.*{words[url]}")
        assert refused(server)
        assert "Traceback" not in server.log
    assert not (tmp_path / "missing.db").exists()
    postgres.start()
    for url, server in servers.items():
        fill(url, 10)
        assert not refused(server)


@pytest.mark.parametrize(
    "url",
    [
        *("mysql://u:geheim@host/db", "orders.db", "sqlite://", "sqlite:///", "geheim"),
        *("postgresql://u:ge/heim@host/db", "postgresql://u:ge@heim@host/db"),
        *("postgresql://u:geheim%@host/db", "postgresql+psycopg://u:geheim", "postgresql://"),
        *("postgresql://u:geheim@host/db?sslmode", "postgresql://u:geheim@host/db?tls=true"),
    ],
)
def test_a_wrong_setting_is_told_in_one_sentence(url: str) -> None:
    command = [sys.executable, "-m", "uvicorn", "recipes.export:app", "--port", str(free_port())]
    environment = ENVIRONMENT | {"DATABASE_URL": url}
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=LIMIT
    )
    assert done.returncode != 0
    (sentence,) = (done.stdout + done.stderr).strip().splitlines()
    assert sentence.startswith("DATABASE_URL should be ")
    assert "heim" not in sentence


@pytest.mark.parametrize(
    "form",
    [
        *("postgres://postgres:geh%20eim@{}", "postgresql+psycopg://postgres:geh%20eim@{}"),
        *("postgresql://{}?user=postgres&password=geheim", "postgresql://postgres:geheim@{}x"),
    ],
)
def test_no_password_is_in_the_log(start: Start, postgres: Postgres, form: str) -> None:
    fill(postgres.database_url, 10)
    url = form.format(f"127.0.0.1:{postgres.port}/postgres")
    server = serve(start, url)
    assert get(server, CSV).status_code == (503 if form.endswith("x") else 200)
    postgres.kill()
    assert refused(server)
    assert "eim" not in server.log


def test_the_file_is_filled_once_and_completely(tmp_path: Path) -> None:
    """A worker is killed while it fills the file; then two start at once."""
    shutil.copy(ROOT / "main.py", tmp_path)
    (tmp_path / "recipes" / "pages").mkdir(parents=True)
    for name in ("export.py", "orders.sql", "common.py"):
        shutil.copy(ROOT / "recipes" / name, tmp_path / "recipes")
    file, journal = (tmp_path / "recipes" / name for name in ("orders.db", "orders.db-journal"))
    environment = {k: v for k, v in ENVIRONMENT.items() if k != "DATABASE_URL"}
    command = [sys.executable, "-m", "uvicorn", "recipes.export:app", "--port"]
    options: dict[str, Any] = {"cwd": tmp_path, "env": environment}

    killed = subprocess.Popen([*command, str(free_port())], stderr=subprocess.DEVNULL, **options)
    wait_for(lambda: file.exists() and file.stat().st_size > 1_000_000, "the filling")
    killed.kill()
    killed.wait()
    assert journal.exists()  # it was in the middle

    def start(number: int) -> Process:
        port = free_port()
        return Process([*command, str(port)], tmp_path / f"{number}.log", port, **options)

    with ThreadPoolExecutor() as threads:
        servers = list(threads.map(start, range(2)))
    try:
        with sqlite3.connect(file) as connection:
            assert connection.execute("SELECT count(*) FROM orders").fetchone() == (1_000_000,)
        for server in servers:
            last = get(server, f"{NDJSON}?after=999999").content
            assert parse(NDJSON, last) == [row(1_000_000)]
    finally:
        for server in servers:
            server.kill()
