"""A table of any size as a download, CSV or NDJSON, in little memory.

Take it when people or programs want all rows at once. For rows that are still to come, take a
stream with ids (feed). If it takes minutes to make the rows, take a task (long_task).

    uvicorn recipes.export:app --reload
    curl -OJ localhost:8000/orders.csv
    curl "localhost:8000/orders.ndjson?after=999998"

`after` is the id of the last complete row that a reader has: a download that was cut goes on there.
`DATABASE_URL` is postgresql://… or sqlite:///FILE. Without it, the recipe makes a file, orders.db.
"""

import asyncio
import csv
import io
import logging
import sqlite3
from collections.abc import AsyncGenerator, AsyncIterator, Generator, Iterator, Sequence
from contextlib import asynccontextmanager, closing, suppress
from pathlib import Path
from typing import Annotated, Any

import psycopg
from fastapi import FastAPI, HTTPException, Query, Request, Response
from pydantic_core import to_json
from starlette.concurrency import run_in_threadpool
from starlette.types import Message, Receive, Scope, Send

from main import HEADERS, Stream
from recipes.common import database_url, in_one_line, prepare

FILE = Path(__file__).resolve().with_name("orders.db")
DATABASE_URL = database_url(default=f"sqlite:///{FILE}")
IS_POSTGRES = DATABASE_URL.startswith("postgresql:")
COLUMNS = ["id", "customer", "note", "quantity", "cents"]
MEDIA_TYPES = {"csv": "text/csv", "ndjson": "application/x-ndjson"}
CHUNK = 128 * 1024  # bytes: a download has so much in memory, and the rest of a row
ANSWER = 4.0  # seconds until the database has to begin its answer
PATIENCE = 60.0  # seconds for which a download may then stand still
connections = asyncio.Semaphore(10)  # each download has one until its end
logger = logging.getLogger("uvicorn.error")

# 1. The rows, in chunks. The first one is empty: it says that the database begins to answer. ------


def read_sqlite(form: str, where: str) -> Generator[bytes]:
    # rw does not make a missing file. (With ro, SQLite could not undo what a crash left behind.)
    uri = Path(DATABASE_URL.removeprefix("sqlite:///")).absolute().as_uri() + "?mode=rw"
    with closing(sqlite3.connect(uri, uri=True, timeout=3, check_same_thread=False)) as connection:
        rows = connection.execute(f"SELECT {', '.join(COLUMNS)} FROM orders {where} ORDER BY id")
        yield b""
        if form == "csv" and not where:
            yield to_csv(iter([COLUMNS]))
        while chunk := (to_csv if form == "csv" else to_ndjson)(rows):
            yield chunk


def to_csv(rows: Iterator[Sequence[Any]]) -> bytes:
    """Take rows until the chunk is full. In CSV, NULL is nothing; a BLOB is hexadecimal."""
    text = io.StringIO(newline="")
    writer = csv.writer(text)
    for row in rows:
        if bytes in map(type, row):
            row = [value.hex() if type(value) is bytes else value for value in row]
        writer.writerow(row)
        if text.tell() >= CHUNK:
            break
    return text.getvalue().encode()


def to_ndjson(rows: Iterator[Sequence[Any]]) -> bytes:
    """Take rows until the chunk is full. JSON has no infinity: it becomes a string."""
    lines = bytearray()
    for row in rows:
        order = dict(zip(COLUMNS, row, strict=True))
        lines += to_json(order, bytes_mode="hex", inf_nan_mode="strings") + b"\n"
        if len(lines) >= CHUNK:
            break
    return bytes(lines)


# PostgreSQL writes both formats itself, whatever the types. JSON has no control characters, so CSV
# leaves it as it is when two of them are the delimiter and the quote. Only a column of type json
# may have line breaks in it, between its tokens: they become spaces.
COPY = {
    "csv": "COPY ({select}) TO STDOUT (FORMAT csv, HEADER {header})",
    "ndjson": r"COPY (SELECT translate(row_to_json(o)::text, E'\r\n', '  ') FROM ({select}) o"
    r" ORDER BY id) TO STDOUT (FORMAT csv, DELIMITER E'\x01', QUOTE E'\x02')",
}


