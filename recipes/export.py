"""A table of any size as a download, CSV or NDJSON, at constant memory.

Take it when people or programs want all rows at once. When they want the rows that will come, take
a stream with ids (tail, feed); when making the rows takes minutes, a task (long_task).

    uvicorn recipes.export:app --reload
    curl -OJ localhost:8000/orders.csv
    curl "localhost:8000/orders.ndjson?after=999998"

`after` is the id of the last whole row that a reader has: a download that broke off goes on there.
Without `DATABASE_URL` the orders are in `orders.db`, next to this file, made at the first start.
"""

import csv
import io
import logging
import os
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Annotated, Any

import orjson
from fastapi import Depends, FastAPI, Query, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse
from sqlalchemy import (
    BigInteger,
    Column,
    Connection,
    Integer,
    MetaData,
    Result,
    Table,
    Text,
    create_engine,
    inspect,
    select,
    text,
)
from sqlalchemy.exc import SQLAlchemyError

from main import HEADERS, NDJSON

logger = logging.getLogger("uvicorn.error")  # what uvicorn shows without being told to

# 1. The table -------------------------------------------------------------------------------------

FILE = Path(__file__).with_name("orders.db")
DATABASE_URL = os.environ.get("DATABASE_URL", f"sqlite:///{FILE}")
# Each download has a connection of its own until its reader has got the last row, or has left.
# One download more is answered with 503: waiting for a connection would block a thread.
engine = create_engine(
    DATABASE_URL, pool_size=10, max_overflow=0, pool_timeout=0, pool_pre_ping=True
)

orders = Table(
    "orders",
    MetaData(),
    # In SQLite only INTEGER makes the id the key by which the table is stored.
    Column("id", BigInteger().with_variant(Integer, "sqlite"), primary_key=True),
    Column("customer", Text, nullable=False),
    Column("note", Text),
    Column("quantity", Integer, nullable=False),
    Column("cents", Integer, nullable=False),
)

# All that has to survive: commas, quotes, line breaks, NULL, an empty string, other alphabets.
FILL = text("""
    INSERT INTO orders
    WITH RECURSIVE numbers(id) AS (SELECT 1 UNION ALL SELECT id + 1 FROM numbers WHERE id < :rows)
    SELECT
        id,
        CASE id % 4 WHEN 0 THEN 'Zoë ☕' WHEN 1 THEN 'Müller, Söhne & Co' WHEN 2 THEN '山田太郎'
            ELSE 'Jack "Mac" O''Neill' END,
        CASE id % 5 WHEN 0 THEN '' WHEN 1 THEN NULL WHEN 2 THEN 'ring twice,
then wait' WHEN 3 THEN '=1+1' ELSE 'no hurry' END,
        id % 9 + 1,
        id * 37 % 10000
    FROM numbers
""")


def fill(connection: Connection, rows: int) -> None:
    """Make the table, with so many rows, in the transaction that the connection is in."""
    orders.create(connection)
    connection.execute(FILL, {"rows": rows})


def fill_missing_file() -> None:
    """Fill the recipe's own database, once, however many workers start.

    In one transaction: a worker that is killed meanwhile leaves no table, and the next one fills.
    """
    with engine.begin() as connection:
        connection.exec_driver_sql("PRAGMA busy_timeout = 60000")  # ms; another worker may fill it
        if not inspect(connection).has_table("orders"):
            connection.exec_driver_sql("BEGIN IMMEDIATE")
            if not inspect(connection).has_table("orders"):
                logger.info("Making %s with 1,000,000 orders: takes a few seconds, once.", FILE)
                fill(connection, 1_000_000)


@asynccontextmanager
async def lifespan(_: FastAPI) -> AsyncIterator[None]:
    if "DATABASE_URL" not in os.environ:
        fill_missing_file()
    try:
        with engine.connect() as connection:
            connection.execute(select(orders).limit(1))
    except SQLAlchemyError as error:
        logger.error("Until the orders can be read, downloads get 503: %s", reason(error))
    yield


