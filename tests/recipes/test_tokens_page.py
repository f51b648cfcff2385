"""The page of `tokens` and `relay` in real browsers: live, stopped, told of every failure."""

import re
import signal

import httpx
import pytest

from recipes.parrot import to_tokens
from tests.support.browsers import EACH, SIZE, Browser, Chromium
from tests.support.processes import Process, Start, wait_for
from tests.support.tokens import LONG, QUESTION, asked, serve, stopped_after
from tests.support.upstreams import BEGINNING, Upstream, chunk, events, http

in_each_browser = pytest.mark.parametrize("browser", EACH, indirect=True)
in_chromium = pytest.mark.parametrize(
    "browser", [pytest.param("chromium", marks=pytest.mark.xdist_group("chromium"))], indirect=True
)

# What Chromium logs by itself of a connection that broke, and of a status that is an error.
NETWORK = re.compile(
    r"Failed to load resource: (net::ERR_|the server responded with a status of (413|429|502))"
)
HALF = " This is only the beginning of an answer."


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
def test_the_answer_comes_live_and_markup_stays_text(browser: Browser, start: Start) -> None:
    open_page(browser, serve(start, "tokens", parrot__SECONDS_PER_TOKEN=0.05))
    browser.run(
        """window.seen = [];
        const show = () => seen.push([answer.textContent, answer.ariaBusy]);
        new MutationObserver(show).observe(answer, { subtree: true, childList: true,
          characterData: true });"""
    )
    ask(browser, QUESTION)
    wait_for_status(browser, "The complete answer")
    assert "<b>" in QUESTION
    assert text(browser, "answer") == QUESTION
    assert browser.run("return answer.childElementCount") == 0
    seen = browser.run("return seen")
    # A slow browser draws several tokens at once, but never all.
    assert len(seen) > 5
    assert all(QUESTION.startswith(part) for part, _ in seen)
    # A screen reader waits while it is busy. The last token may come together with the end.
    assert {busy for _, busy in seen[:-1]} == {"true"}
    assert browser.run("return answer.ariaBusy") == "false"
    # What is on the wire stands beside it.
    assert text(browser, "wire").startswith("> POST /v1/chat/completions\n< 200 text/event-stream")
    assert text(browser, "wire").count("data: {") == len(to_tokens(QUESTION)) + 2
    assert "data: [DONE]\n" in text(browser, "wire")


@in_each_browser
def test_stop(browser: Browser, start: Start) -> None:
    server = serve(start, "tokens")
    open_page(browser, server)
    ask(browser, LONG)
    wait_for(lambda: len(text(browser, "answer")) > 3, "some tokens")
    browser.click("#stop")
    wait_for_status(browser, "Stopped by you." + HALF)
    assert int(stopped_after(server, 1)[0]) < 1000
    # What came stays, and the next question has its own answer.
    assert LONG.startswith(text(browser, "answer"))
    ask(browser, "Hello, parrot!")
    wait_for_status(browser, "The complete answer")
    assert text(browser, "answer") == "Hello, parrot!"


@in_each_browser
def test_every_failure_is_told(browser: Browser, start: Start) -> None:
    broke = "The connection to the upstream broke." + HALF
    answers = {
        "complete": http(events(*BEGINNING, chunk({}, "stop"), "[DONE]")),
        "complete, in another way": http(events(*BEGINNING, chunk({}, "stop"))),
        "ends at its limit": http(events(*BEGINNING, chunk({}, "length"), "[DONE]")),
        "ends early": http(events(*BEGINNING)),
        "breaks off": http(events(*BEGINNING), length=9999),
        "sends an error": http(events(*BEGINNING, '{"error": {"message": "Too much."}}')),
        "sends a text as its error": http(events(*BEGINNING, '{"error": "Too much."}')),
        "sends half of JSON": http(events(*BEGINNING, '{"choices": ')),
        "refuses": http(b'{"error": {"message": "Too much."}}', "429 Slow Down"),
        "refuses in plain text": http(b"Too long.", "413 No", media_type="text/plain"),
    }
    with Upstream(answers) as upstream:
        open_page(browser, serve(start, "relay", upstream.url))
        for model, status, answer in (
            ("complete", "The complete answer, in ", "One two"),
            ("complete, in another way", "The complete answer, in ", "One two"),
            ("ends at its limit", "The model ended its answer early, ", "One two"),
            ("ends early", "The upstream's answer is not complete." + HALF, "One two"),
            ("breaks off", broke, "One two"),
            ("sends an error", "Too much." + HALF, "One two"),
            ("sends a text as its error", "Too much." + HALF, "One two"),
            ("sends half of JSON", "The upstream's answer is not of this protocol", "One two"),
            ("refuses", "The server answered 429: Too much.", ""),
            ("refuses in plain text", "The server answered 413: Too long.", ""),
        ):
            ask(browser, "What?", model)
            wait_for_status(browser, status)
            assert text(browser, "answer") == answer

    server = serve(start, "tokens")
    open_page(browser, server)
    for signum, status in (
        (signal.SIGTERM, "The server is stopping."),
        (signal.SIGKILL, "The connection broke off ("),
    ):
        ask(browser, LONG)
        wait_for(lambda: len(text(browser, "answer")) > 3, "some tokens")
        server.signal(signum)
        wait_for_status(browser, status)
        assert text(browser, "status").endswith(HALF)
        server.wait()
        ask(browser, "Is anybody there?")
        wait_for_status(browser, "The connection broke off (")
        assert not text(browser, "answer")
        server.start()


@in_each_browser
def test_the_network_may_cut_where_it_likes(browser: Browser, start: Start) -> None:
    server = serve(start, "tests.support.tokens_servers:cut_up", parrot__SECONDS_PER_TOKEN=0)
    with httpx.stream("POST", f"{server.url}/v1/chat/completions", json=asked(stream=True)) as wire:
        assert next(wire.iter_raw()).startswith(b":")  # where an event would begin with "data:"
    open_page(browser, server)
    ask(browser, QUESTION)
    wait_for_status(browser, "The complete answer")
    assert text(browser, "answer") == QUESTION


@in_chromium
def test_accessible_in_two_columns_and_on_a_phone(browser: Chromium, start: Start) -> None:
    server = serve(start, "tokens", parrot__SECONDS_PER_TOKEN=0)
    try:
        for width, height in ((1280, 720), (360, 800)):
            browser.resize(width, height)
            for dark in (True, False):
                browser.darken(dark)
                open_page(browser, server)
                ask(browser, LONG)
                wait_for_status(browser, "The complete answer")
                width_of = "const { scrollWidth, clientWidth } = document.documentElement;"
                assert browser.run(f"{width_of} return scrollWidth === clientWidth")
                beside = browser.run(
                    "return wire.getBoundingClientRect().left > answer.clientWidth"
                )
                assert beside == (width == 1280)
                assert browser.violations() == []
    finally:
        browser.resize(*SIZE)
