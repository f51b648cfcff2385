"""The page in real browsers: live, in time, resuming, bounded, accessible; and how it is served."""

import html
import re
import shutil
import signal
import subprocess
import textwrap
import time
from collections.abc import Iterator
from functools import partial
from itertools import pairwise
from pathlib import Path

import httpx
import pytest

from tests.support.browsers import EACH, SIZE, Browser, Chromium
from tests.support.processes import (
    LIMIT,
    ROOT,
    UVICORN,
    Process,
    Start,
    need,
    start_app,
    starting,
    wait_for,
)

PAGE = ROOT / "page"
LANES = ("text", "ndjson", "sse")

in_each_browser = pytest.mark.parametrize("browser", EACH, indirect=True)
# Chromium has most of the tests, and so a second worker.
in_chromium = pytest.mark.parametrize(
    "browser", [pytest.param("chromium", marks=pytest.mark.xdist_group("more"))], indirect=True
)

# What browsers log by themselves of a connection that broke (by whoever pulled the plug), of a
# server that is down and of a status that is an error; Firefox also of an EventSource's 204. The
# icon comes when the page is there already, so the plug may be pulled in the middle of it. Nothing
# else may be on the console.
NETWORK = re.compile(
    "Failed to load resource: net::ERR_(INCOMPLETE_CHUNKED_ENCODING|CONNECTION_REFUSED)"
    "|/page/icon.svg - Failed to load resource: net::ERR_"
    "|Failed to load resource: the server responded with a status of 422"
    "|Firefox can’t establish a connection to the server at http://127.0.0.1:[0-9]+/sse"
    "|The connection to http://127.0.0.1:[0-9]+/sse[^ ]* was interrupted while the page was loading"
)

RECORD = """
// All marks that ever were drawn, in their order: one that came twice would be here twice.
window.drawn = { text: [], ndjson: [], sse: [] };
window.states = { text: ["idle"], ndjson: ["idle"], sse: ["idle"] };
for (const lane of document.querySelectorAll("[data-stream]")) {
  const { stream } = lane.dataset;
  new MutationObserver((records) => {
    for (const { type, addedNodes } of records) {
      if (type === "attributes" && states[stream].at(-1) !== lane.dataset.state) {
        states[stream].push(lane.dataset.state);
      }
      for (const node of addedNodes) {
        const id = node.dataset?.eventId;
        if (id) drawn[stream].push([Number(id), performance.now() / 1000]);
      }
    }
  }).observe(lane, { subtree: true, childList: true, attributeFilter: ["data-state"] });
}
"""


def begin(browser: Browser, url: str) -> None:
    """Open the page at `url`, with its choices in the query, and start."""
    browser.open(url)
    browser.run(RECORD)
    browser.click("#start")


def state(browser: Browser, lane: str) -> str:
    return str(
        browser.run("return document.querySelector(arguments[0]).dataset.state", selector(lane))
    )


def states(browser: Browser, lane: str) -> list[str]:
    """The states that the lane has had since it was idle."""
    return list(browser.run("return states[arguments[0]]", lane))[1:]


def text(browser: Browser, css: str) -> str:
    return str(browser.run("return document.querySelector(arguments[0]).textContent", css))


def shows(browser: Browser, css: str, message: str) -> bool:
    return text(browser, css) == message


def words(browser: Browser, lane: str) -> str:
    return text(browser, f"{selector(lane)} .words")


def selector(lane: str) -> str:
    return f'[data-stream="{lane}"]'


def drawn(browser: Browser, lane: str) -> list[int]:
    """The ids of all marks that the lane has drawn since its start, in their order."""
    return [event_id for event_id, _ in browser.run("return drawn[arguments[0]]", lane)]


def wait_for_state(browser: Browser, lane: str, *wanted: str) -> None:
    wait_for(lambda: state(browser, lane) in wanted, f"{lane} to be {' or '.join(wanted)}")


def wait_for_events(browser: Browser, lane: str, count: int) -> None:
    wait_for(lambda: len(drawn(browser, lane)) >= count, f"{count} events in {lane}")


# Live and resuming, in each browser ---------------------------------------------------------------


