"""The page in real browsers: live, in time, resuming, bounded, accessible; and how it is served."""

import html
import re
import shutil
import signal
import subprocess
import textwrap
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
    "|Firefox can’t establish a connection to the server at http://127.0.0.1:[0-9]+/(slow/)?sse"
    "|The connection to http://127.0.0.1:[0-9]+/sse[^ ]* was interrupted while the page was loading"
)


@pytest.fixture(scope="module")
def variants(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Process]:
    """The server as the page may find it, as tests/support/page_servers.py has it."""
    with starting(tmp_path_factory.mktemp("server")) as start:
        yield start_app(start, "tests.support.page_servers:app")


def begin(browser: Browser, url: str) -> None:
    """Open the page at `url`, with its choices in the query, and start."""
    browser.open(url)
    browser.click("#start")


def text(browser: Browser, css: str) -> str:
    return str(browser.run("return document.querySelector(arguments[0]).textContent", css))


def part(browser: Browser, lane: str, name: str) -> str:
    """The text of a part of a lane: its words, its wire, a figure."""
    return text(browser, f"[data-stream={lane}] .{name}")


def cut(browser: Browser, lane: str) -> None:
    browser.click(f"[data-stream={lane}] .cut")


def marks(browser: Browser, lane: str) -> list[int]:
    """The ids of the events that the lane shows."""
    found = browser.run(
        "return [...document.querySelectorAll(arguments[0])].map((mark) => mark.dataset.eventId)",
        f"[data-stream={lane}] [data-event-id]",
    )
    return list(map(int, found))


def wait_for_state(browser: Browser, lane: str, wanted: str) -> None:
    wait_for(lambda: part(browser, lane, "badge") == wanted, f"{lane} to be {wanted}")


def wait_for_events(browser: Browser, lane: str, count: int) -> None:
    wait_for(lambda: len(marks(browser, lane)) >= count, f"{count} events in {lane}")


# In each browser ----------------------------------------------------------------------------------


@in_each_browser
def test_lanes_fill_and_the_204_ends_sse(browser: Browser, server: Process) -> None:
    begin(browser, f"{server.url}/?steps=3&interval=0.1")
    for lane in LANES:
        wait_for_state(browser, lane, "done")
        assert marks(browser, lane) == [0, 1, 2]
        assert part(browser, lane, "words").startswith("Done."), lane
        assert part(browser, lane, "resumed") == "–"
    assert "204" in part(browser, "sse", "words")
    assert server.log.count('"GET /sse') == 2, "the stream, and the request answered by 204"
    assert server.log.count('HTTP/1.1" 204') == 1


# Longer than any test: what is drawn before its end is drawn live.
ENDLESS = "steps=100000&interval=0.4"


def check_resumed(browser: Browser, lane: str, times: int = 1) -> None:
    """The lane has been resumed and goes on; it has lost and doubled nothing."""
    wait_for(lambda: part(browser, lane, "resumed") == f"{times} ×", f"{lane} to be resumed")
    wait_for_events(browser, lane, len(marks(browser, lane)) + 2)
    got = marks(browser, lane)
    assert got == list(range(len(got)))


@in_each_browser
def test_restarts_lose_and_double_nothing(browser: Browser, server: Process) -> None:
    begin(browser, f"{server.url}/?{ENDLESS}")
    for lane in LANES:
        wait_for_events(browser, lane, 2)
    for times, signum in enumerate((signal.SIGKILL, signal.SIGTERM), 1):
        server.signal(signum)
        server.wait()
        wait_for_state(browser, "text", "failed")
        assert re.search("after line [0-9]+.*no ids to resume by", part(browser, "text", "words"))
        for lane in ("ndjson", "sse"):
            wait_for_state(browser, lane, "resuming")
            assert re.match(r"Resuming after event [0-9]+: ", part(browser, lane, "words"))
        server.start()
        for lane in ("ndjson", "sse"):
            check_resumed(browser, lane, times)


# What has its place: it is there whatever happens, and stays where it is.
PLACES = (
    "header, form, input, #start, #stop, main, .badge, .cut, .track, .axis,"
    ".media, .words, .figures, .wire, .card"
)

# Runs in the page before its own scripts, and looks in each frame where everything is.
WATCH = """
new PerformanceObserver((list) => {
  // Not at its first paint, which may be of a background only.
  if (list.getEntriesByName("first-contentful-paint").length) fetch("painted");
}).observe({ type: "paint", buffered: true });
window.moved = [];
const places = new Map();
function look() {
  requestAnimationFrame(look);
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
look();
""".replace("PLACES", PLACES)


