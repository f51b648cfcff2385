"""The page of recipes/tokens.py in real browsers: live, stopped, told of every failure."""

import re
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest

from recipes.tokens import squawk
from tests.support.browsers import EACH, SIZE, Browser, Chromium, leave
from tests.support.processes import Process, wait_for
from tests.support.tokens import ANSWER, LONG, QUESTION, Serve, asked, long_question, servers

in_each_browser = pytest.mark.parametrize("browser", EACH, indirect=True)
in_chromium = pytest.mark.parametrize(
    "browser", [pytest.param("chromium", marks=pytest.mark.xdist_group("chromium"))], indirect=True
)

# What Chromium logs by itself of a connection that broke, and of a status that is an error.
NETWORK = re.compile(
    r"Failed to load resource: (net::ERR_|the server responded with a status of (429|502))"
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


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Serve]:
    with servers(tmp_path) as serve:
        yield serve


RECIPE = "tokens_servers:parrot"


def open_page(browser: Browser, server: Process) -> None:
    browser.open(f"{server.url}/")
    options = "return document.querySelectorAll('#model option').length"
    wait_for(lambda: browser.run(options), "the models to be listed")


def ask(browser: Browser, question: str, model: str = "parrot") -> None:
    """Fill in the form and press the button."""
    browser.run(
        "[question.value, model.value] = arguments",  # elements with an id are variables
        question,
        model,
    )
    browser.click("#start")


def text(browser: Browser, element: str) -> str:
    return str(browser.run("return document.getElementById(arguments[0]).textContent", element))


def wait_for_status(browser: Browser, beginning: str) -> None:
    wait_for(lambda: text(browser, "status").startswith(beginning), f"the page to say {beginning}")


@in_each_browser
def test_the_answer_comes_live_and_markup_stays_text(browser: Browser, serve: Serve) -> None:
    server = serve(RECIPE, SECONDS_PER_TOKEN=0.05)
    open_page(browser, server)
    browser.run(
        """window.seen = [];
        const show = () => seen.push([answer.textContent, answer.ariaBusy]);
        new MutationObserver(show).observe(answer, { subtree: true, childList: true,
          characterData: true });"""
    )
    ask(browser, QUESTION)
    wait_for_status(browser, "The whole answer")
    assert text(browser, "answer") == ANSWER
    assert "<b>bold</b>" in ANSWER
    assert browser.run("return answer.childElementCount") == 0
    seen = browser.run("return seen")
    # A slow browser draws several tokens at once, but never all.
    assert len(seen) > 5
    assert all(ANSWER.startswith(part) for part, _ in seen)
    # A screen reader waits while it is busy.
    assert {busy for _, busy in seen} == {"true"}
    assert browser.run("return answer.ariaBusy") == "false"


@in_each_browser
def test_stop(browser: Browser, serve: Serve) -> None:
    server = serve(RECIPE, SECONDS_PER_TOKEN=60 / LONG)
    open_page(browser, server)
    ask(browser, long_question("to be stopped"))
    wait_for(lambda: len(text(browser, "answer")) > 3, "some tokens")
    browser.click("#stop")
    wait_for_status(browser, "Stopped by you.")
    (made,) = server.wait_for_log(r"the parrot stopped after (\d+) tokens")
    assert int(made) < LONG
    # What came stays, and the next question has its own answer.
    assert text(browser, "answer")
    ask(browser, "Hello, parrot!")
    wait_for_status(browser, "The whole answer")
    assert text(browser, "answer") == "".join(squawk("Hello, parrot!"))


@in_each_browser
def test_every_failure_is_told(browser: Browser, serve: Serve) -> None:
    half = " This is only the beginning of an answer."
    upstream = serve("upstreams:upstream")
    open_page(browser, serve(RECIPE, upstream.url))
    for fault, status, answer in (
        ("is whole", "The whole answer, in ", "One two"),
        ("ends at its limit", "The model ended its answer early, ", "One two"),
        ("ends early", "The upstream broke off in the middle of its answer." + half, "One two"),
        ("breaks off", "The connection to the upstream failed or broke." + half, "One two"),
        ("sends an error", "Too much." + half, "One two"),
        ("sends half of JSON", "The upstream's answer is none of this API." + half, "One two"),
        ("answers 429", "Too much.", ""),
        ("answers in HTML", "The upstream", ""),
    ):
        ask(browser, "What?", fault)
        wait_for_status(browser, status)
        assert text(browser, "answer") == answer

    open_page(browser, serve(RECIPE, upstream.url, STALLED_AFTER=1))
    ask(browser, "What?", "falls silent")
    wait_for_status(browser, "The upstream has stalled.")

    server = serve(RECIPE, SECONDS_PER_TOKEN=60 / LONG)
    open_page(browser, server)
    for signum, status in (
        (signal.SIGTERM, "The server is stopping."),
        (signal.SIGKILL, "The answer broke off ("),
    ):
        ask(browser, long_question("to be broken off"))
        wait_for(lambda: len(text(browser, "answer")) > 3, "some tokens")
        server.signal(signum)
        wait_for_status(browser, status)
        assert text(browser, "status").endswith(half)
        server.wait()
        ask(browser, "Is anybody there?")
        wait_for_status(browser, "The server cannot be reached (")
        server.start()


@in_each_browser
def test_the_network_may_cut_where_it_likes(browser: Browser, serve: Serve) -> None:
    server = serve("tokens_servers:cut_up", SECONDS_PER_TOKEN=0)
    with httpx.stream("POST", f"{server.url}/v1/chat/completions", json=asked(stream=True)) as wire:
        assert next(wire.iter_raw()).startswith(b":")  # where an event would begin with "data:"
    open_page(browser, server)
    ask(browser, "What is a stream?")
    wait_for_status(browser, "The whole answer")
    answer = text(browser, "answer")
    assert answer == "".join(squawk("What is a stream?"))
    assert "☕" in answer


@in_chromium
def test_accessible_and_no_wider_than_a_phone(browser: Chromium, serve: Serve) -> None:
    server = serve(RECIPE, SECONDS_PER_TOKEN=0)
    browser.resize(360, 800)
    try:
        for dark in (True, False):
            browser.darken(dark)
            open_page(browser, server)
            ask(browser, QUESTION)
            wait_for_status(browser, "The whole answer")
            assert browser.run("return document.documentElement.scrollWidth") == 360
            assert browser.violations() == []
    finally:
        browser.resize(*SIZE)