@in_each_browser
def test_lanes_fill_live_and_the_204_ends_sse(browser: Browser, server: Process) -> None:
    begin(browser, f"{server.url}/?steps=5&interval=0.5")
    for lane in LANES:
        wait_for_state(browser, lane, "done")
        times = dict(browser.run("return drawn[arguments[0]]", lane))
        assert list(times) == [0, 1, 2, 3, 4], lane
        # The fifth is due 2 s after the first: not all at once. A busy machine draws late.
        assert times[4] - times[0] > 0.5, f"{lane} was not drawn live"
        assert words(browser, lane).startswith("Done."), lane
        assert states(browser, lane) == ["open", "done"]
    assert "204" in words(browser, "sse")
    time.sleep(2)  # twice what `retry` says: an EventSource that was not stopped would be back
    assert server.log.count('"GET /sse') == 2, "the stream, and the request answered by 204"
    assert server.log.count('HTTP/1.1" 204') == 1


# Long enough for any test to pull the plug in mid-stream.
ENDLESS = "steps=100000&interval=0.4"


def check_resumed(browser: Browser, lane: str) -> None:
    """The lane has been resumed and goes on; it has lost and doubled nothing."""
    wait_for(lambda: text(browser, f"{selector(lane)} .resumed") != "–", f"{lane} to be resumed")
    wait_for_events(browser, lane, len(drawn(browser, lane)) + 2)
    got = drawn(browser, lane)
    assert got == list(range(len(got)))


@pytest.mark.parametrize(
    ("signum", "of_text"),
    [
        (signal.SIGKILL, r"after line [0-9]+.*Plain text has no ids"),
        (signal.SIGTERM, "ended early. Plain text has no ids to resume by"),
    ],
)
@in_each_browser
def test_a_restart_loses_and_doubles_nothing(
    browser: Browser, server: Process, signum: int, of_text: str
) -> None:
    begin(browser, f"{server.url}/?{ENDLESS}")
    for lane in LANES:
        wait_for_events(browser, lane, 2)
    server.signal(signum)
    server.wait()
    for lane in ("ndjson", "sse"):
        wait_for_state(browser, lane, "resuming")
        assert re.match(r"Resuming after event [0-9]+: ", words(browser, lane))
    wait_for_state(browser, "text", "failed")
    assert re.search(of_text, words(browser, "text"))
    server.start()
    for lane in ("ndjson", "sse"):
        check_resumed(browser, lane)
        assert states(browser, lane) == ["open", "resuming", "open"]


@in_each_browser
def test_cut(browser: Browser, start: Start) -> None:
    server = start_app(start, "tests.support.page_servers:telling")
    begin(browser, f"{server.url}/?{ENDLESS}")
    for lane in LANES:
        wait_for_events(browser, lane, 2)
        browser.click(f"{selector(lane)} .cut")
    wait_for_state(browser, "text", "failed")
    assert "you cut the connection. Plain text has no ids" in words(browser, "text")
    for lane in ("ndjson", "sse"):
        check_resumed(browser, lane)
        after = server.wait_for_log(rf"/{lane} after ([0-9]+)\n")
        assert f"Last-Event-ID: {after[0]}" in text(browser, f"{selector(lane)} .wire")


# What else it does, in Chromium -------------------------------------------------------------------


@in_chromium
def test_stop_and_start_again(browser: Browser, start: Start) -> None:
    server = start_app(start, "tests.support.page_servers:telling")
    begin(browser, f"{server.url}/?steps=100&interval=1")
    for lane in LANES:
        wait_for_events(browser, lane, 1)
    browser.click("#stop")
    for lane in LANES:
        wait_for_state(browser, lane, "idle")
        assert words(browser, lane).startswith("Stopped after "), lane
        server.wait_for_log(f"/{lane} is over")  # long before its own end
    counts = [len(drawn(browser, lane)) for lane in LANES]
    requests = [server.log.count(f'"GET /{lane}') for lane in LANES]
    browser.run("document.querySelector('#steps').value = 2")
    browser.run("document.querySelector('#interval').value = 0.1")
    time.sleep(1.5)  # long enough for another event, and for an EventSource to come back
    assert [len(drawn(browser, lane)) for lane in LANES] == counts
    assert [server.log.count(f'"GET /{lane}') for lane in LANES] == requests
    browser.click("#start")
    for lane in LANES:
        wait_for_state(browser, lane, "done")
        marks = browser.run(
            "return document.querySelectorAll(`${arguments[0]} [data-event-id]`).length",
            selector(lane),
        )
        assert marks == 2, "the marks of the stream before are gone"