async def read_postgres(form: str, where: str) -> AsyncGenerator[bytes]:
    select = f"SELECT {', '.join(COLUMNS)} FROM orders {where} ORDER BY id"
    query = COPY[form].format(select=select, header=not where)
    async with (
        await psycopg.AsyncConnection.connect(DATABASE_URL, client_encoding="UTF8") as connection,
        connection.cursor() as cursor,
        cursor.copy(query.encode()) as copy,
    ):
        try:
            yield b""
            lines = bytearray()
            async for row in copy:
                lines += row if form == "ndjson" else bytes(row[:-1]) + b"\r\n"
                if len(lines) >= CHUNK:
                    yield lines.decode().encode()  # a database in SQL_ASCII may hold other bytes
                    lines.clear()
            yield lines.decode().encode()
        except BaseException:  # also when the reader has left
            # psycopg would read all that is still to come, and wait for a server that hangs.
            with suppress(psycopg.Error):
                await connection.cancel_safe(timeout=ANSWER)
            await connection.close()
            raise


# 2. The download ----------------------------------------------------------------------------------


class Download(Stream):
    """A `Stream` without the headers of one: a proxy may compress a download, and buffer it."""

    def __init__(self, form: str, where: str) -> None:
        self.name = f"orders.{form}"
        read = read_postgres if IS_POSTGRES else read_sqlite
        self.rows: Generator[bytes] | AsyncGenerator[bytes] = read(form, where)
        headers = {"Content-Disposition": f'attachment; filename="{self.name}"'}
        super().__init__(self.rows, headers=headers, media_type=MEDIA_TYPES[form])
        for name in HEADERS:
            del self.headers[name]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the rows, or 503 if the database does not begin to answer.

        If something fails later, the end of the body is left out: the server closes the connection,
        and the reader sees that the download was cut.
        """

        def moved() -> None:
            limit.reschedule(asyncio.get_running_loop().time() + PATIENCE)

        async def send_in_time(message: Message) -> None:
            await send(message)
            moved()

        begun = False
        try:
            async with asyncio.timeout(ANSWER) as limit, connections:
                await self.begin()
                begun = True
                moved()
                await super().__call__(scope, receive, send_in_time)
        except Exception as error:
            what = "was cut" if begun else "got 503"
            logger.error("%s %s: %s", self.name, what, in_one_line(error))
            if not begun:
                detail = "The orders cannot be read now. Try again later."
                raise HTTPException(503, detail, {"Retry-After": "5"}) from error

    async def begin(self) -> None:
        """Take the first chunk. If cancelled, do not wait for a database that hangs."""
        rows = self.rows
        first = asyncio.ensure_future(
            anext(rows) if isinstance(rows, AsyncGenerator) else run_in_threadpool(next, rows)
        )
        try:
            await asyncio.shield(first)
        finally:
            first.cancel()


@asynccontextmanager
async def lifespan(_: FastAPI) -> AsyncIterator[None]:
    """Make the recipe's own file once, and look whether the orders can be read."""
    try:
        if DATABASE_URL.endswith(str(FILE)):
            with closing(sqlite3.connect(FILE, timeout=60)) as connection:
                if not connection.execute("PRAGMA table_info(orders)").fetchone():
                    logger.info("Making %s with 1,000,000 orders: takes a few seconds.", FILE)
                    connection.executescript(FILE.with_suffix(".sql").read_text())
        async with asyncio.timeout(ANSWER):
            download = Download("csv", "WHERE id IS NULL")
            await download.begin()
            async for _chunk in download.body_iterator:
                pass
    except Exception as error:
        database = "PostgreSQL" if IS_POSTGRES else DATABASE_URL
        logger.error("Downloads get 503 until %s can be read: %s", database, in_one_line(error))
    yield


app = FastAPI(title="Export", lifespan=lifespan)
prepare(app)
CONTENT: Any = {200: {"content": {media_type: {} for media_type in MEDIA_TYPES.values()}}}


@app.get("/orders.csv", response_class=Response, responses=CONTENT)
@app.get("/orders.ndjson", response_class=Response, responses=CONTENT)
async def orders(
    request: Request, after: Annotated[int | None, Query(ge=0, le=2**63 - 1)] = None
) -> Download:
    """All orders, or those after an id: then without CSV's line of names, to be put behind it."""
    form = "csv" if request.url.path.endswith(".csv") else "ndjson"
    return Download(form, "" if after is None else f"WHERE id > {after}")
