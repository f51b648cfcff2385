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
from collections.abc import AsyncGenerator, AsyncIterator, Generator
from contextlib import asynccontextmanager, closing, suppress
from pathlib import Path
from typing import Annotated, Any

import psycopg
from fastapi import FastAPI, HTTPException, Query, Request, Response
from pydantic_core import to_json
from starlette.types import Send

from main import HEADERS, Stream
from recipes.common import database_url, in_one_line, prepare

FILE = Path(__file__).resolve().with_name("orders.db")
DATABASE_URL = database_url(default=f"sqlite:///{FILE}")
IS_POSTGRES = DATABASE_URL.startswith("postgresql:")
COLUMNS = ["id", "customer", "note", "quantity", "cents"]
MEDIA_TYPES = {"csv": "text/csv", "ndjson": "application/x-ndjson"}
CHUNK = 128 * 1024  # characters: a download has so many in memory, and the rest of a row
ANSWER = 4.0  # seconds until the database has to begin its answer
PATIENCE = 60.0  # seconds for which a download may then stand still
connections = asyncio.Semaphore(10)  # each download has one until its end
After = Annotated[int | None, Query(ge=0, le=2**63 - 1)]  # an id in either database
logger = logging.getLogger("uvicorn.error")


def read_sqlite(form: str, where: str) -> Generator[str]:
    """Yield the rows in chunks. The first is empty: it says that the database begins to answer."""
    if form == "csv":
        value = "iif(typeof({0}) = 'blob', lower(hex({0})), {0}) AS {0}"
        select = ", ".join(value.format(name) for name in COLUMNS)
    else:
        # SQLite's own JSON is fast, but it rounds floats, and has no BLOBs. Python writes both.
        value = "iif(typeof({0}) IN ('real', 'blob'), json(as_json({0})), {0})"
        pairs = ", ".join(f"'{name}', {value.format(name)}" for name in COLUMNS)
        select = f"json_object({pairs}) || char(10) AS line"
    # rw does not make a missing file. (With ro, SQLite could not undo what a crash left behind.)
    uri = Path(DATABASE_URL.removeprefix("sqlite:///")).absolute().as_uri() + "?mode=rw"
    with closing(sqlite3.connect(uri, uri=True, timeout=3, check_same_thread=False)) as connection:
        connection.create_function(
            "as_json", 1, lambda v: to_json(v, bytes_mode="hex", inf_nan_mode="strings").decode()
        )
        rows = connection.execute(f"SELECT {select} FROM orders {where} ORDER BY orders.id")
        yield ""
        if form == "csv" and not where:
            yield ",".join(COLUMNS) + "\r\n"
        row: Any = True
        while row:
            text = io.StringIO(newline="")
            write = csv.writer(text).writerow if form == "csv" else text.writelines
            while text.tell() < CHUNK and (row := rows.fetchone()):
                write(row)
            yield text.getvalue()


async def read_postgres(form: str, where: str) -> AsyncGenerator[bytes]:
    """Yield the same. PostgreSQL writes both formats itself, whatever the types."""
    select = f"SELECT {', '.join(COLUMNS)} FROM orders {where} ORDER BY id"
    options = f"HEADER {not where}"
    if form == "ndjson":
        # JSON has no control characters, so CSV leaves it as it is when two of them are delimiter
        # and quote. Only a column of type json may have line breaks, between its tokens.
        line = r"translate(row_to_json(o)::text, E'\r\n', '  ')"
        select = f"SELECT {line} FROM ({select}) o ORDER BY id"
        options = r"DELIMITER E'\x01', QUOTE E'\x02'"
    query = f"COPY ({select}) TO STDOUT (FORMAT csv, {options})"
    async with (
        await psycopg.AsyncConnection.connect(DATABASE_URL, client_encoding="UTF8") as connection,
        connection.cursor().copy(query.encode()) as copy,
    ):
        try:
            yield b""
            chunk = bytearray()
            async for row in copy:
                chunk += row if form == "ndjson" else bytes(row[:-1]) + b"\r\n"
                if len(chunk) >= CHUNK:
                    yield bytes(chunk)
                    chunk.clear()
            yield bytes(chunk)
        except BaseException:  # also when the reader has left
            # psycopg would read all that is still to come, and wait for a server that hangs.
            with suppress(psycopg.Error):
                await connection.cancel_safe(timeout=ANSWER)
            await connection.close()
            raise


class Download(Stream):
    """A `Stream` without the headers of one: a proxy may compress a download, and buffer it."""

    def __init__(self, form: str, where: str) -> None:
        self.name, self.begun = f"orders.{form}", False
        self.limit = asyncio.timeout(ANSWER)
        read = read_postgres if IS_POSTGRES else read_sqlite
        headers = {"Content-Disposition": f'attachment; filename="{self.name}"'}
        super().__init__(read(form, where), headers=headers, media_type=MEDIA_TYPES[form])
        for name in HEADERS:
            del self.headers[name]

    def render(self, chunk: str | bytes) -> bytes | memoryview:
        self.limit.reschedule(asyncio.get_running_loop().time() + PATIENCE)
        return super().render(chunk)

    async def stream_response(self, send: Send) -> None:
        """Send the rows, or 503. If something fails later, the body gets no end: it was cut."""
        try:
            async with self.limit, connections:
                first = asyncio.ensure_future(anext(aiter(self.body_iterator)))
                try:
                    await asyncio.shield(first)
                finally:
                    first.cancel()  # but do not wait: the database may hang
                self.begun = True
                await super().stream_response(send)
        except Exception as error:
            what = "was cut" if self.begun else "got 503"
            logger.error("%s %s: %s", self.name, what, in_one_line(error))
            if not self.begun:
                detail = "The orders cannot be read now. Try again later."
                raise HTTPException(503, detail, {"Retry-After": "5"}) from error


@asynccontextmanager
async def lifespan(_: FastAPI) -> AsyncIterator[None]:
    """Make the recipe's own file once, and look whether the orders can be read."""
    try:
        if DATABASE_URL.endswith(str(FILE)):
            with closing(sqlite3.connect(FILE, timeout=60)) as connection:
                if not connection.execute("PRAGMA table_info(orders)").fetchone():
                    logger.info("Making %s with 1,000,000 orders: takes a few seconds.", FILE)
                    connection.executescript(FILE.with_suffix(".sql").read_text())
        download = Download("csv", "WHERE id IS NULL")
        async with download.limit:
            async for _chunk in download.body_iterator:
                pass
    except Exception as error:
        database = "PostgreSQL" if IS_POSTGRES else DATABASE_URL
        logger.error("Downloads get 503 until %s can be read: %s", database, in_one_line(error))
    yield


app = FastAPI(title="Export", lifespan=lifespan)
prepare(app)


@app.get("/orders.csv", response_class=Response)
@app.get("/orders.ndjson", response_class=Response)
async def orders(request: Request, after: After = None) -> Download:
    """All orders, or those after an id: then without CSV's line of names, to be put behind it."""
    form = "csv" if request.url.path.endswith(".csv") else "ndjson"
    return Download(form, "" if after is None else f"WHERE id > {after}")