@in_chromium
def test_choices_are_in_the_address(browser: Browser, shared_server: Process) -> None:
    browser.open(f"{shared_server.url}/?steps=3&interval=0.05")
    assert [state(browser, lane) for lane in LANES] == ["idle"] * 3, "a link starts nothing"
    assert browser.run(
        "return [document.querySelector('[name=steps]'), document.querySelector('[name=interval]')]"
        ".map((field) => field.value)"
    ) == ["3", "0.05"]
    browser.run(
        "const field = document.querySelector('[name=steps]'); field.value = '4';"
        "field.dispatchEvent(new InputEvent('input', { bubbles: true }))"
    )
    assert browser.run("return location.search") == "?steps=4&interval=0.05"
    browser.click("#start")
    wait_for_state(browser, "ndjson", "done")
    requested = text(browser, f"{selector('ndjson')} .wire")
    assert "GET /ndjson?steps=4&interval=0.05" in requested


@in_chromium
def test_wrong_values_are_told_beside_their_fields(
    browser: Browser, shared_server: Process
) -> None:
    detail = httpx.get(f"{shared_server.url}/text?steps=0&interval=abc").json()["detail"]
    messages = {problem["loc"][1]: problem["msg"] for problem in detail}
    begin(browser, f"{shared_server.url}/?steps=0&interval=abc")
    for name, message in messages.items():
        wait_for(partial(shows, browser, f"#{name}-problem", message), message)
        assert browser.run("return document.getElementById(arguments[0]).ariaInvalid", name)
    assert browser.run("return document.activeElement.name") == "steps"
    for lane in LANES:
        wait_for_state(browser, lane, "failed")
    browser.run("document.querySelector('#steps').value = 1")
    browser.run("document.querySelector('#interval').value = 0")
    browser.click("#start")
    wait_for_state(browser, "text", "done")
    assert text(browser, "#steps-problem") == ""


@in_chromium
def test_nobody_listens_at_the_start(browser: Browser, server: Process) -> None:
    browser.open(f"{server.url}/?steps=3&interval=0.05")
    browser.run(RECORD)
    server.kill()
    browser.click("#start")
    for lane in ("text", "ndjson"):
        wait_for_state(browser, lane, "failed")
        assert "nobody listens there" in words(browser, lane)
    wait_for_state(browser, "sse", "resuming")  # EventSource does not give up
    server.start()
    wait_for_state(browser, "sse", "done")
    assert drawn(browser, "sse") == [0, 1, 2]


@in_chromium
def test_what_arrives_is_text(browser: Browser, start: Start) -> None:
    server = start_app(start, "tests.support.page_servers:markup")
    begin(browser, f"{server.url}/?steps=2&interval=0.05")
    for lane in LANES:
        wait_for_state(browser, lane, "done")
        assert "<b>bold</b>" in text(browser, f"{selector(lane)} .wire").replace("\n", ""), lane
    assert browser.run("return document.querySelectorAll('main img, main b').length") == 0
    assert browser.run("return document.title") == "Streaming over HTTP, live"


@in_chromium
def test_a_lost_event_is_told(browser: Browser, start: Start) -> None:
    server = start_app(start, "tests.support.page_servers:gap")
    begin(browser, f"{server.url}/?steps=5&interval=0.05")
    for lane in ("ndjson", "sse"):
        wait_for_state(browser, lane, "failed")
        assert "event 3 came where event 2 was due" in words(browser, lane)
        assert drawn(browser, lane) == [0, 1]


