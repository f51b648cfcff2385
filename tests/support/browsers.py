"""Real browsers without a window, driven alike: Chromium by Selenium, Firefox by WebDriver BiDi.

Selenium drives Firefox only through geckodriver, which Debian does not have. Firefox itself speaks
WebDriver BiDi (https://www.w3.org/TR/webdriver-bidi/), of which a handful of commands is enough.
"""

import contextlib
import itertools
import json
import os
import re
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Protocol

import pytest
from selenium import webdriver
from selenium.common.exceptions import WebDriverException
from selenium.webdriver.common.by import By
from websockets.exceptions import InvalidHandshake
from websockets.sync.client import ClientConnection, connect

from tests.support.npm import node_modules
from tests.support.processes import LIMIT, free_port, need, wait_for

SIZE = (1600, 1000)


class Browser(Protocol):
    """A browser with one page."""

    def open(self, url: str) -> None:
        """Show the page at `url`, fully loaded."""

    def run(self, function_body: str, *arguments: Any) -> Any:
        """Run JavaScript in the page; return what it returns, which must be JSON."""

    def click(self, selector: str) -> None:
        """Click on an element as a person does."""

    def resize(self, width: int, height: int) -> None:
        """Give the page this size in CSS pixels."""

    def preload(self, script: str) -> AbstractContextManager[None]:
        """Run JavaScript in each page that is opened meanwhile, before the page's own."""

    def console(self) -> list[str]:
        """Return the warnings and errors on the console since the last time."""


class Chromium:
    def __init__(self, driver: webdriver.Chrome) -> None:
        self.driver = driver

    def open(self, url: str) -> None:
        self.driver.get(url)

    def run(self, function_body: str, *arguments: Any) -> Any:
        return self.driver.execute_script(function_body, *arguments)

    def click(self, selector: str) -> None:
        self.driver.find_element(By.CSS_SELECTOR, selector).click()

    def console(self) -> list[str]:
        entries: list[dict[str, str]] = self.driver.get_log("browser")  # type: ignore[no-untyped-call]
        return [entry["message"] for entry in entries]

    def resize(self, width: int, height: int, dark: bool = False) -> None:
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
        self.darken(dark)

    def darken(self, dark: bool = True) -> None:
        """Give the system dark colours, or light ones."""
        feature = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [feature]})

    def violations(self, *rules: str) -> list[tuple[str, list[str]]]:
        """Return what axe-core finds wrong in the page as it is now, and where: by all its rules,
        or by those with one of these names or tags.
        """
        if not self.run("return 'axe' in window"):
            self.run((node_modules() / "axe-core" / "axe.min.js").read_text())
        result = self.driver.execute_async_script(
            "const [rules, done] = arguments;"
            "const options = rules.length ? { runOnly: rules } : {};"
            "axe.run(options).then(done, (error) => done({ error }))",
            rules,
        )
        assert result["passes"], "axe has looked at the page"
        return [(v["id"], [n["html"] for n in v["nodes"]][:3]) for v in result["violations"]]

    @contextlib.contextmanager
    def preload(self, script: str) -> Iterator[None]:
        name = "Page.{}ScriptToEvaluateOnNewDocument"
        added = self.driver.execute_cdp_cmd(name.format("add"), {"source": script})
        yield
        self.driver.execute_cdp_cmd(name.format("remove"), added)


class Firefox:
    def __init__(self, connection: ClientConnection) -> None:
        self.connection = connection
        self.ids = itertools.count()
        self.entries: list[str] = []
        self.command("session.new", capabilities={"alwaysMatch": {"acceptInsecureCerts": True}})
        self.command("session.subscribe", events=["log.entryAdded"])
        self.context = self.command("browsingContext.getTree")["contexts"][0]["context"]
        self.resize(*SIZE)

    def command(self, method: str, **params: Any) -> Any:
        number = next(self.ids)
        self.connection.send(json.dumps({"id": number, "method": method, "params": params}))
        while True:
            message = json.loads(self.connection.recv(LIMIT))
            if message.get("method") == "log.entryAdded":
                if message["params"]["level"] in ("warn", "error"):
                    self.entries.append(message["params"]["text"])
            elif message.get("id") == number:
                if message["type"] == "error":
                    raise AssertionError(f"{method}: {message['message']}")
                return message["result"]

    def open(self, url: str) -> None:
        self.command("browsingContext.navigate", context=self.context, url=url, wait="complete")

    def run(self, function_body: str, *arguments: Any) -> Any:
        result = self.command(
            "script.evaluate",
            expression=(
                f"JSON.stringify((function() {{ {function_body} }})(...{json.dumps(arguments)}))"
            ),
            target={"context": self.context},
            awaitPromise=False,
        )
        if result["type"] == "exception":
            raise AssertionError(result["exceptionDetails"]["text"])
        return json.loads(result["result"].get("value", "null"))

    def click(self, selector: str) -> None:
        middle = self.run(
            """const element = document.querySelector(arguments[0]);
            element.scrollIntoView({ block: "center", behavior: "instant" });
            const { left, top, width, height } = element.getBoundingClientRect();
            return [Math.round(left + width / 2), Math.round(top + height / 2)];""",
            selector,
        )
        actions = [
            {"type": "pointerMove", "x": middle[0], "y": middle[1]},
            {"type": "pointerDown", "button": 0},
            {"type": "pointerUp", "button": 0},
        ]
        pointer = {"type": "pointer", "id": "mouse", "actions": actions}
        self.command("input.performActions", context=self.context, actions=[pointer])

    def resize(self, width: int, height: int) -> None:
        size = {"width": width, "height": height}
        self.command("browsingContext.setViewport", context=self.context, viewport=size)

    @contextlib.contextmanager
    def preload(self, script: str) -> Iterator[None]:
        function = f"() => {{ {script} }}"
        added = self.command("script.addPreloadScript", functionDeclaration=function)
        yield
        self.command("script.removePreloadScript", **added)

    def console(self) -> list[str]:
        self.command("session.status")  # what was logged before has come before its answer
        entries, self.entries = self.entries, []
        return entries


