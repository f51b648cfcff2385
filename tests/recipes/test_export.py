"""recipes/export.py: whole downloads, cut ones, and what is left behind by readers who leave."""

import csv
import io
import json
import shutil
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

import adbc_driver_postgresql.dbapi
import psutil
import psycopg
import pytest
import requests
from hypothesis import given
from hypothesis import strategies as st
from polars import DataFrame
from polars.exceptions import ComputeError

from recipes.export import PAGE, SCHEMA, fill, to_csv, to_ndjson
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

# More than is kept between a server and a reader with a small buffer who does not read...
ROWS = 150_000
MANY = 400_000  # ...and with a large one, or than a server may hold in its memory
CUSTOMERS = ("Zoë ☕", "Müller, Söhne & Co", "山田太郎", 'Jack "Mac" O\'Neill')
NOTES = ("", None, "ring twice,\nthen wait", "=1+1", "no hurry")
PATHS = ("/orders.csv", "/orders.ndjson")

Row = tuple[Any, ...]

# They share two servers and a database, so they run in one worker.
pytestmark = pytest.mark.xdist_group("export")


def row(i: int) -> Row:
    return (i, CUSTOMERS[i % 4], NOTES[i % 5], i % 9 + 1, i * 37 % 10000)


@cache
def rows_after(path: str, after: int, last: int = ROWS) -> list[Row]:
    """What a reader must get; in CSV NULL is an empty string."""
    rows = [row(i) for i in range(after + 1, last + 1)]
    return [(i, c, n or "", *rest) for i, c, n, *rest in rows] if path == "/orders.csv" else rows


def parse(path: str, body: bytes | bytearray, cut: bool = False) -> list[Row]:
    """The rows of a body without a line of names. The last one of a body that was cut may not be
    whole, so it does not count."""
    if path == "/orders.ndjson":
        lines = body.splitlines()[: -1 if cut else None]
        return [tuple(json.loads(line).values()) for line in lines]
    records = list(csv.reader(io.StringIO(body.decode(errors="ignore"), newline="")))
    return [(int(i), c, n, *map(int, rest)) for i, c, n, *rest in records[: -1 if cut else None]]


def filled(database: Postgres | Path, rows: int = ROWS) -> str:
    """Make the table in PostgreSQL, or in a file; return the database's URL."""
    if isinstance(database, Path):
        with sqlite3.connect(database) as file:
            fill(file.execute, rows)
        return f"sqlite:///{database}"
    with psycopg.connect(database.database_url) as connection:
        fill(lambda statement: connection.execute(statement.encode()), rows)
    return database.database_url


def recipe(database_url: str, *arguments: str) -> tuple[list[str], dict[str, str]]:
    command = [sys.executable, "-m", "uvicorn", "recipes.export:app", "--port", "{port}"]
    return [*command, *arguments], ENVIRONMENT | {"DATABASE_URL": database_url}


@pytest.fixture(scope="module")
def sqlite_url(tmp_path_factory: pytest.TempPathFactory) -> str:
    return filled(tmp_path_factory.mktemp("export") / "orders.db")


@pytest.fixture(scope="module")
def postgres_url() -> Iterator[str]:
    with running_postgres() as postgres:
        yield filled(postgres)


@pytest.fixture(scope="module", params=["sqlite", "postgres"])
def shared(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Process]:
    """One server for the tests that do it no harm."""
    command, environment = recipe(request.getfixturevalue(f"{request.param}_url"))
    with starting(tmp_path_factory.mktemp("server")) as start:
        yield start(*command, env=environment)


def get(server: Process, target: str) -> requests.Response:
    return requests.get(server.url + target, timeout=LIMIT)


def slow_reader(server: Process, target: str) -> RawReader:
    """A reader who has some of the rows, and reads no more until it is told to."""
    reader = RawReader(server.port, target, receive_buffer=4096)
    assert read_until([reader], lambda: len(reader.body) > 10_000)
    return reader


def go_on(server: Process, path: str, body: bytes | bytearray, last: int = ROWS) -> list[Row]:
    """The rows of a body that was cut, and those that a second download brings."""
    rows = parse(path, body.partition(b"\r\n")[2] if path == "/orders.csv" else body, cut=True)
    assert 0 < len(rows) < last
    rest = get(server, f"{path}?after={rows[-1][0]}")
    assert rest.status_code == 200
    return rows + parse(path, rest.content)


# Whole downloads ----------------------------------------------------------------------------------


