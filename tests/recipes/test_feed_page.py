"""The page of recipes/feed.py in real browsers: what one writes all see, and no silent hole."""

import re
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest

from main import PAGE_HEADERS
from tests.support.browsers import EACH, SIZE, Browser, Chromium, leave
from tests.support.processes import Process, Start, free_port, need, wait_for
from tests.support.readme import Readme, Terminal, commands, shows
from tests.support.recipes import start_recipe

in_each_browser = pytest.mark.parametrize("name", EACH)

# What Chromium logs by itself of a connection that broke, and of a status.
NETWORK = re.compile("Failed to load resource: (net::ERR_|.* status of 502)")

Opened = Callable[[str], Browser]


@pytest.fixture
def server(start: Start, tmp_path: Path) -> Process:
    return start_recipe(start, "recipes.feed", tmp_path)


@pytest.fixture
def page(browsers: Opened, server: Process) -> Iterator[Opened]:
    """`page(name)` opens the page in that browser; nothing unexpected is on its console."""
    opened: list[Browser] = []

    def page(name: str) -> Browser:
        browser = browsers(name)
        opened.append(browser)
        browser.open(server.url)
        wait_for_connection(browser, "Connected.")
        return browser

    yield page
    unexpected = [entry for browser in opened for entry in leave(browser, NETWORK)]
    assert not unexpected, "\n".join(unexpected)


def text(browser: Browser, element: str) -> str:
    return str(browser.run("return document.getElementById(arguments[0]).textContent", element))


def wait_for_connection(browser: Browser, beginning: str) -> None:
    wait_for(
        lambda: text(browser, "connection").startswith(beginning), f"the page to say {beginning}"
    )


def entries(browser: Browser) -> list[str]:
    """Return what is on the page, the oldest first."""
    shown: list[str] = browser.run("return [...feed.children].map((e) => e.textContent)")
    return shown[::-1]


def wait_for_entries(browser: Browser, expected: list[str]) -> None:
    wait_for(lambda: len(entries(browser)) >= len(expected), f"{expected} on the page")
    assert entries(browser) == expected


def write(browser: Browser, line: str) -> None:
    """Fill in the form and press the button; wait for what is said of it."""
    wait_for(lambda: browser.run("return publish.ariaDisabled") != "true", "the button")
    browser.run("document.getElementById('line').value = arguments[0]", line)
    browser.click("#publish")
    wait_for(lambda: not text(browser, "published").startswith("Publishing"), "an answer")


def post(server: Process, *lines: str) -> None:
    with httpx.Client() as client:
        for line in lines:
            client.post(f"{server.url}/feed", json={"data": line}).raise_for_status()


@pytest.mark.xdist_group("firefox")
def test_a_line_written_in_one_browser_stands_in_both(page: Opened) -> None:
    one, other = page("chromium"), page("firefox")
    lines = ["from one", "<img src=x onerror=alert(1)> & <b>bold</b>", "  two  spaces: ☕"]
    for writer, line in zip((one, other, one), lines, strict=True):
        write(writer, line)
        assert text(writer, "published") == "Published."
        assert writer.run("return document.getElementById('line').value") == ""
    for reader in one, other:
        wait_for_entries(reader, lines)
        assert reader.run("return feed.querySelectorAll('li *').length") == 0, "markup stays text"


@in_each_browser
def test_after_kill_9_it_says_so_and_goes_on(page: Opened, server: Process, name: str) -> None:
    browser = page(name)
    write(browser, "before")
    wait_for_entries(browser, ["before"])
    for attempt in "first", "second":
        server.kill()
        wait_for_connection(browser, "Connection lost, reconnecting (")
        write(browser, "to nobody")
        assert text(browser, "published").startswith("Not known to be published, it may still app")
        assert browser.run("return document.getElementById('line').value") == "to nobody"
        server.start()
        wait_for_connection(browser, "Connected.")
        if attempt == "first":
            # Its log is new. Whoever was here before is told, once for this place.
            wait_for(lambda: len(entries(browser)) > 1, "the gap")
    write(browser, "after")
    wait_for(lambda: entries(browser)[-1] == "after", "the line that is written after it")
    before, gap, after = entries(browser)
    assert (before, after) == ("before", "after")
    assert re.fullmatch(
        r"Lines may be missing here\. What came after \d+-1 is no longer kept\.", gap
    )