@pytest.mark.parametrize(
    ("browser", "width"),
    [
        pytest.param("chromium", 320, marks=pytest.mark.xdist_group("more")),
        pytest.param("chromium", 900, marks=pytest.mark.xdist_group("more")),
        pytest.param("chromium", 1280, marks=pytest.mark.xdist_group("more")),
        pytest.param("firefox", 360, marks=pytest.mark.xdist_group("firefox")),
    ],
    indirect=["browser"],
)
def test_layout_stands_still(browser: Browser, variants: Process, width: int) -> None:
    """From the first paint on, which comes before the scripts do; whatever happens to a stream."""
    browser.resize(width, 720)
    try:
        with browser.preload(WATCH):
            begin(browser, f"{variants.url}/slow/?steps=12&interval=0.1")
        painted, scripts = browser.run(
            "return [performance.getEntriesByName('first-contentful-paint')[0].startTime,"
            " Math.min(...performance.getEntriesByType('resource')"
            "   .filter(({ name }) => name.endsWith('.js')).map(({ responseEnd }) => responseEnd))]"
        )
        assert painted < scripts
        for lane in LANES:  # with all that their states have to say
            wait_for_events(browser, lane, 3)
            cut(browser, lane)
        wait_for_state(browser, "ndjson", "done")
        wait_for_state(browser, "sse", "done")
        check_tracks(browser, width)
        browser.run("for (const field of document.querySelectorAll('input')) field.value = 'x'")
        browser.click("#start")
        for name in ("steps", "interval"):
            wait_for(partial(text, browser, f"#{name}-problem"), f"what is wrong with {name}")
        assert browser.run("return moved") == []
        assert browser.run("return document.documentElement.scrollWidth") <= width
    finally:
        browser.resize(*SIZE)


def check_tracks(browser: Browser, width: int) -> None:
    """The tracks and the axis are one below the other, and the marks stand where their time is."""

    def boxes(css: str) -> list[dict[str, float]]:
        code = (
            "return [...document.querySelectorAll(arguments[0])]"
            ".map((element) => element.getBoundingClientRect().toJSON())"
        )
        return list(browser.run(f"scrollTo(0, 0); {code}", css))

    tracks, wires = boxes(".track, .ticks"), boxes(".wire")
    assert len({(box["left"], box["right"]) for box in tracks}) == 1
    assert all(above["bottom"] <= below["top"] for above, below in pairwise(tracks))
    assert tracks[-1]["bottom"] < min(box["top"] for box in wires)
    if width == 1280:
        assert tracks[-1]["bottom"] <= 720, "all of them are seen at once"
        assert len({box["top"] for box in wires}) == 1, "the wires stand side by side"
    middles = [(box["left"] + box["right"]) / 2 for box in boxes("[data-event-id]")]
    labels = browser.run(
        "return [...document.querySelectorAll('[data-event-id]')].map((mark) => mark.ariaLabel)"
    )
    times = [float(re.findall(r"after ([0-9.]+) s", label)[0]) for label in labels]
    found = list(zip(middles, times, strict=True))
    (first_x, first), (last_x, last) = min(found), max(found)
    for x, after in found:  # one scale for all of them
        assert abs(x - first_x - (after - first) / (last - first) * (last_x - first_x)) < 1


# What else it does, in Chromium -------------------------------------------------------------------


@in_chromium
def test_stop_start_again_and_cut(browser: Browser, variants: Process) -> None:
    begin(browser, f"{variants.url}/stop/?{ENDLESS}")
    for lane in LANES:
        wait_for_events(browser, lane, 1)
    browser.click("#stop")
    for lane in LANES:
        wait_for_state(browser, lane, "idle")
        assert part(browser, lane, "words").startswith("Stopped after "), lane
        variants.wait_for_log(f"/stop/{lane} is over")
    browser.click("#start")
    for lane in LANES:
        wait_for_events(browser, lane, 2)
        assert marks(browser, lane)[0] == 0, "the marks of the stream before are gone"
        cut(browser, lane)
    wait_for_state(browser, "text", "failed")
    assert "you cut the connection. Plain text has no ids" in part(browser, "text", "words")
    for lane in ("ndjson", "sse"):
        check_resumed(browser, lane)
        after = variants.wait_for_log(rf"/stop/{lane} after ([0-9]+)\n")
        assert f"Last-Event-ID: {after[0]}" in part(browser, lane, "wire")
    # A stream that was stopped did not come back, though an EventSource would have by now.
    assert [variants.log.count(f'"GET /stop/{lane}?') for lane in LANES] == [2, 3, 3]


@in_chromium
def test_choices_are_in_the_address(browser: Browser, shared_server: Process) -> None:
    browser.open(f"{shared_server.url}/?steps=3&interval=0.05")
    assert [part(browser, lane, "badge") for lane in LANES] == ["idle"] * 3, "a link starts nothing"
    browser.run(
        "const field = document.querySelector('[name=steps]'); field.value += '0';"
        "field.dispatchEvent(new InputEvent('input', { bubbles: true }))"
    )
    assert browser.run("return location.search") == "?steps=30&interval=0.05"
    browser.click("#start")
    wait_for(lambda: part(browser, "ndjson", "wire"), "a request")
    assert "GET /ndjson?steps=30&interval=0.05" in part(browser, "ndjson", "wire")