def test_csv_is_as_rfc_4180_has_it(shared: Process) -> None:
    response = get(shared, "/orders.csv")
    assert response.headers["Content-Type"] == "text/csv; charset=utf-8"
    assert response.headers["Content-Disposition"] == 'attachment; filename="orders.csv"'
    assert response.headers["Cache-Control"] == "no-cache, no-transform"
    first = (
        "id,customer,note,quantity,cents\r\n"
        '1,"Müller, Söhne & Co",,2,37\r\n'
        '2,山田太郎,"ring twice,\nthen wait",3,74\r\n'
        '3,"Jack ""Mac"" O\'Neill",=1+1,4,111\r\n'
        "4,Zoë ☕,no hurry,5,148\r\n"
        '5,"Müller, Söhne & Co","",6,185\r\n'
    )
    _, _, rows = response.content.partition(b"\r\n")
    assert response.content.startswith(first.encode())
    assert parse("/orders.csv", rows) == rows_after("/orders.csv", 0)


def test_ndjson_tells_null_from_an_empty_string(shared: Process) -> None:
    response = get(shared, "/orders.ndjson")
    assert response.headers["Content-Type"] == "application/x-ndjson"
    assert response.headers["Content-Disposition"] == 'attachment; filename="orders.ndjson"'
    first = '{"id":1,"customer":"Müller, Söhne & Co","note":null,"quantity":2,"cents":37}\n'
    assert response.content.startswith(first.encode())
    assert parse("/orders.ndjson", response.content) == rows_after("/orders.ndjson", 0)


