"""recipes/export.py, and beside its downloads one whose generator yields each row by itself."""

from fastapi.responses import StreamingResponse

from recipes.export import CSV, Orders, app, download, to_csv

__all__ = ["app"]


@app.get("/one-row.csv", response_class=StreamingResponse)
def one_row(rows: Orders) -> StreamingResponse:
    return download((to_csv([row]) for row in rows), CSV, "orders.csv")