@in_chromium
def test_wrong_values_are_told_beside_their_fields(
    browser: Browser, shared_server: Process
) -> None:
    detail = httpx.get(f"{shared_server.url}/text?steps=0&interval=abc").json()["detail"]
    begin(browser, f"{shared_server.url}/?steps=0&interval=abc")
    for lane in LANES:
        wait_for_state(browser, lane, "failed")
    for problem in detail:
        name = problem["loc"][1]
        assert text(browser, f"#{name}-problem") == problem["msg"]
        assert browser.run("return document.getElementById(arguments[0]).ariaInvalid", name)
    assert browser.run("return document.activeElement.name") == "steps"
    browser.run("document.querySelector('#steps').value = 1")
    browser.run("document.querySelector('#interval').value = 0")
    browser.click("#start")
    wait_for_state(browser, "text", "done")
    assert text(browser, "#steps-problem") == ""


@in_chromium
def test_nobody_listens_at_the_start(browser: Browser, server: Process) -> None:
    browser.open(server.url)
    server.kill()
    browser.click("#start")
    for lane in ("text", "ndjson"):
        wait_for_state(browser, lane, "failed")
        # And not after half a minute of attempts, which is told too.
        assert part(browser, lane, "words") == "Failed at the start: nobody listens there."
    wait_for_state(browser, "sse", "resuming")  # EventSource does not give up


@in_chromium
def test_what_arrives_is_text(browser: Browser, variants: Process) -> None:
    begin(browser, f"{variants.url}/markup/?steps=2&interval=0.05")
    for lane in LANES:
        wait_for_state(browser, lane, "done")
        assert "<b>bold</b>" in part(browser, lane, "wire").replace("\n", ""), lane
    assert browser.run("return document.querySelectorAll('main img, main b').length") == 0
    assert browser.run("return document.title") == "Streaming over HTTP, live"


@in_chromium
def test_a_lost_event_is_told(browser: Browser, variants: Process) -> None:
    begin(browser, f"{variants.url}/gap/?steps=5&interval=0.05")
    for lane in ("ndjson", "sse"):
        wait_for_state(browser, lane, "failed")
        assert "event 3 came where event 2 was due" in part(browser, lane, "words")
        assert marks(browser, lane) == [0, 1]
    # Plain text shows only that something is missing, at the end.
    wait_for_state(browser, "text", "failed")
    assert "the stream ended early. Plain text has no ids" in part(browser, "text", "words")


@in_chromium
def test_many_events_leave_it_responsive(browser: Browser, shared_server: Process) -> None:
    browser.open(f"{shared_server.url}/?steps=20000&interval=0")
    # Stopped at the first event that it draws, it stops long before the last.
    browser.run(
        "const marks = document.querySelector('[data-stream=ndjson] .marks');"
        "const stop = document.querySelector('#stop');"
        "const observer = new MutationObserver(() => { stop.click(); observer.disconnect(); });"
        "observer.observe(marks, { childList: true });"
    )
    browser.click("#start")
    wait_for(lambda: "Stopped after" in part(browser, "ndjson", "words"), "the lane to stop")
    browser.click("#start")
    for lane in LANES:
        wait_for_state(browser, lane, "done")
        count = re.fullmatch(r"20,000, ([0-9]+) drawn", part(browser, lane, "arrived"))
        assert count, lane
        assert int(count[1]) == len(marks(browser, lane)) <= 251
        assert "no schedule" in part(browser, lane, "latest")
    assert browser.run("return document.querySelectorAll('*').length") < 3000
    assert "earlier rows are not shown" in part(browser, "ndjson", "wire")


@in_chromium
def test_keyboard_and_marks(browser: Chromium, shared_server: Process) -> None:
    begin(browser, f"{shared_server.url}/?steps=3&interval=0.05")
    wait_for_state(browser, "sse", "done")
    keys = browser.driver.switch_to
    # One stop for Tab in each lane, from its Cut button on; the arrows go from mark to mark.
    browser.run("document.querySelector('[data-stream=ndjson] .cut').focus()")
    keys.active_element.send_keys("\ue004")  # Tab
    assert re.fullmatch(
        r"event 0 after [0-9.]+ s, (on time|[0-9,]+ ms late): Step 1 of 3: ☕",
        part(browser, "ndjson", "detail"),
    )
    keys.active_element.send_keys("\ue014")  # right
    assert part(browser, "ndjson", "detail").endswith("Step 2 of 3: ☕")
    keys.active_element.send_keys("\ue010")  # End
    assert part(browser, "ndjson", "detail").endswith("Step 3 of 3: ☕")
    keys.active_element.send_keys("\ue004")
    assert browser.run("return document.querySelector('[data-stream=ndjson] .detail').hidden")
    assert browser.run("return document.activeElement.className") == "wire"
    # Hovering anywhere over a track shows the nearest mark, and the same event in the other lanes.
    browser.click("[data-stream=text] .track")
    shown = [part(browser, lane, "detail") for lane in LANES]
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
    wait_for(lambda: "204" in text(browser, "[role=status]"), "the end to be told")
    assert len(browser.run("return news")) <= 6
    live = browser.run("return document.querySelectorAll('[aria-live], [role=log]').length")
    assert live == 0, "nothing else speaks"


