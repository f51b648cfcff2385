"""The page of recipes/long_task.py in real browsers: it follows a task through all that happens."""

import json
import re
from collections.abc import Callable, Iterator

import httpx
import pytest

from recipes.common import PAGE_HEADERS
from tests.faults.long_task import FAILING, Place, place
from tests.support.browsers import EACH, SIZE, Browser, Chromium, leave
from tests.support.processes import LIMIT, Process, wait_for

in_each_browser = pytest.mark.parametrize("browser", EACH, indirect=True)
in_chromium = pytest.mark.parametrize(
    "browser", [pytest.param("chromium", marks=pytest.mark.xdist_group("chromium"))], indirect=True
)

# What browsers log by themselves of a server that is down and of a status that is an error.
NETWORK = re.compile(
    "Failed to load resource: (net::ERR_|the server responded with a status of (404|422))"
    "|Firefox can’t establish a connection to the server at http://127.0.0.1:"
    "|The connection to http://127.0.0.1:[^ ]* was interrupted while the page was loading"
)


@pytest.fixture
def browser(
    request: pytest.FixtureRequest, browsers: Callable[[str], Browser]
) -> Iterator[Browser]:
    """A browser; whatever else the test looks at, nothing unexpected is on its console."""
    browser = browsers(request.param)
    yield browser
    unexpected = leave(browser, NETWORK)
    assert not unexpected, "\n".join(unexpected)


@pytest.fixture(scope="module")
def here() -> Iterator[Place]:
    with place() as here:
        yield here


@pytest.fixture(scope="module")
def server(here: Place) -> Process:
    return here.serve()


def start(browser: Browser, parts: int, seconds: float) -> None:
    browser.run("[parts.value, seconds.value] = arguments", parts, seconds)
    browser.click("#start")


def can(browser: Browser) -> dict[str, bool]:
    """Which buttons do something."""
    states = browser.run("return [start, cancel].map((button) => button.ariaDisabled !== 'true')")
    return dict(zip(("start", "cancel"), states, strict=True))


def tasks(here: Place) -> set[str]:
    """The tasks that have been begun."""
    return {entry.task_id for entry in here.worked("begin")}


def done(browser: Browser) -> int:
    """How far the bar is, in parts."""
    return int(browser.run("return task.hidden ? 0 : bar.value"))


def wait_for_part(browser: Browser, part: int) -> None:
    wait_for(lambda: done(browser) >= part, f"part {part} on the page")


def wait_for_status(browser: Browser, sentence: str) -> str:
    """Wait for what the page says; give its state."""
    said = "return document.getElementById('status').textContent"
    wait_for(lambda: re.fullmatch(sentence, browser.run(said)), sentence)
    return str(browser.run("return document.getElementById('status').dataset.state"))


def address(browser: Browser) -> str:
    return str(browser.run("return location.href"))


def reload(browser: Browser) -> None:
    """Show the same address in a page that knows nothing."""
    url = address(browser)
    browser.open("about:blank")
    browser.open(url)


@in_each_browser
def test_a_task_through_reloads_and_a_killed_server(
    browser: Browser, here: Place, server: Process
) -> None:
    before = tasks(here)
    browser.open(server.url)
    wait_for_status(browser, "No task yet.")
    start(browser, 14, 0.5)
    wait_for_part(browser, 2)
    wait_for_status(browser, r"Running\.")
    assert re.fullmatch(r"\d+ s left", browser.run("return left.textContent"))
    url = address(browser)
    task_url = url.replace("/#", "/tasks/")
    reload(browser)
    assert address(browser) == url
    wait_for_part(browser, 4)
    server.kill()
    wait_for_status(browser, "The connection is lost, but the task goes on. Trying again …")
    server.start()
    assert wait_for_status(browser, "Done, after 7 seconds of work.") == "done"
    assert browser.run("return wire.textContent").endswith(
        f"data: {json.dumps(httpx.get(task_url).json(), separators=(',', ':'))}\n\n"
    )
    assert browser.run("return [bar.value, bar.max, done.textContent, left.textContent]") == [
        *(14, 14),
        *("14 of 14 parts", ""),
    ]
    reload(browser)
    wait_for_status(browser, "Done, after 7 seconds of work.")
    assert len(tasks(here) - before) == 1


