"""recipes/export.py: complete downloads, cut ones, and what is left behind by readers who leave."""

import asyncio
import csv
import io
import itertools
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
from recipes.common import database_url
from tests.support.postgres import Postgres, running_postgres
from tests.support.processes import ENVIRONMENT, LIMIT, ROOT, Process, Start, wait_for
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
TABLE = "CREATE TABLE orders (id bigint, customer text, note text, quantity int, cents int)"
Row = tuple[Any, ...]
numbers = itertools.count()
sharing = pytest.mark.xdist_group("export")  # in one worker, because they share a database


@cache
def rows_after(path: str, after: int, last: int = ROWS) -> list[Row]:
    """What a reader must get; in CSV all is text, and NULL an empty one."""
    ids = range(after + 1, last + 1)
    rows = [(i, CUSTOMERS[i % 4], NOTES[i % 5], i % 9 + 1, i * 37 % 10000) for i in ids]
    return rows if path == NDJSON else [tuple(map(as_text, row)) for row in rows]


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
            file.executescript(";".join(sql))
        return
    with psycopg.connect(url, autocommit=True, client_encoding="UTF8") as connection:
        for statement in sql:
            connection.execute(statement.encode())


def fill(url: str, rows: int = ROWS) -> str:
    """Make the table there; return the URL."""
    sql = SQL.replace("1000000", str(rows))
    if not url.startswith("sqlite"):
        sql = sql.replace("BEGIN IMMEDIATE;", "").replace("COMMIT;", "")
    run(url, sql)
    return url


@pytest.fixture(scope="module")
def cluster() -> Iterator[Postgres]:
    """A PostgreSQL server for all tests that do it no harm, each with a database of its own."""
    with running_postgres() as postgres:
        yield postgres


def new_database(cluster: Postgres, options: str = "") -> str:
    name = f"d{next(numbers)}"
    run(cluster.database_url, f"CREATE DATABASE {name} {options}")
    return cluster.database_url.rpartition("/")[0] + f"/{name}"


