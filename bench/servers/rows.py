"""recipes/export.py, and beside its downloads one of rows that are tuples of Python: from `sqlite3`
through `csv`, so many at a time.
"""

import csv
import io
import sqlite3
from collections.abc import Iterator
from contextlib import closing

from fastapi.responses import StreamingResponse

from recipes.export import CSV, DATABASE_URL, app, download, select

__all__ = ["app"]


@app.get("/rows.csv", response_class=StreamingResponse)
def rows_csv(batch: int, after: int = 0) -> StreamingResponse:
    def chunks() -> Iterator[bytes]:
        file = DATABASE_URL.removeprefix("sqlite:///")
        with closing(sqlite3.connect(file, check_same_thread=False)) as connection:
            rows = connection.execute(select(after))
            while some := rows.fetchmany(batch):
                lines = io.StringIO(newline="")
                csv.writer(lines).writerows(some)
                yield lines.getvalue().encode()

    return download(chunks(), CSV, "orders.csv")