@contextlib.contextmanager
def chromium(profile: Path) -> Iterator[Chromium]:
    """Start Chromium: the one that is installed, or one that Selenium finds or fetches."""
    options = webdriver.ChromeOptions()
    for argument in (
        "--headless=new",
        "--no-sandbox",  # Chromium does not start as root with it
        "--disable-gpu",
        "--disable-background-networking",
        "--disable-component-update",
        "--disable-sync",
        "--no-first-run",
        "--force-prefers-reduced-motion",
        f"--user-data-dir={profile}",
    ):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    options.accept_insecure_certs = True
    options.binary_location = shutil.which("chromium") or ""
    service = webdriver.ChromeService(shutil.which("chromedriver"))
    try:
        driver = webdriver.Chrome(options, service)
    except WebDriverException as error:
        message = f"no Chromium: apt-get install chromium chromium-driver ({error.msg})"
        if os.environ.get("CI") == "true":
            pytest.fail(message)
        pytest.skip(message)
    browser = Chromium(driver)
    browser.resize(*SIZE)
    browser.open("about:blank")  # and not the page of a new tab, which wants the network
    browser.console()
    try:
        yield browser
    finally:
        driver.quit()


# Firefox looks for updates, for a way out of the network, for news: not in a test.
QUIET = """
user_pref("app.update.enabled", false);
user_pref("browser.aboutConfig.showWarning", false);
user_pref("browser.newtabpage.enabled", false);
user_pref("browser.safebrowsing.downloads.remote.enabled", false);
user_pref("browser.safebrowsing.malware.enabled", false);
user_pref("browser.safebrowsing.phishing.enabled", false);
user_pref("browser.shell.checkDefaultBrowser", false);
user_pref("browser.startup.homepage_override.mstone", "ignore");
user_pref("browser.startup.page", 0);
user_pref("datareporting.policy.dataSubmissionEnabled", false);
user_pref("dom.disable_open_during_load", false);
user_pref("extensions.getAddons.cache.enabled", false);
user_pref("extensions.update.enabled", false);
user_pref("network.captive-portal-service.enabled", false);
user_pref("network.connectivity-service.enabled", false);
user_pref("services.settings.server", "data:,#remote-settings-dummy/v1");
user_pref("toolkit.telemetry.enabled", false);
"""


@contextlib.contextmanager
def firefox(profile: Path) -> Iterator[Firefox]:
    """Start the Firefox that is installed."""
    program = shutil.which("firefox") or need("firefox-esr", "firefox-esr")
    (profile / "user.js").write_text(QUIET)
    port = free_port()
    command = [program, "--headless", "--no-remote", "--profile", str(profile)]
    command.append(f"--remote-debugging-port={port}")
    environment = {**os.environ, "HOME": str(profile), "MOZ_CRASHREPORTER_DISABLE": "1"}
    with (profile / "output").open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output, env=environment)

    def connection() -> ClientConnection | None:
        with contextlib.suppress(OSError, InvalidHandshake):
            return connect(f"ws://127.0.0.1:{port}/session", max_size=None, proxy=None)
        time.sleep(0.1)
        return None

    try:
        with wait_for(connection, "Firefox to listen") as opened:
            yield Firefox(opened)
    finally:
        process.terminate()
        process.wait(LIMIT)


BROWSERS: dict[str, Callable[[Path], AbstractContextManager[Browser]]] = {
    "chromium": chromium,
    "firefox": firefox,
}
# For `parametrize`: whoever shares a browser runs one after the other, in one worker.
EACH = [pytest.param(name, marks=pytest.mark.xdist_group(name)) for name in BROWSERS]


def leave(browser: Browser, known: re.Pattern[str]) -> list[str]:
    """Leave a browser on an empty page; return what was on its console and is not `known`."""
    unexpected = [entry for entry in browser.console() if not known.search(entry)]
    browser.open("about:blank")
    return unexpected