@in_chromium
def test_many_events_leave_it_responsive(browser: Browser, shared_server: Process) -> None:
    browser.open(f"{shared_server.url}/?steps=100000&interval=0")
    # Stopped at the first event that it draws, it stops long before the last.
    browser.run(
        "const marks = document.querySelector('[data-stream=ndjson] .marks');"
        "const stop = document.querySelector('#stop');"
        "const observer = new MutationObserver(() => { stop.click(); observer.disconnect(); });"
        "observer.observe(marks, { childList: true });"
    )
    browser.click("#start")
    wait_for_state(browser, "ndjson", "idle", "done")
    wait_for(lambda: "Stopped after" in words(browser, "ndjson"), "the lane to stop")
    browser.run(
        "window.frames = 0;(function frame() { frames += 1; requestAnimationFrame(frame) })()"
    )
    browser.click("#start")
    for lane in LANES:
        wait_for_state(browser, lane, "done")
        arrived = text(browser, f"{selector(lane)} .arrived")
        count = re.fullmatch(r"100,000, ([0-9]+) drawn", arrived)
        assert count, f"{lane}: {arrived}"
        assert int(count[1]) <= 251
        assert "no schedule" in text(browser, f"{selector(lane)} .latest")
    assert browser.run("return document.querySelectorAll('*').length") < 3000
    assert browser.run("return frames") > 10
    assert "earlier rows are not shown" in text(browser, f"{selector('ndjson')} .wire")


@in_chromium
def test_keyboard_and_marks(browser: Chromium, shared_server: Process) -> None:
    begin(browser, f"{shared_server.url}/?steps=3&interval=0.05")
    wait_for_state(browser, "sse", "done")
    keys = browser.driver.switch_to
    detail = f"{selector('ndjson')} .detail"
    # One stop for Tab in each lane, from its Cut button on; the arrows go from mark to mark.
    browser.run("document.querySelector('[data-stream=ndjson] .cut').focus()")
    keys.active_element.send_keys("\ue004")  # Tab
    assert re.fullmatch(
        r"event 0 after [0-9.]+ s, (on time|[0-9,]+ ms late): Step 1 of 3: ☕",
        text(browser, detail),
    )
    keys.active_element.send_keys("\ue014")  # right
    assert text(browser, detail).endswith("Step 2 of 3: ☕")
    keys.active_element.send_keys("\ue010")  # End
    assert text(browser, detail).endswith("Step 3 of 3: ☕")
    keys.active_element.send_keys("\ue004")
    assert browser.run("return document.querySelector(arguments[0]).hidden", detail)
    assert browser.run("return document.activeElement.className") == "wire"
    # Hovering anywhere over a track shows the nearest mark, and the same event in the other lanes.
    browser.click(f"{selector('text')} .track")
    shown = [text(browser, f"{selector(lane)} .detail") for lane in LANES]
    assert shown[0].startswith("line ")
    assert len({detail.rpartition(", ")[2].partition(": ")[2] for detail in shown}) == 1


@in_chromium
def test_a_screen_reader_is_told_of_states_and_not_of_events(
    browser: Browser, shared_server: Process
) -> None:
    browser.open(f"{shared_server.url}/?steps=40&interval=0.05")
    browser.run(
        "window.news = []; const news = document.querySelector('[role=status]');"
        "new MutationObserver(() => window.news.push(news.textContent))"
        ".observe(news, { childList: true, characterData: true, subtree: true })"
    )
    browser.click("#start")
    wait_for_state(browser, "sse", "done")
    news = wait_for(
        lambda: (found := browser.run("return news")) and "204" in found[-1] and found,
        "the end to be told",
    )
    assert len(news) <= 6, news
    live = browser.run("return document.querySelectorAll('[aria-live], [role=log]').length")
    assert live == 0, "nothing else speaks"


# What has its place: it is there whatever happens, and stays where it is.
PLACES = (
    "header, form, input, #start, #stop, main, .badge, .cut, .track, .axis,"
    ".media, .words, .figures, .wire, .card"
)

