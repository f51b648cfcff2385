"""A table of any size as a download, CSV or NDJSON, at constant memory.

Take it when people or programs want all rows at once. When they want the rows that will come, take
a stream with ids (tail, feed); when making the rows takes minutes, a task (long_task).

    uvicorn recipes.export:app --reload
    curl -OJ localhost:8000/orders.csv
    curl "localhost:8000/orders.ndjson?after=999998"

`after` is the id of the last whole row that a reader has: a download that broke off goes on there.
Without `DATABASE_URL` the orders are in `orders.db`, next to this file, made at the first start.
"""

import io
import logging
import os
import sqlite3
from collections.abc import AsyncIterator, Callable, Generator, Iterator
from contextlib import asynccontextmanager, closing
from itertools import chain
from pathlib import Path
from threading import BoundedSemaphore
from typing import Annotated

import adbc_driver_postgresql.dbapi
import adbc_driver_sqlite.dbapi
from adbc_driver_manager.dbapi import Connection, Error
from fastapi import Depends, FastAPI, HTTPException, Query, Request, Response
from fastapi.responses import StreamingResponse
from polars import DataFrame, Int64, Schema, String
from polars.exceptions import SchemaError

from main import HEADERS, NDJSON

logger = logging.getLogger("uvicorn.error")  # what uvicorn shows without being told to

# 1. The table -------------------------------------------------------------------------------------

FILE = Path(__file__).with_name("orders.db")
DATABASE_URL = os.environ.get("DATABASE_URL", f"sqlite:///{FILE}")
SCHEMA = Schema(
    {"id": Int64, "customer": String, "note": String, "quantity": Int64, "cents": Int64}
)

TABLE = """
    CREATE TABLE orders (
        id INTEGER PRIMARY KEY,
        customer TEXT NOT NULL,
        note TEXT,
        quantity INTEGER NOT NULL,
        cents INTEGER NOT NULL
    )
"""
# All that has to survive: commas, quotes, line breaks, NULL, an empty string, other alphabets.
FILL = """
    INSERT INTO orders
    WITH RECURSIVE numbers(id) AS (SELECT 1 UNION ALL SELECT id + 1 FROM numbers WHERE id < {rows})
    SELECT
        id,
        CASE id % 4 WHEN 0 THEN 'Zoë ☕' WHEN 1 THEN 'Müller, Söhne & Co' WHEN 2 THEN '山田太郎'
            ELSE 'Jack "Mac" O''Neill' END,
        CASE id % 5 WHEN 0 THEN '' WHEN 1 THEN NULL WHEN 2 THEN 'ring twice,
then wait' WHEN 3 THEN '=1+1' ELSE 'no hurry' END,
        id % 9 + 1,
        id * 37 % 10000
    FROM numbers
"""


def fill(execute: Callable[[str], object], rows: int) -> None:
    """Make the table, with so many rows. `execute` is a connection's, in a transaction."""
    execute(TABLE)
    execute(FILL.format(rows=rows))


def fill_missing_file() -> None:
    """Fill the recipe's own database, once, however many workers start.

    In one transaction: a worker that is killed meanwhile leaves no table, and the next one fills.
    """
    with closing(sqlite3.connect(FILE, timeout=60, isolation_level=None)) as connection:  # s
        made = "SELECT name FROM sqlite_master WHERE name = 'orders'"
        if connection.execute(made).fetchone():
            return
        connection.execute("BEGIN IMMEDIATE")  # waits for another worker that fills it
        if not connection.execute(made).fetchone():
            logger.info("Making %s with 1,000,000 orders: takes a few seconds, once.", FILE)
            fill(connection.execute, 1_000_000)
        connection.execute("COMMIT")


# 2. The rows --------------------------------------------------------------------------------------

PAGE = 2000  # rows
# Each download has a connection of its own until its reader has got the last row, or has left.
# One more is answered with 503: to wait for a connection would block one of 40 threads.
downloads = BoundedSemaphore(10)

POSTGRESQL = DATABASE_URL.startswith("postgres")
OPTIONS = (
    # Otherwise the driver sends each query as a COPY, and FETCH cannot be sent so.
    {"adbc.postgresql.use_copy": "false"}
    if POSTGRESQL
    # A column of SQLite has no type of its own: the driver takes it from so many first values.
    # https://arrow.apache.org/adbc/current/python/recipe/sqlite.html
    else {"adbc.sqlite.query.batch_rows": str(PAGE)}
)


def connect() -> Connection:
    if POSTGRESQL:
        connection: Connection = adbc_driver_postgresql.dbapi.connect(DATABASE_URL)
        return connection
    # Strict: of a file that is not there the driver would make an empty one.
    file = Path(DATABASE_URL.removeprefix("sqlite:///")).resolve(strict=True)
    return adbc_driver_sqlite.dbapi.connect(str(file))