# 2. The formats -----------------------------------------------------------------------------------

CSV = "text/csv"  # Starlette adds the charset
Rows = Sequence[Sequence[Any]]
# Rows. From 700 new ones on, each batch would start Python's garbage collection, and each hundredth
# a full one, which stops the whole process for 40 ms.
# https://docs.python.org/3/library/gc.html#gc.set_threshold
BATCH = 500
COLUMNS = [str(column.name) for column in orders.columns]


def to_csv(rows: Rows) -> bytes:
    """The rows as RFC 4180 has them: CRLF, and quotes where a value needs them.

    CSV has no NULL: it looks like an empty string. A value with a leading = stays as it is, for it
    is data; only a spreadsheet takes it for a formula.
    """
    lines = io.StringIO(newline="")
    csv.writer(lines).writerows(rows)
    return lines.getvalue().encode()


def to_ndjson(rows: Rows) -> bytes:
    """Each row as a line of JSON, with NULL as null."""
    items = [dict(zip(COLUMNS, row, strict=False)) for row in rows]
    return b"".join([orjson.dumps(item) + b"\n" for item in items])


# 3. The download ----------------------------------------------------------------------------------

After = Annotated[
    int | None, Query(ge=0, le=2**63 - 1, description="Only the rows after the one with this id.")
]


def run_query(after: After = None) -> Iterator[Result[Any]]:
    """Give a cursor on the rows. FastAPI closes it when the download is over, however it ends.

    It is opened before the answer begins: a database that is away is a 503, not a cut 200.
    """
    query = select(orders).order_by(orders.c.id)
    if after is not None:
        query = query.where(orders.c.id > after)
    # With yield_per PostgreSQL keeps the result on its side: a server-side cursor.
    options = {"yield_per": BATCH}
    with (
        engine.connect() as connection,
        connection.execute(query, execution_options=options) as rows,
    ):
        yield rows


Orders = Annotated[Result[Any], Depends(run_query)]


def download(chunks: Iterator[bytes], media_type: str, filename: str) -> StreamingResponse:
    """Answer with the chunks. Starlette runs the generator in a thread, from one to the next.

    If it raises, the server closes the connection without the end of the body: the reader sees
    that it was cut.
    """
    headers = {"Content-Disposition": f'attachment; filename="{filename}"', **HEADERS}
    return StreamingResponse(chunks, headers=headers, media_type=media_type)


def reason(error: SQLAlchemyError) -> str:
    """What the database said, in one line, without the statement and links that follow it."""
    return str(getattr(error, "orig", error)).partition("\n")[0]


app = FastAPI(title="Export", lifespan=lifespan)


@app.exception_handler(SQLAlchemyError)
async def unavailable(request: Request, error: SQLAlchemyError) -> JSONResponse:
    logger.error("503 for %s: %s", request.url.path, reason(error))
    detail = "The orders cannot be read now. Try again later."
    return JSONResponse({"detail": detail}, 503, {"Retry-After": "5"})


@app.get("/orders.csv", response_class=Response, responses={200: {"content": {CSV: {}}}})
def orders_csv(request: Request, rows: Orders) -> StreamingResponse:
    """All orders as CSV. With `after` without a line of names: it is put behind what is there."""

    def chunks() -> Iterator[bytes]:
        if "after" not in request.query_params:
            yield to_csv([COLUMNS])
        yield from map(to_csv, rows.partitions())

    return download(chunks(), CSV, "orders.csv")


@app.get("/orders.ndjson", response_class=Response, responses={200: {"content": {NDJSON: {}}}})
def orders_ndjson(rows: Orders) -> StreamingResponse:
    """All orders as lines of JSON."""
    return download(map(to_ndjson, rows.partitions()), NDJSON, "orders.ndjson")
