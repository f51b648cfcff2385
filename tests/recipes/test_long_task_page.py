"""The page of recipes/long_task.py in real browsers: it follows a task through all that happens."""

import json
import re
from collections.abc import Iterator

import httpx
import pytest

from tests.faults.long_task import FAILING, Place, place
from tests.support.browsers import EACH, SIZE, Browser, Chromium
from tests.support.processes import Process, wait_for

in_chromium = pytest.mark.parametrize("browser", EACH[:1], indirect=True)

# What browsers log by themselves of a server that is down and of a status that is an error.
NETWORK = re.compile(
    "Failed to load resource: (net::ERR_|the server responded with a status of (404|422))"
    "|Firefox can’t establish a connection to the server at http://127.0.0.1:"
    "|The connection to http://127.0.0.1:[^ ]* was interrupted while the page was loading"
)


@pytest.fixture(scope="module")
def here() -> Iterator[Place]:
    with place(LOOK="0.3") as here:
        yield here


@pytest.fixture(scope="module")
def server(here: Place) -> Process:
    return here.server()


def start(browser: Browser, parts: int, seconds: float) -> None:
    browser.run("[parts.value, seconds.value] = arguments", parts, seconds)
    browser.click("#start")


def can(browser: Browser) -> list[bool]:
    """Whether Start and Cancel do something."""
    buttons = "return [start, cancel].map((button) => button.ariaDisabled !== 'true')"
    return list(browser.run(buttons))


def tasks(here: Place) -> set[str]:
    """The tasks that have been begun."""
    return {part.task_id for part in here.work()}


def wait_for_part(browser: Browser, part: int) -> None:
    done = "return task.hidden ? 0 : bar.value"
    wait_for(lambda: browser.run(done) >= part, f"part {part} on the page")


def wait_for_status(browser: Browser, sentence: str) -> str:
    """Wait for what the page says; give its state."""
    said = "return document.getElementById('status').textContent"
    wait_for(lambda: re.fullmatch(sentence, browser.run(said)), sentence)
    return str(browser.run("return document.getElementById('status').dataset.state"))


def reload(browser: Browser) -> None:
    """Show the same address in a page that knows nothing."""
    url = browser.run("return location.href")
    browser.open("about:blank")
    browser.open(url)


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
    reload(browser)
    wait_for_part(browser, 4)
    server.kill()
    wait_for_status(browser, "The connection is lost, but the task goes on. Trying again …")
    server.start()
    assert wait_for_status(browser, "Done, after 7 seconds of work.") == "done"
    (task_id,) = tasks(here) - before
    task = httpx.get(f"{server.url}/tasks/{task_id}").json()
    wire = browser.run("return wire.textContent")
    assert wire.endswith(f"data: {json.dumps(task, separators=(',', ':'))}\n\n")
    shown = browser.run("return [bar.value, bar.max, done.textContent, left.textContent]")
    assert shown == [14, 14, "14 of 14 parts", ""]


def test_cancel(browser: Browser, server: Process) -> None:
    browser.open(server.url)
    assert can(browser) == [True, False]
    start(browser, 900, 2)
    wait_for_part(browser, 1)
    wait_for(lambda: browser.run("return left.textContent"), "how much is left")
    assert can(browser) == [False, True]
    browser.click("#start")  # which does nothing now
    browser.click("#cancel")
    wait_for_status(browser, r"It stops before its next part\.")
    assert browser.run("return left.textContent") == ""
    wait_for_status(browser, r"Cancelled after \d+ of 900 parts\.")
    assert browser.run("return left.textContent") == ""
    assert can(browser) == [True, False]


def test_a_task_that_there_is_not_and_one_that_fails(browser: Browser, server: Process) -> None:
    failed = "Failed after 2 of 5 parts: no space left on the disk"
    browser.open(f"{server.url}/#nothing")
    assert wait_for_status(browser, "There is no such task.") == "failed"
    start(browser, 5, FAILING)
    assert wait_for_status(browser, failed) == "failed"
    browser.run("history.back()")
    wait_for_status(browser, "There is no such task.")
    browser.run("history.forward()")
    wait_for_status(browser, failed)


@in_chromium
def test_the_answer_to_the_start_is_lost(browser: Chromium, here: Place, server: Process) -> None:
    """The first try did start the task; the second, with the same key, gets the same one."""
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
    wait_for_status(browser, "The server does not answer. Trying again …")
    wait_for_status(browser, r"Done, after 0\.2 seconds of work\.")
    assert server.log.count("POST /tasks") == posts + 2
    assert len(tasks(here) - before) == 1


@in_chromium
def test_the_page_for_everybody(browser: Chromium, server: Process) -> None:
    """What axe-core finds, in its states, on a narrow screen, also in the dark."""

    def check(when: str) -> None:
        for dark in (False, True):
            browser.darken(dark)
            assert browser.violations() == [], when
            assert browser.run("return document.documentElement.scrollWidth <= innerWidth"), when

    try:
        browser.resize(360, 800)
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
    finally:
        browser.resize(*SIZE)