def read_pages(after: int | None = None) -> Generator[DataFrame, None, None]:
    """Yield the orders after this id, or all, in pages, as they are at one moment.

    No row becomes an object of Python: the drivers give Arrow's columns, which Polars writes. To
    make tuples of 1,000,000 rows takes longer than all the rest.
    There is a first page always; it may be empty. Raises the driver's `Error`, `OSError` for a file
    that is not there, and `SchemaError` for a value that is not of its column's type.
    """
    with connect() as connection, connection.cursor() as cursor:  # and in a transaction
        cursor.adbc_statement.set_options(**OPTIONS)
        if POSTGRESQL:  # it keeps the result on its side: a server-side cursor
            cursor.execute(f"DECLARE result NO SCROLL CURSOR FOR {select(after)}")
        while True:
            cursor.execute(
                f"FETCH {PAGE} FROM result" if POSTGRESQL else f"{select(after)} LIMIT {PAGE}"
            )
            page = cursor.fetch_polars()
            check_types(page)
            yield page
            if len(page) < PAGE:
                return
            after = page["id"][-1]


def select(after: int | None) -> str:
    where = "" if after is None else f"WHERE id > {after}"
    return f"SELECT {', '.join(SCHEMA)} FROM orders {where} ORDER BY id"


def check_types(page: DataFrame) -> None:
    """Refuse a page with values of another type than their column's: SQLite lets them in, and the
    driver would change the others to fit.
    """
    for column in page:
        kind, type_ = column.dtype, SCHEMA[column.name]
        is_right = kind == type_ or (kind.is_integer() and type_.is_integer())
        if not is_right and column.null_count() < len(column):
            raise SchemaError(f"orders.{column.name} should be {type_}, and holds {kind} as well.")


# 3. The formats -----------------------------------------------------------------------------------

CSV = "text/csv"  # Starlette adds the charset


def to_csv(page: DataFrame, names: bool = False) -> bytes:
    """The rows as RFC 4180 has them: CRLF, and quotes where a value needs them.

    CSV has no NULL: it is nothing, and an empty string is "", as in PostgreSQL's COPY. A value
    with a leading = stays as it is, for it is data; only a spreadsheet takes it for a formula.
    """
    lines = io.BytesIO()
    page.write_csv(lines, include_header=names, line_terminator="\r\n")
    return lines.getvalue()


def to_ndjson(page: DataFrame) -> bytes:
    """Each row as a line of JSON, with NULL as null."""
    lines = io.BytesIO()
    page.write_ndjson(lines)
    return lines.getvalue()


# 4. The download ----------------------------------------------------------------------------------

After = Annotated[
    int | None, Query(ge=0, le=2**63 - 1, description="Only the rows after the one with this id.")
]


def open_orders(request: Request, after: After = None) -> Iterator[Iterator[DataFrame]]:
    """Give the pages. FastAPI closes them when the download is over, however it ends.

    The first one is read before the answer begins: a database that is away is a 503, not a 200
    that is cut.
    """
    if not downloads.acquire(blocking=False):
        raise unavailable(request, "all downloads that may run at once are running")
    try:
        with closing(read_pages(after)) as pages:
            try:
                first = next(pages)
            except (Error, OSError) as error:
                raise unavailable(request, reason(error)) from error
            yield chain([first], pages)
    finally:
        downloads.release()


Orders = Annotated[Iterator[DataFrame], Depends(open_orders)]


def unavailable(request: Request, why: str) -> HTTPException:
    logger.error("503 for %s: %s", request.url.path, why)
    detail = "The orders cannot be read now. Try again later."
    return HTTPException(503, detail, {"Retry-After": "5"})


def reason(error: Exception) -> str:
    """What the driver said, in one line, without the statement that follows it."""
    return str(error).partition("\n")[0]


def download(chunks: Iterator[bytes], media_type: str, filename: str) -> StreamingResponse:
    """Answer with the chunks. Starlette runs the generator in a thread, from one to the next.

    If it raises, the server closes the connection without the end of the body: the reader sees
    that it was cut.
    """
    headers = {"Content-Disposition": f'attachment; filename="{filename}"', **HEADERS}
    return StreamingResponse(chunks, headers=headers, media_type=media_type)


@asynccontextmanager
async def lifespan(_: FastAPI) -> AsyncIterator[None]:
    if "DATABASE_URL" not in os.environ:
        fill_missing_file()
    try:
        with closing(read_pages()) as pages:
            to_csv(next(pages))  # Polars starts its threads now, and not for the first reader
    except (Error, OSError) as error:
        logger.error("Until the orders can be read, downloads get 503: %s", reason(error))
    yield


app = FastAPI(title="Export", lifespan=lifespan)


@app.get("/orders.csv", response_class=Response, responses={200: {"content": {CSV: {}}}})
def orders_csv(request: Request, orders: Orders) -> StreamingResponse:
    """All orders as CSV. With `after` without a line of names: it is put behind what is there."""

    def chunks() -> Iterator[bytes]:
        yield to_csv(next(orders), names="after" not in request.query_params)
        yield from map(to_csv, orders)

    return download(chunks(), CSV, "orders.csv")


@app.get("/orders.ndjson", response_class=Response, responses={200: {"content": {NDJSON: {}}}})
def orders_ndjson(orders: Orders) -> StreamingResponse:
    """All orders as lines of JSON."""
    return download(map(to_ndjson, orders), NDJSON, "orders.ndjson")
