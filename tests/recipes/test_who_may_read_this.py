"""«Who may read this?» of recipes/README.md, in browsers."""

from pathlib import Path

from tests.support.browsers import Browser
from tests.support.processes import Start, wait_for
from tests.support.readme import Readme
from tests.support.recipes import start_app

# What the example leaves out: a way to log in, and a page without a stream.
LOGIN = """
import secrets
from fastapi import Response
from fastapi.responses import HTMLResponse

@app.post("/login")
def login(response: Response) -> None:
    session = secrets.token_urlsafe()
    sessions[session] = "ada"
    response.set_cookie("session", session, httponly=True, samesite="lax")

@app.get("/page", response_class=HTMLResponse)
def page() -> str:
    return "<!doctype html><title>A page</title>"
"""


def test_a_stream_is_for_those_who_are_logged_in(
    browser: Browser, start: Start, tmp_path: Path
) -> None:
    example = Readme("recipes/README.md").tested("who may read this")
    (tmp_path / "guarded.py").write_text(example + LOGIN)
    server = start_app(start, "guarded:app", PYTHONPATH=str(tmp_path))
    browser.open(f"{server.url}/page")

    def read() -> tuple[list[str], bool]:
        """What an `EventSource` sees until its first error, and whether it gives up then."""
        browser.run(
            """window.seen = []; window.over = undefined;
            const source = new EventSource('/events');
            source.onmessage = (event) => seen.push(event.data);
            source.onerror = () => { over = source.readyState == 2; source.close() }"""
        )
        wait_for(lambda: browser.run("return over !== undefined"), "the end of the stream")
        return browser.run("return seen"), browser.run("return over")

    def fetched(method: str, path: str) -> int:
        browser.run(
            """window.got = 0;
            fetch(arguments[1], {method: arguments[0]}).then((answer) => got = answer.status)""",
            method,
            path,
        )
        return int(wait_for(lambda: browser.run("return got"), "the answer"))

    assert read() == ([], True)
    assert fetched("GET", "/events") == 401
    assert fetched("POST", "/login") == 200
    assert fetched("GET", "/events") == 200
    assert read() == (["event 1", "event 2", "event 3"], False)
    assert browser.run("return document.cookie") == ""
    browser.console()
