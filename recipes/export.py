"""A table of any size as a download, CSV or NDJSON, in little memory.

Use it when people or programs want all rows at once. For rows that are still to come, use a
stream with ids (feed). If it takes minutes to compute the rows, use a task (long_task).

    uvicorn recipes.export:app --reload
    curl -OJ localhost:8000/orders.csv
    curl "localhost:8000/orders.ndjson?after=999998"

`after` is the id of the last complete row that a reader has: a cut download resumes there.
`DATABASE_URL` is postgresql://… or sqlite:///FILE. Without it, the recipe creates orders.db.
"""

import asyncio
import socket
import sqlite3
from collections.abc import AsyncGenerator, AsyncIterator, Generator
from contextlib import aclosing, asynccontextmanager, closing, suppress
from pathlib import Path
from typing import Annotated

from fastapi import FastAPI, HTTPException, Query, Response
from psycopg import AsyncConnection, Error
from pydantic_core import to_json
from starlette.types import Send

from main import HEADERS
from recipes.common import LateStream, database_url, in_one_line, logger, prepare

FILE = Path(__file__).resolve().with_name("orders.db")
DATABASE_URL = database_url(default=f"sqlite:///{FILE}")
IS_POSTGRES = DATABASE_URL.startswith("postgresql:")
CSV, NDJSON = "text/csv", "application/x-ndjson"
COLUMNS = "id,customer,note,quantity,cents"
CHUNK = 128 * 1024  # bytes that a download holds in memory, plus the rest of a row
ANSWER = 4.0  # seconds in which the database has to begin its answer
PATIENCE = 60.0  # seconds for which a download may then stall
connections = asyncio.Semaphore(10)  # each download holds one until its end
After = Annotated[int | None, Query(ge=0, le=2**63 - 1)]  # an id in either database


def to_field(value: object) -> str:
    """Return a value as a field of RFC 4180. (The csv module is slow: it checks each character.)"""
    if isinstance(value, int):
        return str(value)
    if isinstance(value, str) and ("," in value or '"' in value or "\n" in value or "\r" in value):
        return '"' + value.replace('"', '""') + '"'
    return "" if value is None else value.hex() if isinstance(value, bytes) else str(value)


def read_sqlite(form: str, where: str, limit: asyncio.Timeout) -> Generator[bytes]:
    """Yield the rows in chunks. The first is empty: it shows that the answer has begun."""
    # rw does not create a missing file. (With ro, SQLite could not roll back after a crash.)
    uri = Path(DATABASE_URL.removeprefix("sqlite:///")).absolute().as_uri() + "?mode=rw"
    with closing(sqlite3.connect(uri, uri=True, timeout=2, check_same_thread=False)) as connection:
        connection.set_progress_handler(limit.expired, 100_000)  # SQLite calls it as it computes
        rows = connection.execute(f"SELECT {COLUMNS} FROM orders {where} ORDER BY id")
        yield b""
        chunk = bytearray(b"" if where or form == NDJSON else f"{COLUMNS}\r\n".encode())
        names = COLUMNS.split(",")
        for row in rows:
            if form == CSV:
                chunk += (",".join(map(to_field, row)) + "\r\n").encode()
            else:
                order = dict(zip(names, row, strict=False))
                chunk += to_json(order, bytes_mode="hex", inf_nan_mode="strings") + b"\n"
            if len(chunk) >= CHUNK:
                yield bytes(chunk)
                chunk.clear()
        yield bytes(chunk)


async def end_query(connection: AsyncConnection, when: float = 0) -> None:
    """Cancel the query, then hang up: psycopg itself would wait ten seconds for an answer."""
    await asyncio.sleep(when - asyncio.get_running_loop().time())
    with suppress(Error):
        await connection.cancel_safe(timeout=1)
    with suppress(Error, OSError), socket.fromfd(connection.fileno(), 0, 0) as line:
        line.shutdown(socket.SHUT_RDWR)