@pytest.mark.parametrize("path", PATHS)
def test_the_rows_after_an_id(shared: Process, path: str) -> None:
    for after in (ROWS // 2, ROWS - 2, ROWS, 2**31, 2**63 - 1):
        response = get(shared, f"{path}?after={after}")
        assert response.status_code == 200
        # No line of names: it can be put behind what is there.
        assert parse(path, response.content) == rows_after(path, after), after


@pytest.mark.parametrize("path", PATHS)
def test_no_such_id(shared: Process, path: str) -> None:
    for after in ("-1", str(2**63), "9" * 5000, "", "x", "1.5", "1e400", "NaN", "%00"):
        response = get(shared, f"{path}?after={after}")
        assert response.status_code == 422, after
        assert [error["loc"] for error in response.json()["detail"]] == [["query", "after"]]


@pytest.mark.parametrize("database", ["sqlite", "postgres"])
def test_memory_does_not_grow_with_the_table(
    request: pytest.FixtureRequest, start: Start, tmp_path: Path, database: str
) -> None:
    place = tmp_path / "orders.db" if database == "sqlite" else request.getfixturevalue("postgres")
    command, environment = recipe(filled(place, MANY))
    server = start(*command, env=environment)
    process = psutil.Process(server.pid)
    idle = process.memory_info().rss
    for path in PATHS:
        slow, quick = slow_reader(server, path), RawReader(server.port, path)
        most = 0

        def ended(quick: RawReader = quick) -> bool:
            nonlocal most
            most = max(most, process.memory_info().rss)
            return bool(quick.ended_at)

        assert read_until([quick], ended)
        assert quick.ended_properly
        slow.close()
        assert most - idle < 20_000_000


@given(
    st.lists(
        st.tuples(
            *(st.integers(-(2**63), 2**63 - 1), st.text(), st.none() | st.text()),
            *[st.integers(-(2**63), 2**63 - 1)] * 2,
        ),
        min_size=1,
    )
)
def test_whatever_is_in_a_row_comes_back(rows: list[Row]) -> None:
    page = DataFrame(rows, SCHEMA, orient="row")
    assert [tuple(json.loads(line).values()) for line in to_ndjson(page).splitlines()] == rows
    text = to_csv(page, names=True).decode()
    names, *records = csv.reader(io.StringIO(text, newline=""))
    assert names == list(SCHEMA)
    assert records == [[str("" if value is None else value) for value in row] for row in rows]


def small(tmp_path: Path, *statements: str) -> str:
    """A table of three pages in SQLite, after these statements."""
    url = filled(tmp_path / "orders.db", 3 * PAGE)
    with sqlite3.connect(tmp_path / "orders.db") as connection:
        for statement in statements:
            connection.execute(statement)
    return url


def test_nulls_only_and_then_text(start: Start, tmp_path: Path) -> None:
    """The driver takes a column that begins with nulls for one of numbers."""
    url = small(tmp_path, f"UPDATE orders SET note = NULL WHERE id < {PAGE + PAGE // 2}")
    command, environment = recipe(url)
    server = start(*command, env=environment)
    rows = parse("/orders.ndjson", get(server, "/orders.ndjson").content)
    expected = [row(i) for i in range(1, 3 * PAGE + 1)]
    nulls = [(i, c, None, *rest) for i, c, _, *rest in expected[: PAGE + PAGE // 2 - 1]]
    assert rows == nulls + expected[PAGE + PAGE // 2 - 1 :]


@pytest.mark.parametrize("value", ["'a lot'", "1.5"])
def test_a_value_of_another_type_is_not_passed_on(start: Start, tmp_path: Path, value: str) -> None:
    """SQLite lets it in; a reader who was promised whole numbers must not take it for one."""
    url = small(tmp_path, f"UPDATE orders SET cents = {value} WHERE id = {PAGE + 1}")
    command, environment = recipe(url)
    server = start(*command, env=environment)
    reader = RawReader(server.port, "/orders.ndjson")
    assert read_until([reader], lambda: reader.ended_at)
    assert not reader.ended_properly
    assert len(parse("/orders.ndjson", reader.body, cut=True)) <= PAGE
    server.wait_for_log("orders.cents should be Int64")


def test_a_download_shows_one_moment(start: Start, postgres: Postgres) -> None:
    command, environment = recipe(filled(postgres))
    server = start(*command, env=environment)
    reader = slow_reader(server, "/orders.ndjson")
    with psycopg.connect(postgres.database_url) as connection:
        connection.execute("UPDATE orders SET note = 'later'")
        connection.execute("INSERT INTO orders VALUES (1000000, 'late', NULL, 1, 1)")
    assert read_until([reader], lambda: reader.ended_at)
    assert parse("/orders.ndjson", reader.body) == rows_after("/orders.ndjson", 0)


def test_numeric_of_postgresql_is_selected_as_text(postgres: Postgres) -> None:
    with (
        adbc_driver_postgresql.dbapi.connect(postgres.database_url) as connection,
        connection.cursor() as cursor,
    ):
        cursor.execute("SELECT 1.50::numeric AS price")
        with pytest.raises(ComputeError, match="cannot be written"):
            to_csv(cursor.fetch_polars())
        cursor.execute("SELECT 1.50::numeric::text AS price")
        assert to_csv(cursor.fetch_polars()) == b"1.50\r\n"


def test_sqlite_is_not_written_to_during_a_download(start: Start, tmp_path: Path) -> None:
    command, environment = recipe(filled(tmp_path / "orders.db"))
    server = start(*command, env=environment)
    reader = slow_reader(server, "/orders.ndjson")
    writer = sqlite3.connect(tmp_path / "orders.db", timeout=0)
    with pytest.raises(sqlite3.OperationalError, match="locked"), writer:
        writer.execute("DELETE FROM orders")
    assert read_until([reader], lambda: reader.ended_at)
    assert parse("/orders.ndjson", reader.body) == rows_after("/orders.ndjson", 0)
    with writer:
        writer.execute("DELETE FROM orders")
    writer.close()


# Readers who leave, and too many of them ----------------------------------------------------------


def test_too_many_readers(start: Start, sqlite_url: str) -> None:
    command, environment = recipe(sqlite_url)
    server = start(*command, env=environment)
    readers = [slow_reader(server, "/orders.csv") for _ in range(10)]
    refused = get(server, "/orders.csv")
    assert refused.status_code == 503
    assert refused.headers["Retry-After"] == "5"
    assert refused.json() == {"detail": "The orders cannot be read now. Try again later."}
    for reader in readers:
        reader.close()
    last = f"/orders.csv?after={ROWS - 1}"
    wait_for(lambda: get(server, last).status_code == 200, "a connection that was given back")
    assert "Traceback" not in server.log


def test_a_reader_who_leaves_gives_back_the_connection(start: Start, postgres_url: str) -> None:
    command, environment = recipe(postgres_url)
    server = start(*command, env=environment)
    for leave in (RawReader.close, RawReader.reset):
        reader = slow_reader(server, "/orders.csv")
        assert open_transactions(postgres_url) == 1
        leave(reader)
        wait_for(lambda: open_transactions(postgres_url) == 0, "the transaction to end")
    assert "Traceback" not in server.log


def open_transactions(postgres_url: str) -> int:
    with psycopg.connect(postgres_url) as connection:
        (count,) = connection.execute(
            "SELECT count(*) FROM pg_stat_activity"
            " WHERE xact_start IS NOT NULL AND pid <> pg_backend_pid() AND datname IS NOT NULL"
        ).fetchone() or (0,)
    return int(count)


# Downloads that could not be finished -------------------------------------------------------------


@pytest.mark.parametrize("path", PATHS)
def test_the_server_is_killed(start: Start, path: str, tmp_path: Path) -> None:
    command, environment = recipe(filled(tmp_path / "orders.db", MANY))
    server = start(*command, env=environment)
    file = tmp_path / "download"
    curl = ["curl", "--silent", "--limit-rate", "1M", "--output", file, server.url + path]
    reader = subprocess.Popen([str(word) for word in curl])
    wait_for(lambda: file.exists() and file.stat().st_size > 500_000, "some of the rows")
    server.kill()
    # Whether the last bytes arrive or not: curl does not take it for whole.
    # 18: transfer closed with outstanding read data remaining; 56: connection reset.
    assert reader.wait(LIMIT) in (18, 56)
    server.start()
    assert go_on(server, path, file.read_bytes(), MANY) == rows_after(path, 0, MANY)


def test_a_reader_that_goes_on(start: Start, sqlite_url: str) -> None:
    command, environment = recipe(sqlite_url)
    server = start(*command, env=environment)
    program: dict[str, Any] = {}
    exec(Readme("recipes/README.md").tested("a reader that goes on"), program)
    orders = program["read_orders"](f"{server.url}/orders.ndjson")
    rows = [tuple(next(orders).values())]
    server.kill()
    with ThreadPoolExecutor() as threads:
        threads.submit(server.start)
        rows += [tuple(order.values()) for order in orders]
    assert rows == rows_after("/orders.ndjson", 0)


def test_the_server_is_asked_to_stop_and_waits(start: Start, sqlite_url: str) -> None:
    command, environment = recipe(sqlite_url)
    server = start(*command, env=environment)
    reader = slow_reader(server, "/orders.ndjson")
    server.signal(signal.SIGTERM)
    server.wait_for_log("Shutting down")
    assert read_until([reader], lambda: reader.ended_at)
    assert reader.ended_properly
    assert parse("/orders.ndjson", reader.body) == rows_after("/orders.ndjson", 0)
    assert server.wait() == -signal.SIGTERM


def test_the_server_is_asked_to_stop_and_does_not_wait_for_ever(
    start: Start, sqlite_url: str
) -> None:
    command, environment = recipe(sqlite_url, "--timeout-graceful-shutdown", "1")
    server = start(*command, env=environment)
    reader = slow_reader(server, "/orders.csv")
    server.signal(signal.SIGTERM)
    server.wait()
    assert read_until([reader], lambda: reader.ended_at)
    assert not reader.ended_properly
    server.start()
    assert go_on(server, "/orders.csv", reader.body) == rows_after("/orders.csv", 0)


@pytest.mark.parametrize("path", PATHS)
def test_the_database_goes_away(start: Start, postgres: Postgres, path: str) -> None:
    command, environment = recipe(filled(postgres))
    server = start(*command, env=environment)
    reader = slow_reader(server, path)
    postgres.kill()
    assert read_until([reader], lambda: reader.ended_at)
    assert not reader.ended_properly
    refused = get(server, path)
    assert refused.status_code == 503
    assert refused.headers["Retry-After"] == "5"
    postgres.start()
    assert go_on(server, path, reader.body) == rows_after(path, 0)


# The start ----------------------------------------------------------------------------------------


def test_a_database_that_is_not_there(start: Start, tmp_path: Path, postgres: Postgres) -> None:
    postgres.kill()
    empty = tmp_path / "empty.db"
    empty.touch()
    for url, words in (
        (postgres.database_url, "connection"),
        (f"sqlite:///{empty}", "no such table: orders"),
        (f"sqlite:///{tmp_path}/missing/orders.db", "No such file or directory: "),
    ):
        command, environment = recipe(url)
        server = start(*command, env=environment)
        (line,) = server.wait_for_log("ERROR.*")
        assert "Until the orders can be read, downloads get 503: " in line
        assert words in line
        assert "Traceback" not in server.log
        assert get(server, "/orders.csv").status_code == 503


def test_the_file_is_filled_once_and_whole(tmp_path: Path) -> None:
    """A worker is killed while it fills the file; then two start at once."""
    shutil.copy(ROOT / "main.py", tmp_path)
    (tmp_path / "recipes").mkdir()
    shutil.copy(ROOT / "recipes" / "export.py", tmp_path / "recipes")
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
        assert "".join(server.log for server in servers).count("Making ") == 1
        with sqlite3.connect(file) as connection:
            assert connection.execute("SELECT count(*) FROM orders").fetchone() == (1_000_000,)
        for server in servers:
            last = get(server, "/orders.ndjson?after=999999").content
            assert parse("/orders.ndjson", last) == [row(1_000_000)]
    finally:
        for server in servers:
            server.kill()