@pytest.fixture(scope="module", params=["sqlite", "postgres"])
def filled(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A database with all rows, for tests that only read."""
    if request.param == "postgres":
        return fill(new_database(request.getfixturevalue("cluster")))
    return fill(f"sqlite:///{tmp_path_factory.mktemp('export')}/orders.db")


@pytest.fixture(params=["sqlite", "postgres"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A database without the table."""
    if request.param == "postgres":
        return new_database(request.getfixturevalue("cluster"))
    return f"sqlite:///{tmp_path}/own.db"


url_of_postgres = pytest.mark.parametrize("url", ["postgres"], indirect=True)


def serve(start: Start, url: str, *options: str, app: str = "") -> Process:
    """Run the recipe, or one of tests/support/export_apps.py, on this database."""
    name = f"tests.support.export_apps:{app}" if app else "recipes.export:app"
    return start_app(start, name, *options, DATABASE_URL=url)


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


def read_to_end(reader: RawReader, complete: bool) -> None:
    """Let it read on: it gets all rows of NDJSON, or its download is cut."""
    assert read_until([reader], lambda: reader.ended_at)
    assert (reader.status, reader.ended_properly) == (200, complete)
    if complete:
        assert parse(NDJSON, reader.body) == rows_after(NDJSON, 0)


def wait_for_queries(url: str, count: int) -> None:
    """Until PostgreSQL is at work on so many downloads of this database."""
    sql = "SELECT count(*) FROM pg_stat_activity WHERE query LIKE 'COPY%' AND state = 'active'"
    with psycopg.connect(url, autocommit=True) as connection:

        def queries() -> int:
            found = connection.execute(f"{sql} AND datname = current_database()".encode())
            return int(found.fetchall()[0][0])

        wait_for(lambda: queries() == count, f"{count} queries")


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
WRONG_IDS = ("-1", str(2**63), "9" * 20, "9" * 5000, "", "x", "1.5", "1e400", "NaN", "%00")


@sharing
def test_all_rows_and_those_after_an_id(start: Start, filled: str) -> None:
    server = serve(start, filled)
    for path in PATHS:
        response = get(server, path)
        assert response.headers["Content-Type"] == MEDIA_TYPES[path]
        assert response.headers["Content-Disposition"] == f'attachment; filename="{path[1:]}"'
        # None of the headers of a stream of events: a proxy may compress it.
        assert not {"Cache-Control", "X-Accel-Buffering"} & set(response.headers)
        assert response.content.startswith(FIRST[path].encode())
        rows = response.content.partition(b"\r\n")[2] if path == CSV else response.content
        assert parse(path, rows) == rows_after(path, 0)
        schema = get(server, "/openapi.json").json()["paths"][path]["get"]["responses"]
        assert [*schema["200"]["content"]] == [MEDIA_TYPES[path].partition(";")[0]]
        for after in (ROWS // 2, ROWS - 2, ROWS, 2**31, 2**63 - 1):
            response = get(server, f"{path}?after={after}")
            assert response.status_code == 200
            # No line of names: it can be put behind what is there.
            assert parse(path, response.content) == rows_after(path, after), after
        for wrong in WRONG_IDS:
            response = get(server, f"{path}?after={wrong}")
            assert response.status_code == 422, wrong
            assert [error["loc"] for error in response.json()["detail"]] == [["query", "after"]]


def test_memory_is_bounded_by_bytes(start: Start, url: str) -> None:
    """Of many rows, and of large ones."""
    server = serve(start, fill(url))
    run(url, f"UPDATE orders SET customer = '☕', note = '{100_000 * 'x'}' WHERE id <= 500")
    last = {path: get(server, f"{path}?after={ROWS - 1}").content for path in PATHS}
    process = psutil.Process(server.pid)
    idle = most = process.memory_info().rss
    for path in PATHS:
        slow, quick = slow_reader(server, path), RawReader(server.port, path)
        while not read_until([quick], lambda: quick.ended_at, limit=0.05):  # noqa: B023
            most = max(most, process.memory_info().rss)
        assert quick.ended_properly
        assert quick.body.endswith(last[path])
        assert len(quick.body) > 50_000_000
        slow.close()
    assert most - idle < 20_000_000


@pytest.mark.parametrize(
    ("url", "mode"), [("sqlite", "DELETE"), ("sqlite", "WAL"), ("postgres", "")], indirect=["url"]
)
def test_a_download_shows_one_moment(start: Start, url: str, mode: str) -> None:
    """PostgreSQL and SQLite in WAL mode are written to meanwhile. Otherwise SQLite is locked."""
    fill(url)
    if mode:
        run(url, f"PRAGMA journal_mode = {mode}")
    reader = slow_reader(serve(start, url), NDJSON)
    change = ("UPDATE orders SET note = 'later'", "DELETE FROM orders WHERE id > 9")
    if mode == "DELETE":
        with pytest.raises(sqlite3.OperationalError, match="locked"):
            run(url, "PRAGMA busy_timeout = 0", *change)
    else:
        run(url, *change)
    read_to_end(reader, complete=True)


# Values -------------------------------------------------------------------------------------------

NUMBER = st.integers(-(2**63), 2**63 - 1)
ANY = st.none() | NUMBER | st.floats(allow_nan=False) | st.text() | st.binary()


@settings(deadline=None)
@given(st.dictionaries(NUMBER, st.tuples(ANY, ANY, ANY, ANY), max_size=10))
@example({2**53 + 1: ("a\0b", "\U0001f600", float("inf"), b"\0\xff")})
@example({1: ("a,b", "\r", "\n", 'a "b"')})
def test_whatever_is_in_a_row_of_sqlite_comes_back(orders: dict[int, Row]) -> None:
    rows = sorted((key, *values) for key, values in orders.items())

    async def read(form: str) -> bytes:
        return b"".join(export.read_sqlite(form, "", asyncio.timeout(None)))

    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(export, "DATABASE_URL", f"sqlite:///{folder}/own.db")
        with closing(sqlite3.connect(f"{folder}/own.db")) as file, file:
            file.execute("CREATE TABLE orders (id, customer, note, quantity, cents)")
            file.executemany("INSERT INTO orders VALUES (?, ?, ?, ?, ?)", rows)
        texts = parse(CSV, asyncio.run(read(export.CSV)))[1:]
        values = parse(NDJSON, asyncio.run(read(export.NDJSON)))
    assert texts == [tuple(map(as_text, row)) for row in rows]
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
]


@url_of_postgres
def test_any_type_of_postgresql(start: Start, url: str) -> None:
    run(url, "CREATE TYPE mood AS ENUM ('so, so')", "CREATE TYPE pair AS (a int, b text)")
    server = serve(start, url)
    for sql, value, text in TYPES:
        columns = f"gen_random_uuid() id, {sql} customer, {sql} note, 1 quantity, NULL cents"
        run(url, "DROP VIEW IF EXISTS orders", f"CREATE VIEW orders AS SELECT {columns}")
        ((_, *values),) = parse(NDJSON, get(server, NDJSON).content)
        assert values == [value, value, 1, None], sql
        _, (_, *texts) = parse(CSV, get(server, CSV).content)
        assert texts == [text, text, "1", ""], sql


@pytest.mark.parametrize("encoding", ["", "SQL_ASCII", "LATIN1", "EUC_JP"])
def test_text_is_utf_8_or_cuts_the_download_it_is_in(
    start: Start, cluster: Postgres, tmp_path: Path, encoding: str
) -> None:
    """In SQLite, and in databases of PostgreSQL with these encodings."""
    url = f"sqlite:///{tmp_path}/own.db"
    if encoding:
        collation = "TEMPLATE template0 LC_COLLATE 'C' LC_CTYPE 'C'"
        url = new_database(cluster, f"ENCODING '{encoding}' {collation}")
    wrong = {"": "CAST(x'4dfc6c6c6572' AS TEXT)", "SQL_ASCII": r"E'M\xfcller'"}.get(encoding)
    text = "山田太郎" if encoding == "EUC_JP" else "Müller"
    run(url, TABLE, f"INSERT INTO orders VALUES (8, '{text}', 'ok', 1, 1)")
    server = serve(start, url)
    if wrong:
        run(url, f"INSERT INTO orders VALUES (7, {wrong}, '', 1, 1)")
        for path in PATHS:
            reader = RawReader(server.port, path)
            read_to_end(reader, complete=False)
            assert b"ller" not in reader.body
            curl = subprocess.run(["curl", "-s", server.url + path], stdout=subprocess.DEVNULL)
            assert curl.returncode == 18  # "transfer closed with outstanding read data remaining"
            server.wait_for_log(rf"{path[1:]} was cut: .*(?:UTF-?8|utf-8)", 2)
    assert parse(CSV, get(server, f"{CSV}?after=7").content) == [("8", text, "ok", "1", "1")]
    assert parse(NDJSON, get(server, f"{NDJSON}?after=7").content) == [(8, text, "ok", 1, 1)]
    assert "Traceback" not in server.log
    assert server.log.count("was cut") == (4 if wrong else 0)
    if not encoding:  # export.md warns of a middleware. When Starlette has changed, that can go.
        reader = RawReader(serve(start, url, app="with_middleware").port, NDJSON)
        assert read_until([reader], lambda: reader.ended_at)
        assert reader.ended_properly


# Readers who leave, and too many of them ----------------------------------------------------------


@sharing
@pytest.mark.parametrize("filled", ["postgres"], indirect=True)
def test_readers_who_leave_give_back_their_connections(start: Start, filled: str) -> None:
    server = serve(start, filled)
    readers = [slow_reader(server, CSV) for _ in range(10)]
    assert refused(server)  # an eleventh
    for reader in readers[:5]:
        reader.close()
    for reader in readers[5:]:
        reader.reset()
    wait_for_queries(filled, 0)
    assert not refused(server, f"{CSV}?after={ROWS - 1}")
    assert "Traceback" not in server.log
    assert "was cut" not in server.log


@sharing
def test_readers_who_stand_still_are_cut(start: Start, filled: str) -> None:
    """The limit is not on the length of a download: one that takes a little each time gets all."""
    server = serve(start, filled, app="impatient")
    reader = slow_reader(server, NDJSON)
    others = [RawReader(server.port, CSV, receive_buffer=4096) for _ in range(9)]
    for part in range(4):
        assert read_until([reader], lambda: len(reader.body) > part * 1_500_000)  # noqa: B023
        time.sleep(0.8)
    read_to_end(reader, complete=True)
    server.wait_for_log("orders.csv was cut: TimeoutError", 9)
    assert get(server, f"{CSV}?after={ROWS - 1}").status_code == 200
    if "postgres" in filled:
        wait_for_queries(filled, 0)
    for other in others:
        other.close()
    assert "Traceback" not in server.log


@url_of_postgres
def test_a_query_that_computes_is_cancelled(start: Start, url: str) -> None:
    """It sends nothing now, so it would not notice by itself that its reader has left."""
    fill(url, 9999)
    run(
        url,
        # With a sort, it would send nothing before it has computed all.
        f"ALTER DATABASE {url.rpartition('/')[2]} SET enable_sort = off",
        "ALTER TABLE orders RENAME TO base",
        "CREATE VIEW orders AS SELECT * FROM base WHERE id < 9999 OR pg_sleep(600) IS NOT NULL",
    )
    reader = slow_reader(serve(start, url), CSV)
    wait_for_queries(url, 1)
    reader.close()
    wait_for_queries(url, 0)


# Downloads that could not be finished -------------------------------------------------------------


@sharing
@pytest.mark.parametrize("filled", ["sqlite"], indirect=True)
@pytest.mark.parametrize("options", [(), ("--timeout-graceful-shutdown", "1")])
def test_the_server_ends(start: Start, filled: str, options: tuple[str, ...]) -> None:
    """It waits for a download, or cuts it after the time that it is given, or is killed."""
    server = serve(start, filled, *options)
    reader = slow_reader(server, NDJSON)
    server.signal(signal.SIGTERM)
    server.wait_for_log("Shutting down")
    if not options:
        read_to_end(reader, complete=True)
        assert server.wait() == -signal.SIGTERM
        return
    server.wait()
    read_to_end(reader, complete=False)
    server.start()
    program: dict[str, Any] = {}
    exec(Readme("recipes/export.md").tested("a reader that goes on"), program)
    orders = program["read_orders"](server.url + NDJSON)
    rows = [tuple(next(orders).values())]
    server.kill()
    with ThreadPoolExecutor() as threads:
        threads.submit(server.start)
        rows += [tuple(order.values()) for order in orders]
    assert rows == rows_after(NDJSON, 0)


def test_postgresql_dies_or_hangs(start: Start, postgres: Postgres) -> None:
    server = serve(start, fill(postgres.database_url, MANY), app="impatient")
    last = f"{CSV}?after={MANY - 1}"
    for dies in (True, False):
        reader = slow_reader(server, CSV)
        postgres.kill() if dies else postgres.signal(signal.SIGSTOP, everyone=True)
        assert refused(server)
        read_to_end(reader, complete=False)
        postgres.start() if dies else postgres.signal(signal.SIGCONT, everyone=True)
        wait_for(lambda: not refused(server, last), "the database to be back")
        complete_rows = reader.body[: reader.body.rindex(b"\r\n") + 2]
        _, *rows = parse(CSV, complete_rows)
        assert 0 < len(rows) < MANY
        rows += parse(CSV, get(server, f"{CSV}?after={rows[-1][0]}").content)
        assert rows == rows_after(CSV, 0, MANY)
    assert "Traceback" not in server.log


@url_of_postgres
def test_postgresql_fails_over(start: Start, cluster: Postgres, url: str) -> None:
    """The first of two addresses takes connections, and says nothing."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        (_, port), other = silent.getsockname(), f"127.0.0.1:{cluster.port}"
        server = serve(start, fill(url, 10).replace(other, f"127.0.0.1:{port},{other}"))
        assert not refused(server)


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


def test_a_database_that_gives_no_answer(start: Start, url: str) -> None:
    server = serve(start, fill(url, 10))
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
    assert "Traceback" not in server.log


@pytest.mark.parametrize("url", ["sqlite"], indirect=True)
def test_a_file_that_is_no_database_now(start: Start, url: str) -> None:
    server = serve(start, fill(url, 1000))
    file = Path(url.removeprefix("sqlite:///"))
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
    """The log says so at the start, without a password; when it is well, so are the downloads."""
    postgres.kill()
    place, missing = f"127.0.0.1:{postgres.port}", f"sqlite:///{tmp_path}/missing.db"
    words = {
        missing: "missing.db.*unable to open",
        f"postgres://postgres:geh%20eim@{place}/postgres": "onnection refused",
        f"postgresql+psycopg://{place}/postgres?user=postgres&password=geheim": "onnection refused",
        f"postgresql://postgres:geheim@{place}/other": "onnection refused",
    }
    with ThreadPoolExecutor() as threads:
        servers = dict(zip(words, threads.map(lambda url: serve(start, url), words), strict=True))
    for url, server in servers.items():
        server.wait_for_log(f"ERROR.*503.*{words[url]}")
        assert refused(server)
    assert not (tmp_path / "missing.db").exists()
    postgres.start()
    fill(postgres.database_url, 10)
    fill(missing, 10)
    for url, server in servers.items():
        assert refused(server) == url.endswith("/other")
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
    (recipes / "orders.sql").write_text(SQL.replace("1000000", "300000"))
    file = recipes / "orders.db"
    command = [sys.executable, "-m", "uvicorn", "recipes.export:app", "--port"]
    options: dict[str, Any] = {"cwd": recipes.parent, "env": ENVIRONMENT | {"DATABASE_URL": ""}}

    killed = subprocess.Popen([*command, "0"], stderr=subprocess.DEVNULL, **options)
    wait_for(lambda: file.exists() and file.stat().st_size > 1_000_000, "the filling")
    killed.kill()
    killed.wait()
    assert file.with_name("orders.db-journal").exists()  # it was in the middle

    with ThreadPoolExecutor() as threads:
        servers = list(threads.map(lambda _: start(*command, "{port}", **options), range(2)))
    with closing(sqlite3.connect(file)) as connection:
        assert connection.execute("SELECT count(*) FROM orders").fetchone() == (300_000,)
    for server in servers:
        last = get(server, f"{NDJSON}?after=299999").content
        assert parse(NDJSON, last) == rows_after(NDJSON, 299_999, 300_000)
