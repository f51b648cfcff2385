"""The page of `answers` in real browsers: the answer is in the address, whatever happens."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.answers import asked, serve, words
from tests.support.browsers import EACH, SIZE, Browser, Chromium
from tests.support.processes import Process, Start, starting, wait_for
from tests.support.redis_server import running_redis

in_each_browser = pytest.mark.parametrize("browser", EACH, indirect=True)
in_chromium = pytest.mark.parametrize(
    "browser", [pytest.param("chromium", marks=pytest.mark.xdist_group("chromium"))], indirect=True
)
# What Chromium logs by itself of a connection that broke, and of a status that is an error.
NETWORK = re.compile(r"Failed to load resource: (net::ERR_|the server responded with .* 404)|ERR_")
MARKUP = '<img src="x" onerror="document.title = 1"><b>bold</b> & ☕ '


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Process]:
    with starting(tmp_path_factory.mktemp("answers")) as start:
        yield serve(start)


def open_page(browser: Browser, server: Process, fragment: str = "") -> None:
    browser.open("about:blank")  # or only the fragment changes, and nothing is loaded
    browser.open(f"{server.url}/{fragment}")


def ask_for(browser: Browser, question: str) -> None:
    browser.run("question.value = arguments[0]", question)  # an element's id is a variable
    browser.click("#start")


def text(browser: Browser, element: str) -> str:
    return str(browser.run("return document.getElementById(arguments[0]).textContent", element))


def wait_for_status(browser: Browser, beginning: str) -> None:
    wait_for(lambda: text(browser, "status").startswith(beginning), f"the page to say {beginning}")


def wait_for_tokens(browser: Browser) -> None:
    wait_for(lambda: "word2" in text(browser, "answer"), "some tokens")


@in_each_browser
def test_reloaded_in_mid_answer_and_opened_elsewhere(browser: Browser, server: Process) -> None:
    question = MARKUP + words(60)
    open_page(browser, server)
    wait_for_status(browser, "No answer yet.")
    ask_for(browser, question)
    wait_for_tokens(browser)
    fragment = str(browser.run("return location.hash"))
    assert re.fullmatch("#resp_[0-9a-f]{32}", fragment)
    for _ in range(2):  # in any other browser, and when it is over too
        open_page(browser, server, fragment)
        wait_for_status(browser, "The answer is complete.")
        assert text(browser, "answer") == question
        assert browser.run("return answer.childElementCount") == 0
        assert "event: response.completed\n" in text(browser, "wire")
    assert browser.run("return document.title") == "An answer that goes on"


@in_each_browser
def test_stopped_here_and_elsewhere(browser: Browser, server: Process) -> None:
    for stop_it in (
        lambda _: browser.click("#stop"),
        lambda response_id: asked(server).responses.cancel(response_id),
    ):
        open_page(browser, server)
        ask_for(browser, words(5000))
        wait_for_tokens(browser)
        stop_it(str(browser.run("return location.hash")).removeprefix("#"))
        wait_for_status(browser, "Stopped.")
        assert words(5000).startswith(text(browser, "answer"))
        assert browser.run("return document.getElementById('stop').ariaDisabled") == "true"
    open_page(browser, server, f"#resp_{'0' * 32}")
    wait_for_status(browser, "The server answered 404")


@in_chromium
def test_the_server_is_killed_and_started_again(
    browser: Browser, start: Start, tmp_path: Path
) -> None:
    """It is made by another one: the page goes on where it was, nothing lost, nothing twice.

    How other browsers go on is in test_tail_page.py.
    """
    with running_redis(tmp_path) as redis:
        maker, server = (serve(start, redis.redis_url) for _ in range(2))
        response = asked(maker).responses.create(model="parrot", input=words(100), background=True)
        open_page(browser, server, f"#{response.id}")
        wait_for_tokens(browser)
        server.kill()
        wait_for_status(browser, "The connection")
        server.start()
        wait_for_status(browser, "The answer is complete.")
        assert text(browser, "answer") == words(100)
        # If it dies that makes it, the page says so.
        response = asked(maker).responses.create(model="parrot", input=words(5000), background=True)
        open_page(browser, server, f"#{response.id}")
        wait_for_tokens(browser)
        maker.kill()
        wait_for_status(browser, "Failed: The server that made it is gone.")


@in_chromium
def test_accessible_and_no_wider_than_a_phone(browser: Chromium, server: Process) -> None:
    for width, height in ((1280, 720), (390, 844)):
        for dark in (True, False):
            browser.resize(width, height, dark)
            open_page(browser, server)
            ask_for(browser, words(20))
            wait_for_status(browser, "The answer is complete.")
            assert browser.run("return document.documentElement.scrollWidth") <= width
            assert browser.violations() == []
    browser.resize(*SIZE)
