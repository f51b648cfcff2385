"""The page of recipes/tail.py in real browsers: the log, its files, and what is on the wire."""

import os
import re
from pathlib import Path

import pytest

from tests.support.browsers import SIZE, Browser, Chromium
from tests.support.processes import Process, Start, wait_for
from tests.support.recipes import start_recipe

in_chromium = pytest.mark.parametrize(
    "browser", [pytest.param("chromium", marks=pytest.mark.xdist_group("chromium"))], indirect=True
)

# What Chromium logs by itself of a connection that broke.
NETWORK = re.compile(r"Failed to load resource: net::ERR_|net::ERR_INCOMPLETE_CHUNKED_ENCODING")


@pytest.fixture
def log(tmp_path: Path) -> Path:
    log = tmp_path / "app.log"
    log.touch()
    return log


@pytest.fixture
def server(start: Start, tmp_path: Path, log: Path) -> Process:
    return start_recipe(start, "recipes.tail", tmp_path, LOG=str(log))


def open_page(browser: Browser, server: Process) -> None:
    browser.open(server.url)
    wait_for(lambda: texts(browser, "#status") == ["Connected."], "the page to connect")


def texts(browser: Browser, selector: str) -> list[str]:
    script = "return [...document.querySelectorAll(arguments[0])].map((e) => e.textContent)"
    found: list[str] = browser.run(script, selector)
    return found


def wait_for_lines(browser: Browser, *expected: str) -> None:
    wait_for(lambda: texts(browser, "#log li")[-1:] == [expected[-1]], f"{expected[-1]} in the log")
    assert texts(browser, "#log li") == [*expected]


def append(log: Path, *lines: str) -> None:
    with log.open("a") as file:
        file.write("".join(f"{line}\n" for line in lines))


def test_lines_come_as_text_and_the_wire_beside_them(
    browser: Browser, server: Process, log: Path
) -> None:
    open_page(browser, server)
    lines = ["one", "<img src=x onerror=alert(1)> & <b>bold</b>", "", "  two  spaces: ☕"]
    append(log, *lines)
    wait_for_lines(browser, *lines)
    assert browser.run("return document.querySelectorAll('#log li *, #wire span *').length") == 0
    end = log.stat().st_size
    (wire,) = texts(browser, "#wire")
    request = "> GET /log\n< 200 text/event-stream; charset=utf-8\n"
    assert wire.startswith(f"{request}retry: 1000\n\nid: 4-")
    assert re.search(rf"\nid: {end}-[0-9a-f]{{8}}\ndata: {re.escape(lines[-1])}\n\n$", wire)
    assert texts(browser, "#files p") == [f"Now: 4 lines, bytes 0 to {end}"]
    server.kill()
    wait_for(lambda: "Trying again in " in texts(browser, "#status")[0], "it to be told")
    append(log, "after kill -9")
    server.start()
    wait_for_lines(browser, *lines, "after kill -9")
    (wire,) = texts(browser, "#wire")
    assert re.search(rf"\n> Last-Event-ID: {end}-[0-9a-f]{{8}}\n< 200 ", wire)


@in_chromium
def test_one_sees_a_rotation(browser: Browser, server: Process, log: Path) -> None:
    append(log, "one")
    open_page(browser, server)
    append(log, "two")
    wait_for_lines(browser, "one", "two")
    os.truncate(log, 0)
    wait_for_lines(browser, "one", "two", "rotated")
    append(log, "three")
    wait_for_lines(browser, "one", "two", "rotated", "three")
    files = ["Rotated: 2 lines, bytes 0 to 8", "Now: 1 line, bytes 0 to 6"]
    assert texts(browser, "#files p") == files
    old, new = browser.run(
        "return [...document.querySelectorAll('.bar')].map((bar) => bar.offsetWidth)"
    )
    assert old > new > 0
    assert "event: rotated\nid: 0-00000000\n" in texts(browser, "#wire")[0]


@in_chromium
def test_accessible_bounded_and_in_view(browser: Chromium, server: Process, log: Path) -> None:
    """At 1280 pixels all is side by side and fits; on a phone nothing is wider than the screen."""
    try:
        browser.resize(1280, 720)
        open_page(browser, server)
        append(log, *(f"line {number}" for number in range(2000)), "long" * 1000)
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