# Runs in the page before its own scripts. Apart from what the browser calls a layout shift (Firefox
# does not tell), it looks in each frame where everything is.
WATCH = """
const moved = [];
new PerformanceObserver((list) => {
  // Not at its first paint, which may be of a background only.
  if (list.getEntriesByName("first-contentful-paint").length) fetch("/painted");
}).observe({ type: "paint", buffered: true });
if (PerformanceObserver.supportedEntryTypes.includes("layout-shift")) {
  new PerformanceObserver((list) => {
    for (const { node } of list.getEntries().flatMap(({ sources }) => sources)) {
      const element = node?.nodeType === Node.TEXT_NODE ? node.parentElement : node;
      // What is on the axis moves when that grows, or is gone by now (null).
      if (element && !element.closest(".track, .ticks")) moved.push(element.outerHTML);
    }
  }).observe({ type: "layout-shift", buffered: true });
}
const places = new Map();
function look() {
  if (document.readyState === "loading") return; // what is half parsed still grows
  for (const element of document.querySelectorAll("PLACES")) {
    const { x, y, width, height } = element.getBoundingClientRect();
    if (width === 0) continue; // not shown yet
    const place = [x + scrollX, y + scrollY, width, height].map(Math.round).join();
    const before = places.get(element) ?? place;
    if (place !== before) moved.push(`${before} -> ${place}: ${element.outerHTML}`);
    places.set(element, place);
  }
}
(function everyFrame() {
  look();
  requestAnimationFrame(everyFrame);
})();
window.everMoved = () => {
  look();
  return moved;
};
""".replace("PLACES", PLACES)


@pytest.fixture(scope="module")
def painted_first(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Process]:
    """A server whose scripts come when the page has been painted without them."""
    with starting(tmp_path_factory.mktemp("server")) as start:
        yield start_app(start, "tests.support.page_servers:painted_first")


@pytest.mark.parametrize(
    ("browser", "width"),
    [
        pytest.param(name, width, marks=pytest.mark.xdist_group(group))
        for name, group, widths in (
            ("chromium", "more", (320, 900, 1280)),  # one of each layout
            ("firefox", "firefox", (360,)),
        )
        for width in widths
    ],
    indirect=["browser"],
)
def test_layout_stands_still(browser: Browser, painted_first: Process, width: int) -> None:
    """From the first paint on, which comes before the scripts do; whatever happens to a stream."""
    browser.resize(width, 720)
    try:
        with browser.preload(WATCH):
            begin(browser, f"{painted_first.url}/?steps=12&interval=0.1")
        painted, scripts = browser.run(
            "return [performance.getEntriesByName('first-contentful-paint')[0].startTime,"
            " Math.min(...performance.getEntriesByType('resource')"
            "   .filter(({ name }) => name.endsWith('.js')).map(({ responseEnd }) => responseEnd))]"
        )
        assert painted < scripts
        for lane in LANES:  # with all that their states have to say
            wait_for_events(browser, lane, 3)
            browser.click(f"{selector(lane)} .cut")
        wait_for_state(browser, "ndjson", "done")
        wait_for_state(browser, "sse", "done")
        check_tracks(browser, width)
        browser.run("for (const field of document.querySelectorAll('input')) field.value = 'x'")
        browser.click("#start")
        for name in ("steps", "interval"):
            wait_for(partial(text, browser, f"#{name}-problem"), f"what is wrong with {name}")
        assert browser.run("return everMoved()") == []
        assert browser.run("return document.documentElement.scrollWidth") <= width
    finally:
        browser.resize(*SIZE)


def check_tracks(browser: Browser, width: int) -> None:
    """The marks of one event stand under one another, on one axis, and above all the wires."""
    lanes, axis, wires = browser.run(
        """
        const box = (element) => {
          const { left, right, top, bottom } = element.getBoundingClientRect();
          return { left, right, top: top + scrollY, bottom: bottom + scrollY };
        };
        const lanes = [...document.querySelectorAll("[data-stream]")].map((lane) => ({
          track: box(lane.querySelector(".track")),
          badge: box(lane.querySelector(".badge")),
          cut: box(lane.querySelector(".cut")),
          marks: [...lane.querySelectorAll("[data-event-id]")].map((mark) => {
            const { left, right } = box(mark);
            return [(left + right) / 2, Number(mark.ariaLabel.match(/after ([0-9.]+) s/)[1])];
          }),
        }));
        const wires = [...document.querySelectorAll(".wire")].map(box);
        return [lanes, box(document.querySelector(".ticks")), wires];
        """
    )
    tracks = [lane["track"] for lane in lanes]
    assert {(box["left"], box["right"]) for box in [*tracks, axis]} == {
        (axis["left"], axis["right"])
    }
    marks = [mark for lane in lanes for mark in lane["marks"]]
    (first_x, first), (last_x, last) = min(marks), max(marks)
    for x, after in marks:  # one scale for all of them
        wanted = first_x + (after - first) / (last - first) * (last_x - first_x)
        assert abs(x - wanted) < 1
    assert [box["top"] for box in tracks] == sorted(box["top"] for box in tracks)
    assert axis["top"] >= tracks[-1]["bottom"]
    assert axis["bottom"] < min(box["top"] for box in wires)
    if width == 1280:
        seen = [axis, *(lane[part] for lane in lanes for part in ("track", "badge", "cut"))]
        assert all(box["top"] >= 0 and box["bottom"] <= 720 for box in seen)
        gaps = [below["top"] - above["bottom"] for above, below in pairwise(tracks)]
        assert max(gaps) < 20, "one right above the other"
        assert len({box["top"] for box in wires}) == 1, "the wires stand side by side"


