"""The page of recipes/tail.py in real browsers: the log, its files, and what is on the wire."""

import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import requests

from recipes.common import PAGE_HEADERS
from tests.support.browsers import EACH, SIZE, Browser, Chromium, leave
from tests.support.processes import Process, Start, wait_for
from tests.support.recipes import start_recipe

in_each_browser = pytest.mark.parametrize("name", EACH)

# What Chromium logs by itself of a connection that broke.
NETWORK = re.compile(r"Failed to load resource: net::ERR_|net::ERR_INCOMPLETE_CHUNKED_ENCODING")

Opened = Callable[[str], Browser]


@pytest.fixture
def log(tmp_path: Path) -> Path:
    log = tmp_path / "app.log"
    log.touch()
    return log


@pytest.fixture
def server(start: Start, tmp_path: Path, log: Path) -> Process:
    return start_recipe(start, "recipes.tail", tmp_path, LOG=str(log))


@pytest.fixture
def page(browsers: Opened, server: Process) -> Iterator[Opened]:
    """`page(name)` opens the page in that browser; nothing unexpected is on its console."""
    opened: list[Browser] = []

    def page(name: str) -> Browser:
        browser = browsers(name)
        opened.append(browser)
        browser.open(server.url)
        wait_for(lambda: text(browser, "#status") == "Connected.", "the page to connect")
        return browser

    yield page
    unexpected = [entry for browser in opened for entry in leave(browser, NETWORK)]
    assert not unexpected, "\n".join(unexpected)


def text(browser: Browser, selector: str) -> str:
    return str(browser.run("return document.querySelector(arguments[0]).textContent", selector))


def texts(browser: Browser, selector: str) -> list[str]:
    script = "return [...document.querySelectorAll(arguments[0])].map((e) => e.textContent)"
    found: list[str] = browser.run(script, selector)
    return found


def wait_for_lines(browser: Browser, expected: list[str]) -> None:
    wait_for(lambda: texts(browser, "#log li")[-1:] == expected[-1:], f"{expected[-1]} in the log")
    assert texts(browser, "#log li") == expected


def append(log: Path, text: str) -> None:
    with log.open("a") as file:
        file.write(text)


@in_each_browser
def test_lines_come_as_text_and_the_wire_beside_them(page: Opened, log: Path, name: str) -> None:
    browser = page(name)
    lines = ["one", "<img src=x onerror=alert(1)> & <b>bold</b>", "", "  two  spaces: ☕"]
    append(log, "".join(f"{line}\n" for line in lines))
    wait_for_lines(browser, lines)
    assert browser.run("return document.querySelectorAll('#log li *, #wire span *').length") == 0
    end = log.stat().st_size
    wire = text(browser, "#wire")
    request = "> GET /log\n< 200 text/event-stream; charset=utf-8\n"
    assert wire.startswith(f"{request}retry: 1000\n\nid: 4-")
    assert re.search(rf"\nid: {end}-[0-9a-f]{{8}}\ndata: {re.escape(lines[-1])}\n\n$", wire)
    assert texts(browser, "#files p") == [f"Now: 4 lines, bytes 0 to {end}"]


@in_each_browser
def test_one_sees_a_rotation(page: Opened, log: Path, name: str) -> None:
    append(log, "one\n")
    browser = page(name)
    append(log, "two\n")
    wait_for_lines(browser, ["one", "two"])
    os.truncate(log, 0)
    wait_for_lines(browser, ["one", "two", "rotated"])
    append(log, "three\n")
    wait_for_lines(browser, ["one", "two", "rotated", "three"])
    files = ["Rotated: 2 lines, bytes 0 to 8", "Now: 1 line, bytes 0 to 6"]
    assert texts(browser, "#files p") == files
    widths = browser.run(
        "return [...document.querySelectorAll('.bar')].map((bar) => bar.offsetWidth)"
    )
    assert widths[0] > widths[1] > 0
    assert "event: rotated\nid: 0-00000000\n" in text(browser, "#wire")


@in_each_browser
def test_after_kill_9_it_goes_on_where_it_was(
    page: Opened, server: Process, log: Path, name: str
) -> None:
    browser = page(name)
    append(log, "one\n")
    wait_for_lines(browser, ["one"])
    server.kill()
    wait_for(lambda: "Trying again in " in text(browser, "#status"), "it to be told")
    append(log, "two\n")
    server.start()
    wait_for_lines(browser, ["one", "two"])
    assert text(browser, "#status") == "Connected."
    assert re.search(r"\n> Last-Event-ID: 4-[0-9a-f]{8}\n< 200 ", text(browser, "#wire"))


@pytest.mark.xdist_group("chromium")
def test_accessible_bounded_and_in_view(page: Opened, browsers: Opened, log: Path) -> None:
    """At 1280 pixels all is side by side and fits; on a phone nothing is wider than the screen."""
    browser = browsers("chromium")
    assert isinstance(browser, Chromium)
    try:
        browser.resize(1280, 720)
        page("chromium")
        append(log, "".join(f"line {number}\n" for number in range(2000)) + "long" * 1000 + "\n")
        wait_for(lambda: texts(browser, "#log li")[-1:] == ["long" * 500 + "…"], "the last line")
        assert len(texts(browser, "#log li")) == 300
        assert len(texts(browser, "#wire span")) == 200
        for width, height in ((1280, 720), (390, 844)):
            browser.resize(width, height)
            assert browser.run(
                """const { scrollWidth, scrollHeight } = document.documentElement;
                const [view, wire] = [".view", ".wire"].map((selector) =>
                  document.querySelector(selector).getBoundingClientRect());
                const ends = ["log", "wire"].map((id) => {
                  const { top, height } = document.getElementById(id).getBoundingClientRect();
                  const { bottom } = document.querySelector(`#${id} > *`).getBoundingClientRect();
                  return bottom <= top + height;
                });
                return [scrollWidth <= innerWidth, scrollHeight <= innerHeight,
                  view.right <= wire.left, view.bottom <= wire.top, ...ends];"""
            ) == [True, width == 1280, width == 1280, width == 390, True, True]
            for dark in (True, False):
                browser.darken(dark)
                assert browser.violations() == []
    finally:
        browser.resize(*SIZE)


def test_nothing_is_inline_and_the_policy_says_so(server: Process) -> None:
    for path in ("/", "/pages/tail.js", "/pages/wire.js", "/pages/style.css"):
        headers = requests.get(server.url + path, timeout=10).headers
        assert {name: headers[name] for name in PAGE_HEADERS} == PAGE_HEADERS
    html = requests.get(server.url, timeout=10).text
    assert not re.search("<style|style=|<script>| on[a-z]+=", html)
