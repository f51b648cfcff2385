"""The page of `answers` in real browsers: the answer is in the address, whatever happens."""

import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.support.answers import Ask, asked, words
from tests.support.browsers import EACH, SIZE, Browser, Chromium, leave
from tests.support.processes import Process, wait_for
from tests.support.redis_server import running_redis

in_each_browser = pytest.mark.parametrize("browser", EACH, indirect=True)
in_chromium = pytest.mark.parametrize(
    "browser", [pytest.param("chromium", marks=pytest.mark.xdist_group("chromium"))], indirect=True
)
# What Chromium logs by itself of a connection that broke, and of a status that is an error.
NETWORK = re.compile(r"Failed to load resource: (net::ERR_|the server responded with .* 404)|ERR_")
MARKUP = '<img src="x" onerror="document.title = 1"><b>bold</b> & ☕ '


@pytest.fixture
def browser(
    request: pytest.FixtureRequest, browsers: Callable[[str], Browser]
) -> Iterator[Browser]:
    """A browser; whatever else the test looks at, nothing unexpected is on its console."""
    browser = browsers(request.param)
    yield browser
    unexpected = leave(browser, NETWORK)
    assert not unexpected, "\n".join(unexpected)


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


@in_each_browser
def test_reloaded_in_mid_answer_and_opened_elsewhere(browser: Browser, tmp_path: Path) -> None:
    question = MARKUP + words(100)
    with Ask(tmp_path) as ask:
        server = ask.serve(constants={"parrot.SECONDS_PER_TOKEN": 0.05})
        open_page(browser, server)
        wait_for_status(browser, "No answer yet.")
        ask_for(browser, question)
        wait_for(lambda: "word2" in text(browser, "answer"), "some tokens")
        fragment = str(browser.run("return location.hash"))
        assert re.fullmatch("#resp_[0-9a-f]{32}", fragment)
        open_page(browser, server, fragment)
        wait_for_status(browser, "The answer is complete.")
        assert text(browser, "answer") == question
        assert browser.run("return answer.childElementCount") == 0
        assert "event: response.completed\n" in text(browser, "wire")
        # Any other browser shows the same, when it is over too.
        open_page(browser, server, fragment)
        wait_for_status(browser, "The answer is complete.")
        assert text(browser, "answer") == question
        assert browser.run("return document.title") == "An answer that goes on"


@in_each_browser
def test_stopped_here_and_elsewhere(browser: Browser, tmp_path: Path) -> None:
    with Ask(tmp_path) as ask:
        server = ask.serve()
        for stop_it in (
            lambda _: browser.click("#stop"),
            lambda response_id: asked(server).responses.cancel(response_id),
        ):
            open_page(browser, server)
            ask_for(browser, words(5000))
            wait_for(lambda: "word2" in text(browser, "answer"), "some tokens")
            stop_it(str(browser.run("return location.hash")).removeprefix("#"))
            wait_for_status(browser, "Stopped.")
            assert words(5000).startswith(text(browser, "answer"))
            assert browser.run("return document.getElementById('stop').ariaDisabled") == "true"
        server.wait_for_log("the parrot stopped after", 2)
        open_page(browser, server, f"#resp_{'0' * 32}")
        wait_for_status(browser, "The server answered 404")


@in_each_browser
def test_the_server_is_killed_and_started_again(browser: Browser, tmp_path: Path) -> None:
    """It is made by another one: the page goes on where it was, nothing lost, nothing twice."""
    with running_redis(tmp_path) as redis, Ask(tmp_path) as ask:
        maker, server = (ask.serve(redis.port) for _ in range(2))
        response = asked(maker).responses.create(model="parrot", input=words(300), background=True)
        open_page(browser, server, f"#{response.id}")
        wait_for(lambda: "word2" in text(browser, "answer"), "some tokens")
        server.kill()
        wait_for_status(browser, "The connection")
        server.start()
        wait_for_status(browser, "The answer is complete.")
        assert text(browser, "answer") == words(300)
        # If it dies that makes it, the page says so.
        response = asked(maker).responses.create(model="parrot", input=words(5000), background=True)
        open_page(browser, server, f"#{response.id}")
        wait_for(lambda: "word2" in text(browser, "answer"), "some tokens")
        maker.kill()
        wait_for_status(browser, "Failed: The server that made it is gone.")


@in_chromium
def test_accessible_and_no_wider_than_a_phone(browser: Chromium, tmp_path: Path) -> None:
    with Ask(tmp_path) as ask:
        server = ask.serve(constants={"parrot.SECONDS_PER_TOKEN": 0})
        for width, height in ((1280, 720), (390, 844)):
            for dark in (True, False):
                browser.resize(width, height, dark)
                open_page(browser, server)
                ask_for(browser, words(100))
                wait_for_status(browser, "The answer is complete.")
                assert browser.run("return document.documentElement.scrollWidth") <= width
                assert browser.violations() == []
        browser.resize(*SIZE)