@in_chromium
def test_the_axis_has_room_for_its_labels(browser: Chromium, server: Process) -> None:
    """A phone is turned, a window made narrower, after the last event: no label on another."""
    begin(browser, f"{server.url}/?steps=10&interval=0.01")
    wait_for_state(browser, "sse", "done")

    def labels_apart() -> bool:
        boxes = browser.run(
            """
            return [...document.querySelectorAll(".ticks span")].map((label) => {
              const { left, right } = label.getBoundingClientRect();
              return [left, right];
            });
            """
        )
        return len(boxes) > 1 and all(right <= left for (_, right), (left, _) in pairwise(boxes))

    try:
        for width in (360, SIZE[0], 360):
            browser.resize(width, 900)
            wait_for(labels_apart, f"an axis that can be read at {width} pixels")
    finally:
        browser.resize(*SIZE)


@in_chromium
def test_accessibility(browser: Chromium, server: Process) -> None:
    rules = "wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "wcag22aa", "best-practice"

    def check(when: str) -> None:
        assert browser.violations(*rules) == [], when
        browser.darken()
        try:
            assert browser.violations("color-contrast") == [], f"{when}, dark"
        finally:
            browser.darken(False)

    browser.resize(360, 1000)
    try:
        begin(browser, f"{server.url}/?steps=100&interval=1")
        wait_for_events(browser, "sse", 2)
        browser.run("document.querySelector('[data-event-id]').focus()")
        check("open, narrow, with a mark focused")
        browser.resize(*SIZE)
        server.kill()
        wait_for_state(browser, "ndjson", "resuming")
        wait_for_state(browser, "text", "failed")
        check("resuming and failed")
        server.start()
        begin(browser, f"{server.url}/?steps=3&interval=0")
        wait_for_state(browser, "sse", "done")
        check("done")
        begin(browser, f"{server.url}/?steps=x&interval=11")
        wait_for_state(browser, "sse", "failed")
        check("wrong values")
    finally:
        browser.resize(*SIZE)


@in_chromium
def test_links_lead_somewhere(browser: Browser, shared_server: Process) -> None:
    browser.open(shared_server.url)
    docs, recipes = browser.run("return [...document.querySelectorAll('nav a')].map((a) => a.href)")
    assert "swagger-ui" in httpx.get(docs).text
    assert recipes == f"{shared_server.url}/#recipes"
    browser.click("nav a[href='#recipes']")
    top = browser.run("return document.getElementById('recipes').getBoundingClientRect().top")
    assert 0 <= top < SIZE[1]


@in_chromium
def test_the_policy_bites(browser: Browser, shared_server: Process) -> None:
    browser.open(shared_server.url)
    browser.run(
        "const script = document.createElement('script'); script.textContent = 'window.bitten = 1';"
        "document.body.append(script);"
    )
    assert browser.run("return window.bitten") is None
    entries = browser.console()
    assert len(entries) == 1, entries
    assert "Content Security Policy" in entries[0]


# How it is served and made ------------------------------------------------------------------------

CHROMIUM_ACCEPT = (
    "text/html,application/xhtml+xml,application/xml;q=0.9,image/avif,image/webp,*/*;q=0.8"
)
ACCEPTS = {  # a browser names text/html, a program does not
    CHROMIUM_ACCEPT: "text/html",
    "*/*": "application/json",
    ";;,,=;q=": "application/json",
}