# Between the page and the server: with `down` it answers as a proxy does while its server restarts.
# The page's patience of 25 s is 2.5 s here, so an idle connection is dead for it again and again.
BETWEEN = """
const [realFetch, realTimeout] = [window.fetch, window.setTimeout];
window.fetch = async (...request) =>
  window.down ? new Response("<h1>502</h1>", { status: 502 }) : realFetch(...request);
window.setTimeout = (f, ms) => realTimeout(f, ms === 25_000 ? 2500 : ms);
addEventListener("DOMContentLoaded", () => {
  window.told = [];
  const tell = () => told.push(document.getElementById("connection").textContent);
  new MutationObserver(tell).observe(document.getElementById("connection"), { childList: true });
});
"""


@in_each_browser
def test_silence_and_a_502_do_not_cost_it_its_place(
    browsers: Opened, page: Opened, server: Process, name: str
) -> None:
    with browsers(name).preload(BETWEEN):
        browser = page(name)
    post(server, "one")
    wait_for_entries(browser, ["one"])
    browser.run("window.down = true")
    lost = "Connection lost, reconnecting (the server answered 502 and no stream)."
    wait_for_connection(browser, lost)
    told = browser.run("return told")
    silent = "Connection lost, reconnecting (the server has fallen silent)."
    assert told[-2:] == [silent, lost]
    write(browser, "to nobody")
    assert text(browser, "published") == (
        "Not known to be published, it may still appear: the server answered 502."
    )
    post(server, "two", "three")
    browser.run("window.down = false")
    wait_for_connection(browser, "Connected.")
    wait_for_entries(browser, ["one", "two", "three"])


@pytest.mark.xdist_group("chromium")
def test_while_redis_is_away_it_does_not_say_connected(
    browsers: Opened, start: Start, tmp_path: Path
) -> None:
    redis, port = need("redis-server", "redis-server"), free_port()
    url = f"redis://127.0.0.1:{port}"
    server = start_recipe(start, "recipes.feed", tmp_path, REDIS_URL=url)
    browser = browsers("chromium")
    browser.open(server.url)
    write(browser, "to nobody")
    assert text(browser, "published") == (
        "The log is away: not known to be published, it may still appear."
    )
    assert text(browser, "connection") == "Connecting …"
    start(redis, "--port", str(port), "--save", "", "--dir", str(tmp_path), port=port)
    wait_for_connection(browser, "Connected.")
    write(browser, "to all")
    wait_for_entries(browser, ["to all"])
    assert [entry for entry in browser.console() if "status of 503" not in entry] == []
    browser.open("about:blank")


@pytest.mark.xdist_group("chromium")
def test_accessible_bounded_and_no_wider_than_a_phone(
    browsers: Opened, page: Opened, server: Process
) -> None:
    browser = browsers("chromium")
    assert isinstance(browser, Chromium)
    browser.resize(360, 800)
    try:
        page("chromium")
        post(server, *(f"line {number}" for number in range(301)), "long" * 100)
        wait_for(lambda: entries(browser)[-1:] == ["long" * 100], "the last line")
        assert entries(browser)[0] == "line 2"  # of 302 the last 300
        write(browser, "the last")
        wide = "const { scrollWidth, clientWidth } = document.documentElement; return "
        assert browser.run(wide + "scrollWidth <= clientWidth")
        for dark in (True, False):
            browser.darken(dark)
            assert browser.violations() == []
    finally:
        browser.resize(*SIZE)


def test_nothing_is_inline_and_the_policy_says_so(server: Process) -> None:
    for path in ("/", "/pages/feed.js", "/pages/style.css"):
        headers = httpx.get(server.url + path).headers
        assert {name: headers[name] for name in PAGE_HEADERS} == PAGE_HEADERS
    assert not re.search("<style|style=|<script>| on[a-z]+=", httpx.get(server.url).text)


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