@in_each_browser
def test_cancel(browser: Browser, server: Process) -> None:
    browser.open(server.url)
    assert can(browser) == {"start": True, "cancel": False}
    start(browser, 900, 2)
    wait_for_part(browser, 1)
    wait_for(lambda: browser.run("return left.textContent"), "how much is left")
    assert can(browser) == {"start": False, "cancel": True}
    browser.click("#start")  # which does nothing now
    browser.click("#cancel")
    wait_for_status(browser, r"It stops before its next part\.")
    assert browser.run("return left.textContent") == ""
    wait_for_status(browser, r"Cancelled after \d+ of 900 parts\.")
    assert browser.run("return left.textContent") == ""
    assert can(browser) == {"start": True, "cancel": False}


@in_each_browser
def test_a_task_that_fails(browser: Browser, server: Process) -> None:
    browser.open(server.url)
    start(browser, 5, FAILING)
    state = wait_for_status(browser, "Failed after 2 of 5 parts: no space left on the disk")
    assert state == "failed"


@in_each_browser
def test_a_server_that_is_down_when_the_button_is_pressed(
    browser: Browser, here: Place, server: Process
) -> None:
    """It is tried again with the same key, and one task is started."""
    before = tasks(here)
    browser.open(server.url)
    server.kill()
    start(browser, 2, 0.1)
    wait_for_status(browser, "The server does not answer. Trying again …")
    server.start()
    wait_for_status(browser, r"Done, after 0\.2 seconds of work\.")
    assert len(tasks(here) - before) == 1


@in_chromium
def test_the_answer_to_the_start_is_lost(browser: Chromium, here: Place, server: Process) -> None:
    """The first try did start the task; the second gets the same one."""
    before, posts = tasks(here), server.log.count("POST /tasks")
    browser.open(server.url)
    browser.run("""
        const original = window.fetch;
        window.fetch = async (...request) => {
          window.fetch = original;
          await original(...request);
          throw new TypeError("Failed to fetch");
        };
    """)
    start(browser, 2, 0.1)
    wait_for_status(browser, r"Done, after 0\.2 seconds of work\.")
    assert server.log.count("POST /tasks") == posts + 2
    assert len(tasks(here) - before) == 1


@in_each_browser
def test_a_task_that_there_is_not(browser: Browser, server: Process) -> None:
    browser.open(f"{server.url}/#nothing")
    assert wait_for_status(browser, "There is no such task.") == "failed"
    start(browser, 1, 0)
    wait_for_status(browser, "Done, after 0 seconds of work.")
    browser.run("history.back()")
    wait_for_status(browser, "There is no such task.")
    browser.run("history.forward()")
    wait_for_status(browser, "Done, after 0 seconds of work.")


@in_chromium
def test_the_page_for_everybody(browser: Chromium, server: Process) -> None:
    """What axe-core finds, in its states, on a narrow screen, in the dark."""

    def check(when: str) -> None:
        assert browser.violations() == [], when
        assert browser.run("return document.documentElement.scrollWidth <= innerWidth"), when

    try:
        for dark in (False, True):
            browser.resize(360, 800, dark)
            browser.open(server.url)
            check("no task")
            start(browser, 900, 0.5)
            wait_for_part(browser, 1)
            check("running")
            browser.click("#cancel")
            wait_for_status(browser, "Cancelled .*")
            start(browser, 3, FAILING)
            wait_for_status(browser, "Failed .*")
            check("failed")
            browser.open("about:blank")
    finally:
        browser.resize(*SIZE)


def test_the_policy_of_the_pages(server: Process) -> None:
    for path in ("/", "/pages/long_task.js", "/pages/style.css"):
        answer = httpx.get(server.url + path, timeout=LIMIT)
        assert answer.status_code == 200
        assert {name: answer.headers.get(name) for name in PAGE_HEADERS} == PAGE_HEADERS, path