@pytest.mark.parametrize("accept", ACCEPTS)
def test_index_is_chosen_by_accept(shared_server: Process, accept: str) -> None:
    answer = httpx.get(shared_server.url, headers={"Accept": accept})
    assert answer.headers["Content-Type"].split(";")[0] == ACCEPTS[accept]
    assert answer.headers["Vary"] == "Accept"
    if ACCEPTS[accept] == "application/json":
        assert set(answer.json()) == {"message", "streams"}
        assert answer.json()["streams"] == ["/text", "/ndjson", "/sse"]


def test_page_and_assets_are_strict(shared_server: Process) -> None:
    page = httpx.get(shared_server.url, headers={"Accept": "text/html"})
    assets = re.findall(r'(?:src|href)="(page/[^"]+)"', page.text)
    assert {Path(asset).suffix for asset in assets} == {".js", ".css", ".svg"}
    answers = [page, *(httpx.get(f"{shared_server.url}/{asset}") for asset in assets)]
    for answer in answers:
        assert answer.status_code == 200, answer.url
        assert "default-src 'self'" in answer.headers["Content-Security-Policy"]
        assert answer.headers["X-Content-Type-Options"] == "nosniff"
        assert not re.search(
            r"https?://(?!www\.w3\.org/2000/svg)[^\s\"]+\.(js|css|woff2?)", answer.text
        )
    assert not re.search(r"<style|\sstyle=|\son[a-z]+=|<script(?![^>]*\ssrc=)", page.text)


def test_without_its_page_the_server_answers_json(start: Start, tmp_path: Path) -> None:
    shutil.copy(ROOT / "main.py", tmp_path)
    server = start(*UVICORN, cwd=tmp_path)
    answer = httpx.get(server.url, headers={"Accept": "text/html"})
    assert (answer.status_code, answer.json()["streams"]) == (200, ["/text", "/ndjson", "/sse"])
    assert httpx.get(f"{server.url}/page/page.js").status_code == 404


def test_page_is_found_from_any_working_directory(start: Start, tmp_path: Path) -> None:
    server = start(*UVICORN, "--app-dir", str(ROOT), cwd=tmp_path)
    page = httpx.get(server.url, headers={"Accept": "text/html"})
    assert page.text == (PAGE / "index.html").read_text()


def test_excerpts_are_the_code_that_runs() -> None:
    page = (PAGE / "index.html").read_text()
    excerpts = re.findall(r'<code data-from="([^"]+)">(.*?)</code>', page, re.DOTALL)
    assert {name for name, _ in excerpts} == {"main.py", "page/readers.js"}
    for name, markup in excerpts:
        excerpt = html.unescape(markup)
        source = f"\n{(ROOT / name).read_text()}\n"
        indented = (textwrap.indent(excerpt, " " * n) for n in range(0, 12, 2))
        assert any(f"\n{lines}\n" in source for lines in indented), f"{name} has no\n{excerpt}"
    # Each format has one of each.
    for lane in page.split("<h3>")[1:]:
        assert 'data-from="main.py"' in lane
        assert 'data-from="page/readers.js"' in lane


def test_the_page_names_the_recipes() -> None:
    page = (PAGE / "index.html").read_text()
    listed = re.findall(r"<dt>(\w+)</dt><dd>", page[page.index('id="recipes"') :])
    assert set(listed) == set(
        re.findall(r"^## (\w+)$", (ROOT / "recipes/README.md").read_text(), re.M)
    )


def test_readme_names_each_file_and_the_limits() -> None:
    readme = (PAGE / "README.md").read_text()
    table = re.findall(r"^\| (`.*?) \|", readme, re.MULTILINE)
    named = re.findall(r"`([^`]+)`", " ".join(table))
    assert {*named, "README.md"} == {file.name for file in PAGE.iterdir()}
    lane = (PAGE / "lane.js").read_text()
    marks, rows = re.findall(r"export const MAX_\w+ = (\d+);", lane)
    assert f"at most {marks} marks plus the latest, and {rows} rows" in readme
    assert "const ON_TIME = 0.1;" in lane, "the tenth of a second"
    assert "```" not in readme, "nothing here is run"


def test_logic() -> None:
    node = need("node", "nodejs")
    command = [node, "--test", str(Path(__file__).parent / "page_logic.test.mjs")]
    result = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT)
    assert result.returncode == 0, result.stdout
