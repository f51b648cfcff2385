"""The page of recipes/feed.py in real browsers: what one writes all see, and no silent hole."""

import re
from pathlib import Path

import httpx
import pytest

from tests.support.browsers import SIZE, Browser, Chromium
from tests.support.processes import Process, Start, free_port, need, wait_for
from tests.support.readme import Readme, Terminal, commands, shows
from tests.support.recipes import start_recipe

in_chromium = pytest.mark.parametrize(
    "browser", [pytest.param("chromium", marks=pytest.mark.xdist_group("chromium"))], indirect=True
)

# What Chromium logs by itself of a connection that broke, and of a status.
NETWORK = re.compile("Failed to load resource: (net::ERR_|.* status of 50[23])")


@pytest.fixture
def server(start: Start, tmp_path: Path) -> Process:
    return start_recipe(start, "recipes.feed", tmp_path)


def open_page(browser: Browser, server: Process, connected: str = "Connected.") -> None:
    browser.open(f"{server.url}/?channel=goals")
    wait_for_connection(browser, connected)


def text(browser: Browser, element: str) -> str:
    return str(browser.run("return document.getElementById(arguments[0]).textContent", element))


def wait_for_connection(browser: Browser, beginning: str) -> None:
    wait_for(
        lambda: text(browser, "connection").startswith(beginning), f"the page to say {beginning}"
    )


def entries(browser: Browser) -> list[str]:
    """Return what is on the page, the oldest first, without the times."""
    shown: list[str] = browser.run(
        "return [...document.querySelectorAll('#feed > li')]"
        ".map((li) => (li.querySelector('.text') ?? li).textContent)"
    )
    return shown[::-1]


def wait_for_entries(browser: Browser, expected: list[str]) -> None:
    wait_for(lambda: len(entries(browser)) >= len(expected), f"{expected} on the page")
    assert entries(browser) == expected


def write(browser: Browser, line: str, name: str = "") -> None:
    """Fill in the form and press the button; wait for what is said of it."""
    browser.run("document.getElementById('event').value = arguments[0]", name)
    wait_for(lambda: browser.run("return publish.ariaDisabled") != "true", "the button")
    browser.run("document.getElementById('line').value = arguments[0]", line)
    browser.click("#publish")
    wait_for(lambda: not text(browser, "published").startswith("Posting"), "an answer")


def post(server: Process, *lines: str, channel: str = "goals") -> None:
    with httpx.Client() as client:
        for line in lines:
            client.post(f"{server.url}/feed/{channel}", json={"data": line}).raise_for_status()


def test_what_one_writes_and_what_others_do(browser: Browser, server: Process) -> None:
    post(server, *(f"before {number}" for number in range(25)))
    open_page(browser, server)
    before = [f"before {number}" for number in range(5, 25)]  # the last 20 are there at once
    wait_for_entries(browser, before)
    post(server, "elsewhere", channel="other")
    lines = ["from one", "<img src=x onerror=alert(1)> & <b>bold</b>", "  two  spaces: ☕"]
    for line in lines:
        write(browser, line)
        assert text(browser, "published") == "Posted."
        assert browser.run("return document.getElementById('line').value") == ""
    post(server, "from another")
    write(browser, "1 : 0", "goal")
    wait_for_entries(browser, [*before, *lines, "from another", "goal 1 : 0"])
    assert browser.run("return feed.querySelectorAll('img, b').length") == 0, "it stays text"
    assert browser.run("return feed.querySelector('.name').textContent") == "goal"
    times = browser.run("return [...feed.querySelectorAll('time')].map((t) => t.textContent)")
    assert all(re.fullmatch(r"\d\d:\d\d:\d\d", time) for time in times)
    assert "event: goal\ndata: 1 : 0\n" in text(browser, "wire")


def test_another_channel(browser: Browser, server: Process) -> None:
    open_page(browser, server)
    post(server, "in goals")
    wait_for_entries(browser, ["in goals"])
    post(server, "in user:7", channel="user:7")
    browser.run("document.getElementById('channel').value = 'user:7'")
    browser.click("#choose button")
    wait_for(lambda: browser.run("return location.search") == "?channel=user%3A7", "the address")
    wait_for_connection(browser, "Connected.")
    wait_for_entries(browser, ["in user:7"])


def test_after_kill_9_it_says_so_and_goes_on(browser: Browser, server: Process) -> None:
    open_page(browser, server)
    write(browser, "before")
    wait_for_entries(browser, ["before"])
    for times in (1, 2):
        server.kill()
        wait_for(lambda: "Trying again in" in text(browser, "connection"), "the page to say so")
        write(browser, "to nobody")
        assert text(browser, "published").startswith("No answer (")
        assert browser.run("return document.getElementById('line').value") == "to nobody"
        server.start()
        wait_for_connection(browser, "Connected.")
        # Its log was a new one each time.
        gap = "Events may be missing here. What came before this is no longer kept."
        wait_for_entries(browser, ["before", *[gap] * times])
    write(browser, "after")
    wait_for_entries(browser, ["before", gap, gap, "after"])


@in_chromium
def test_while_redis_is_away_it_does_not_say_connected(
    browser: Browser, start: Start, tmp_path: Path
) -> None:
    redis, port = need("redis-server", "redis-server"), free_port()
    url = f"redis://127.0.0.1:{port}"
    server = start_recipe(start, "recipes.feed", tmp_path, REDIS_URL=url)
    open_page(browser, server, "Connected. Waiting for the log …")
    write(browser, "to nobody")
    assert text(browser, "published") == (
        "The log is not available. The event may have been published or not."
    )
    assert text(browser, "connection") == "Connected. Waiting for the log …"
    start(redis, "--port", str(port), "--save", "", "--dir", str(tmp_path), port=port)
    wait_for(lambda: text(browser, "connection") == "Connected.", "the log")
    write(browser, "to all")
    wait_for_entries(browser, ["to all"])


@in_chromium
def test_accessible_bounded_and_no_wider_than_a_phone(browser: Chromium, server: Process) -> None:
    browser.resize(360, 800)
    try:
        open_page(browser, server)
        post(server, *(f"line {number}" for number in range(101)), "long" * 100)
        wait_for(lambda: entries(browser)[-1:] == ["long" * 100], "the last line")
        assert entries(browser)[0] == "line 2"  # of 102 the last 100
        write(browser, "the last")
        wide = "const { scrollWidth, clientWidth } = document.documentElement; return "
        assert browser.run(wide + "scrollWidth <= clientWidth")
        for dark in (True, False):
            browser.darken(dark)
            assert browser.violations() == []
    finally:
        browser.resize(*SIZE)


def test_the_readme_in_two_terminals(server: Process) -> None:
    block = Readme("recipes/README.md").tested("two terminals")
    (curl, hello), (publish, event) = commands(block.replace("localhost:8000", server.url[7:]))
    reader = Terminal(curl.removesuffix(" &"))
    try:
        wait_for(lambda: shows(hello, reader.screen), "the beginning of the feed")
        answer = Terminal(publish).wait()
        assert shows(event.splitlines(keepends=True)[0], answer)
        wait_for(lambda: shows(hello + event.split("\n", 1)[1], reader.screen), "the event")
    finally:
        reader.kill()