@in_chromium
def test_the_axis_has_room_for_its_labels(browser: Chromium, shared_server: Process) -> None:
    """A phone is turned, a window made narrower, after the last event: no label on another."""
    begin(browser, f"{shared_server.url}/?steps=10&interval=0.01")
    wait_for_state(browser, "sse", "done")

    def labels_apart() -> bool:
        boxes = browser.run(
            "return [...document.querySelectorAll('.ticks span')]"
            ".map((label) => label.getBoundingClientRect().toJSON())"
        )
        apart = all(label["right"] <= following["left"] for label, following in pairwise(boxes))
        return len(boxes) > 1 and apart

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

    begin(browser, f"{server.url}/?steps=3&interval=0")
    wait_for_state(browser, "sse", "done")
    check("done")
    begin(browser, f"{server.url}/?steps=x&interval=11")
    wait_for_state(browser, "sse", "failed")
    check("wrong values")
    browser.resize(360, 1000)
    try:
        begin(browser, f"{server.url}/?{ENDLESS}")
        wait_for_events(browser, "sse", 2)
        browser.run("document.querySelector('[data-event-id]').focus()")
        check("open, narrow, with a mark focused")
    finally:
        browser.resize(*SIZE)
    server.kill()
    wait_for_state(browser, "ndjson", "resuming")
    wait_for_state(browser, "text", "failed")
    check("resuming and failed")


@in_chromium
def test_links_lead_somewhere_and_the_policy_bites(
    browser: Browser, shared_server: Process
) -> None:
    browser.open(shared_server.url)
    docs, recipes = browser.run("return [...document.querySelectorAll('nav a')].map((a) => a.href)")
    assert "swagger-ui" in httpx.get(docs).text
    assert recipes == f"{shared_server.url}/#recipes"
    assert browser.run("return document.getElementById('recipes') !== null")
    browser.run(
        "const script = document.createElement('script'); script.textContent = 'window.bitten = 1';"
        "document.body.append(script);"
    )
    assert browser.run("return window.bitten") is None
    (entry,) = browser.console()
    assert "Content Security Policy" in entry


# How it is served and made ------------------------------------------------------------------------

CHROMIUM_ACCEPT = (
    "text/html,application/xhtml+xml,application/xml;q=0.9,image/avif,image/webp,*/*;q=0.8"
)


def test_index_is_chosen_by_accept(shared_server: Process) -> None:
    """A browser names text/html, a program does not."""
    for accept, media_type in (
        (CHROMIUM_ACCEPT, "text/html"),
        ("*/*", "application/json"),
        (";;,,=;q=", "application/json"),
    ):
        answer = httpx.get(shared_server.url, headers={"Accept": accept})
        assert answer.headers["Content-Type"].split(";")[0] == media_type
        assert answer.headers["Vary"] == "Accept"
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


def test_the_page_names_the_recipes() -> None:
    page = (PAGE / "index.html").read_text()
    listed = re.findall(r"<dt>(\w+)</dt><dd>", page[page.index('id="recipes"') :])
    recipes = (ROOT / "recipes/README.md").read_text()
    assert set(listed) == set(re.findall(r"^## (\w+)$", recipes, re.M))


def test_readme_names_each_file_and_the_limits() -> None:
    readme = (PAGE / "README.md").read_text()
    table = re.findall(r"^\| (`.*?) \|", readme, re.MULTILINE)
    named = re.findall(r"`([^`]+)`", " ".join(table))
    assert {*named, "README.md"} == {file.name for file in PAGE.iterdir()}
    lane = (PAGE / "lane.js").read_text()
    limits = re.findall(r"export const MAX_\w+ = (\d+);", lane)
    assert "at most {} marks plus the latest, and {} rows".format(*limits) in readme
    assert "const ON_TIME = 0.1;" in lane, "the tenth of a second"


def test_logic() -> None:
    node = need("node", "nodejs")
    command = [node, "--test", str(Path(__file__).parent / "page_logic.test.mjs")]
    result = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT)
    assert result.returncode == 0, result.stdout
