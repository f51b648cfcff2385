"""Take the README's picture of the page anew: `python -m tests.page.picture`.

Three lanes in mid-stream, one of them cut and resumed.
"""

import base64
from pathlib import Path
from tempfile import TemporaryDirectory

from tests.support.browsers import Chromium, chromium
from tests.support.processes import ROOT, UVICORN, Process, free_port, wait_for

WIDTH, MARGIN = 1280, 12


def take(browser: Chromium, url: str) -> bytes:
    """Return the picture, as PNG."""

    def arrived(lane: str, count: int) -> bool:
        marks = f"[data-stream={lane}] [data-event-id]"
        code = "return document.querySelectorAll(arguments[0]).length"
        return bool(browser.run(code, marks) >= count)

    browser.driver.execute_cdp_cmd("Emulation.setScrollbarsHidden", {"hidden": True})
    browser.resize(WIDTH, 800)
    browser.open(f"{url}/?steps=10&interval=1.0")
    # Down to where the code begins.
    height = browser.run("return document.querySelector('.read').getBoundingClientRect().bottom")
    browser.resize(WIDTH, round(height) + MARGIN)
    browser.click("#start")
    wait_for(lambda: arrived("ndjson", 4), "four events")
    browser.run(
        "setTimeout(() => document.querySelector('[data-stream=ndjson] .cut').click(), 450)"
    )
    wait_for(lambda: arrived("sse", 8), "eight events")
    return base64.b64decode(browser.driver.get_screenshot_as_base64())


def main() -> None:
    port = free_port()
    words = [word.replace("{port}", str(port)) for word in UVICORN]
    with TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        profile = Path(folder)
        server = Process(words, profile / "server.log", port)
        try:
            with chromium(profile) as browser:
                picture = take(browser, server.url)
        finally:
            server.kill()
    path = ROOT / "page" / "screenshot.png"
    path.write_bytes(picture)
    print(f"{path}: {len(picture) // 1024} KB")


if __name__ == "__main__":
    main()