async def read_postgres(form: str, where: str, limit: asyncio.Timeout) -> AsyncGenerator[bytes]:
    """Yield the same from PostgreSQL, which writes both formats itself, whatever the types."""
    rows = f"SELECT {COLUMNS} FROM orders {where}"
    options, end = f"HEADER {not where}", b"\r\n"
    if form == NDJSON:
        # JSON has no control characters, except line breaks in a column of type json. With two of
        # them as quote and delimiter, COPY does not change it.
        rows = rf"SELECT translate(row_to_json(o)::text, E'\n\r', '  ') FROM ({rows}) o"
        options, end = r"QUOTE E'\x01', DELIMITER E'\x02'", b"\n"
    copy_rows = f"COPY ({rows} ORDER BY id) TO STDOUT (FORMAT csv, {options})".encode()
    connect = AsyncConnection.connect(DATABASE_URL, client_encoding="UTF8", connect_timeout=2)
    async with await connect as connection:
        late = (limit.when() or 0) - 1.5  # leaves one second to cancel, and a reserve
        unanswered = asyncio.create_task(end_query(connection, late))
        async with connection.cursor().copy(copy_rows) as copy:
            unanswered.cancel()
            if asyncio.get_running_loop().time() >= late:
                raise TimeoutError  # the query was cancelled, and COPY begins with that error
            try:
                yield b""
                chunk = bytearray()
                async for row in copy:
                    chunk += bytes(row[:-1]) + end
                    if len(chunk) >= CHUNK:
                        yield bytes(chunk)
                        chunk.clear()
                yield bytes(chunk)
            finally:  # otherwise psycopg would read all remaining rows
                await end_query(connection)
                await connection.close()


class Download(LateStream):
    """A `Stream` without its headers: a proxy may compress and buffer a download."""

    def __init__(self, name: str, form: str, after: int | None = None) -> None:
        self.name, self.limit = name, asyncio.timeout(ANSWER)
        where = "" if after is None else f"WHERE id > {after}"
        rows = (read_postgres if IS_POSTGRES else read_sqlite)(form, where, self.limit)
        headers = {"Content-Disposition": f'attachment; filename="{name}"'}
        super().__init__(rows, headers=headers, media_type=form)
        for header in HEADERS:
            del self.headers[header]

    def render(self, chunk: bytes) -> bytes | memoryview:
        self.limit.reschedule(asyncio.get_running_loop().time() + PATIENCE)
        return super().render(chunk)

    async def stream_response(self, send: Send) -> None:
        """Send the rows, or 503. If something fails later, the body is cut: it gets no end."""
        try:
            async with self.limit, connections:
                await anext(self.rendered)
                self.begun = True
                await super().stream_response(send)
        except Exception as error:
            outcome = "was cut" if self.begun else "got 503"
            logger.error("%s %s: %s", self.name, outcome, in_one_line(error))
            if not self.begun:
                detail = "The orders cannot be read now. Try again later."
                raise HTTPException(503, detail, {"Retry-After": "5"}) from error


@asynccontextmanager
async def lifespan(_: FastAPI) -> AsyncIterator[None]:
    """Create the recipe's own file once, and check that the orders can be read."""
    try:
        if DATABASE_URL.endswith(str(FILE)):
            with closing(sqlite3.connect(FILE, timeout=60)) as connection:
                if not connection.execute("PRAGMA table_info(orders)").fetchone():
                    logger.info("Creating %s with 1,000,000 orders. It takes a few seconds.", FILE)
                    connection.executescript(FILE.with_suffix(".sql").read_text())
        download = Download("orders.csv", CSV)
        async with download.limit, aclosing(download.rendered):
            await anext(download.rendered)
    except Exception as error:
        database = "PostgreSQL" if IS_POSTGRES else DATABASE_URL
        logger.error("Downloads get 503 until %s can be read: %s", database, in_one_line(error))
    yield


app = FastAPI(title="Export", lifespan=lifespan)
prepare(app)


@app.get("/orders.csv", response_class=Response, responses={200: {"content": {CSV: {}}}})
async def orders_csv(after: After = None) -> Download:
    """All orders, or those after an id, without the line of names, so that you can append them."""
    return Download("orders.csv", CSV, after)


@app.get("/orders.ndjson", response_class=Response, responses={200: {"content": {NDJSON: {}}}})
async def orders_ndjson(after: After = None) -> Download:
    """The same, one JSON object per line."""
    return Download("orders.ndjson", NDJSON, after)
