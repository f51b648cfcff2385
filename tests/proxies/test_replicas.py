"""Three servers behind the proxies of deploy/: whatever happens to a server, no reader notices."""

import asyncio
import logging
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, aclosing, closing, suppress
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pytest
import requests

import client_async
import client_sync
from tests.proxies.event_sources import EventSources
from tests.support.browsers import Browser
from tests.support.processes import (
    LIMIT,
    ROOT,
    UVICORN,
    Process,
    Start,
    free_port,
    need,
    run_client,
    wait_for,
)
from tests.support.proxies import command, deployed, read, substitute, unit

PROXIES = ("nginx", "haproxy")
pytestmark = pytest.mark.xdist_group("more")  # most need Chromium: in one worker, as the page's


class Deployment:
    """Three servers started as deploy/'s systemd unit says, behind one of deploy/'s proxies."""

    def __init__(self, name: str, tmp: Path, changes: dict[str, str], options: list[str]) -> None:
        self.name = name
        self.processes: list[Process] = []

        def start_replica(i: int) -> Process:
            port = free_port()
            service = unit(port)
            words = [*service["ExecStart"].split(), *options]
            log = tmp / f"replica-{i}.log"
            self.processes.append(Process(words, log, port, cwd=service["WorkingDirectory"]))
            return self.processes[-1]

        with ThreadPoolExecutor(3) as pool:
            self.replicas = list(pool.map(start_replica, range(3)))
        port = free_port()
        config = deployed(name, port, [replica.port for replica in self.replicas], tmp, changes)
        self.processes.append(Process(command(name, config), tmp / f"{name}.log", port))
        self.url = self.processes[-1].url

    def start_again(self) -> None:
        """Start what has been killed, and wait until the proxy asks each of the servers."""
        for replica in self.replicas:
            if replica.popen.poll() is not None:
                replica.start()
        for path in ("/ndjson?steps=1", "/sse?steps=1"):
            asked = [replica.log.count(path) for replica in self.replicas]

            def all_are_asked(path: str = path, asked: list[int] = asked) -> bool:
                with suppress(requests.ConnectionError):
                    requests.get(self.url + path, timeout=LIMIT)
                return all(
                    replica.log.count(path) > n
                    for replica, n in zip(self.replicas, asked, strict=True)
                )

            wait_for(all_are_asked, "the proxy to ask each server")

    def kill(self) -> None:
        for process in self.processes:
            process.kill()

    def streams(self) -> int:
        return sum(map(count_streams, self.replicas))


def count_streams(server: Process) -> int:
    """Count the connections that a server has open."""
    connections = psutil.Process(server.pid).net_connections("tcp")
    return sum(c.status == psutil.CONN_ESTABLISHED for c in connections)


@pytest.fixture(scope="module", params=PROXIES)
def shared_deployment(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Deployment]:
    """Three servers behind a proxy."""
    deployment = Deployment(request.param, tmp_path_factory.mktemp(request.param), {}, [])
    yield deployment
    deployment.kill()


@pytest.fixture
def deployment(shared_deployment: Deployment) -> Deployment:
    """The same ones, whatever the test before has killed."""
    shared_deployment.start_again()
    return shared_deployment


Deploy = Callable[..., Deployment]


@pytest.fixture
def deploy(tmp_path: Path) -> Iterator[Deploy]:
    """Start servers and a proxy with other settings: `deploy("nginx", options=[...])`."""
    deployments: list[Deployment] = []

    def start_it(
        name: str, changes: dict[str, str] | None = None, options: list[str] | None = None
    ) -> Deployment:
        deployments.append(Deployment(name, tmp_path, changes or {}, options or []))
        return deployments[-1]

    yield start_it
    for deployment in deployments:
        deployment.kill()


@pytest.fixture(autouse=True)
def clients_with_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two hundred readers start at once in this one process. Where the machine is busy that took
    longer than the five seconds in which a reader expects to be connected.
    """
    for client in (client_async, client_sync):
        monkeypatch.setattr(client, "CONNECT_TIMEOUT", LIMIT)


class Readers:
    """Readers of one NDJSON stream, some with aiohttp and some with requests, in threads."""

    def __init__(self, url: str, n_async: int, n_sync: int) -> None:
        self.got: list[list[int]] = [[] for _ in range(n_async + n_sync)]
        self.failures: list[BaseException] = []
        self.enough = False  # then they leave
        self.cuts = 0  # how often a stream broke off
        self.handler = logging.Handler()
        self.handler.addFilter(self.count_cut)
        for client in ("client_async", "client_sync"):
            logging.getLogger(client).addHandler(self.handler)

        async def read_async(ids: list[int]) -> None:
            async with aclosing(client_async.read_events(url)) as events:
                async for event in events:
                    ids.append(event["event_id"])
                    if self.enough:
                        break

        async def read_all_async() -> None:
            async with asyncio.TaskGroup() as group:
                for ids in self.got[:n_async]:
                    group.create_task(read_async(ids))

        def read_sync(ids: list[int]) -> None:
            for event in client_sync.read_events(url):
                ids.append(event["event_id"])
                if self.enough:
                    break

        self.threads = [self.start(lambda: asyncio.run(read_all_async()))]
        self.threads += [self.start(partial(read_sync, ids)) for ids in self.got[n_async:]]

    def count_cut(self, _: logging.LogRecord) -> bool:
        self.cuts += 1
        return False

    def start(self, target: Callable[[], Any]) -> threading.Thread:
        def run() -> None:
            try:
                target()
            except BaseException as error:
                self.failures.append(error)

        thread = threading.Thread(target=run, daemon=True)
        thread.start()
        return thread

    def ids(self) -> list[list[int]]:
        return [list(ids) for ids in self.got]

    def join(self) -> None:
        """Wait until all of them have ended."""
        wait_for(lambda: not any(t.is_alive() for t in self.threads), "the readers to end")
        for client in ("client_async", "client_sync"):
            logging.getLogger(client).removeHandler(self.handler)
        assert not self.failures


@pytest.fixture
def browser(browsers: Callable[[str], Browser]) -> Iterator[Browser]:
    """Chromium."""
    browser = browsers("chromium")
    yield browser
    browser.open("about:blank")
    browser.console()


def open_stream(url: str, path: str) -> socket.socket:
    """Ask for a stream, with little room for what comes."""
    reader = socket.socket()
    reader.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    host, port = url.removeprefix("http://").split(":")
    reader.connect((host, int(port)))
    reader.sendall(f"GET {path} HTTP/1.1\r\nHost: {host}\r\n\r\n".encode())
    return reader


class Everybody:
    """Readers and a browser with the same stream, and what they have to show in the end."""

    def __init__(
        self, url: str, query: str, browser: Browser, n_async: int = 20, n_sync: int = 10
    ) -> None:
        self.sources = EventSources(browser, f"{url}/openapi.json", f"/sse?{query}", 3)
        self.readers = Readers(f"{url}/ndjson?{query}", n_async, n_sync)
        wait_for(lambda: self.readers.failures or all(self.ids()), "the first events")
        assert not self.readers.failures

    def ids(self) -> list[list[int]]:
        """Return the event ids that each reader has had."""
        return [*self.readers.ids(), *self.sources.ids()]

    def go_on(self) -> None:
        """Wait until each reader has had some more events."""
        before = self.ids()

        def all_have_gone_on() -> bool:
            pairs = zip(self.ids(), before, strict=True)
            return bool(self.readers.failures) or all(len(a) > len(b) + 2 for a, b in pairs)

        wait_for(all_have_gone_on, "more events for everybody")

    def leave(self) -> None:
        self.readers.enough = True
        self.readers.join()
        self.sources.close()

    def finish(self, steps: int) -> None:
        """Wait for the end of the streams, which nobody may miss."""
        self.readers.join()
        wait_for(lambda: self.sources.states() == "222", "the 204 that closes an EventSource")
        assert {ids[-1] for ids in self.ids()} == {steps - 1}

    def check(self, fault: str, times: int) -> None:
        """Every reader has had every event once and in order. Print a row of tests/README.md.

        The rows are seen with `pytest -n 0 -s`.
        """
        everybody = self.ids()
        lost = sum(max(ids) + 1 - len({*ids}) for ids in everybody)
        doubled = sum(len(ids) - len({*ids}) for ids in everybody)
        cuts = self.readers.cuts + sum(self.sources.errors())
        print(f"\n| {fault} ({cuts} streams cut) | {times} | {lost} | {doubled} |")
        for ids in everybody:
            assert ids == list(range(len(ids)))


def test_nginx_accepts_the_file(tmp_path: Path) -> None:
    words = command("nginx", deployed("nginx", free_port(), [8001, 8002, 8003], tmp_path))
    done = subprocess.run([*words, "-t"], capture_output=True, text=True)
    assert "test is successful" in done.stderr, done.stderr
    assert "[warn]" not in done.stderr


def test_haproxy_accepts_the_file() -> None:
    haproxy = need("haproxy", "haproxy")
    config = ROOT / "deploy/haproxy.cfg"
    done = subprocess.run([haproxy, "-c", "-f", config], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "WARNING" not in done.stdout + done.stderr


def test_systemd_accepts_the_unit(tmp_path: Path) -> None:
    analyze = need("systemd-analyze", "systemd")
    need("curl", "curl")
    text = (ROOT / "deploy/streams@.service").read_text()
    file = tmp_path / "streams@8001.service"
    file.write_text(substitute(text, {"/srv/streams/.venv/bin/uvicorn": sys.executable}))
    done = subprocess.run([analyze, "verify", file], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


ENDLESS = "steps=100000&interval=0.2"


def test_servers_killed_one_after_the_other(deployment: Deployment, browser: Browser) -> None:
    everybody = Everybody(deployment.url, ENDLESS, browser)
    for victim in deployment.replicas:
        wait_for(partial(count_streams, victim), "a stream to cut")
        victim.kill()
        victim.start()
    everybody.go_on()
    everybody.leave()
    everybody.check("one of three servers killed with `kill -9` in mid-stream", 3)


def test_rolling_restart_under_200_readers(deployment: Deployment, browser: Browser) -> None:
    everybody = Everybody(deployment.url, ENDLESS, browser, n_async=180, n_sync=20)
    for replica in deployment.replicas:
        assert count_streams(replica) > 20
        # What `systemctl restart` does.
        replica.signal(signal.Signals[unit(replica.port)["KillSignal"]])
        assert replica.wait() == -signal.SIGTERM
        replica.start()
        subprocess.run(unit(replica.port)["ExecStartPost"].split(), check=True, timeout=LIMIT)
    everybody.go_on()
    everybody.leave()
    assert everybody.readers.cuts >= 200 - 20
    assert "Traceback" not in "".join(replica.log for replica in deployment.replicas)
    everybody.check("a server restarted (SIGTERM) under 200 readers", 3)


def test_all_servers_down_at_once(deployment: Deployment, browser: Browser) -> None:
    """The proxy must not answer an `EventSource` with an error: it would give up."""
    everybody = Everybody(deployment.url, "steps=20&interval=0.2", browser, 5, 5)
    for replica in deployment.replicas:
        replica.kill()
    # The first error is the cut, the next one is an attempt in vain.
    wait_for(lambda: min(everybody.sources.errors()) >= 2, "an attempt of each EventSource")
    assert "2" not in everybody.sources.states()
    for replica in deployment.replicas:
        replica.start()
    everybody.finish(20)
    everybody.check("all three servers killed at once, then started", 1)


@pytest.mark.parametrize("name", PROXIES)
def test_readers_that_leave_or_never_read_and_a_server_that_hangs(
    deploy: Deploy, browser: Browser, name: str
) -> None:
    """With 30 s made 2 s, and 12 s made 1 s."""
    readers, servers = {
        "nginx": ("send_timeout", "proxy_read_timeout"),
        "haproxy": ("timeout client", "timeout server"),
    }[name]
    changes = {f"{readers} 30s": f"{readers} 2s", f"{servers} 12s": f"{servers} 1s"}
    deployment = deploy(name, changes)
    with closing(open_stream(deployment.url, "/sse?interval=0.5")) as reader:
        assert reader.recv(4096)
        assert deployment.streams() == 1
    wait_for(lambda: deployment.streams() == 0, "the server to see that it left", 8)
    with closing(open_stream(deployment.url, "/sse?steps=100000&interval=0")):
        wait_for(lambda: deployment.streams() == 1, "the stream")
        wait_for(lambda: deployment.streams() == 0, "the proxy to let it go")

    everybody = Everybody(deployment.url, "steps=20&interval=0.2", browser, 5, 5)
    assert count_streams(deployment.replicas[0])
    # It keeps its connections and takes new ones, but does nothing.
    deployment.replicas[0].signal(signal.SIGSTOP)
    everybody.finish(20)
    assert everybody.readers.cuts
    everybody.check("a server hangs (`kill -STOP`)", 1)


@pytest.mark.parametrize("name", PROXIES)
def test_a_full_server_passes_its_reader_on_and_a_cut_looks_like_a_cut(
    deploy: Deploy, browser: Browser, name: str
) -> None:
    """With two connections uvicorn refuses the second one, so each has room for one stream.

    With h11, since uvicorn's httptools sends the end of a body that it cuts even to a proxy that
    speaks HTTP/1.0.
    """
    deployment = deploy(name, options=["--limit-concurrency", "2", "--http", "h11"])

    def fill(server: Process) -> socket.socket:
        """Take a place that the proxy knows nothing of."""
        reader = open_stream(server.url, "/sse?steps=100&interval=10")
        assert b" 200 " in reader.recv(4096)
        return reader

    with ExitStack() as readers:
        for replica in deployment.replicas[:2]:
            readers.enter_context(closing(fill(replica)))
        for _ in range(3):
            assert read(f"{deployment.url}/ndjson?steps=1").status == 200
        readers.enter_context(closing(fill(deployment.replicas[2])))
        assert read(f"{deployment.url}/ndjson?steps=1").status == 503
        page = f"{deployment.url}/openapi.json"
        sources = EventSources(browser, page, "/sse?steps=2&interval=0", 1)
        wait_for(lambda: min(sources.errors()) >= 2, "attempts in vain")
    wait_for(lambda: sources.ids() == [[0, 1]], "a place for the EventSource")
    sources.close()

    # Plain text has no other sign of a cut than a body without its end.
    words = [sys.executable, str(ROOT / "client.py"), f"{deployment.url}/text?interval=10"]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as client:
        assert client.stdout
        assert client.stdout.readline()
        for replica in deployment.replicas:
            replica.kill()
        _, stderr = client.communicate(timeout=LIMIT)
    assert client.returncode == 1
    assert b"cut off in mid-stream" in stderr


def test_a_stream_that_is_silent_for_10_seconds_is_not_cut(deployment: Deployment) -> None:
    done = run_client("client_sync.py", f"{deployment.url}/ndjson?steps=2&interval=10")
    assert done.returncode == 0
    assert "2 events in 10." in done.stderr
    assert "broke off" not in done.stderr


def test_a_redirect_leads_to_the_proxy(deployment: Deployment) -> None:
    """And not to a server behind it, whose address no reader can reach."""
    response = requests.get(f"{deployment.url}/sse/", allow_redirects=False, timeout=LIMIT)
    assert response.headers["Location"] == f"{deployment.url}/sse"


def test_workers_without_a_proxy(start: Start, browser: Browser) -> None:
    """On one machine `--workers` does the same: uvicorn starts the ones anew that die."""
    # On a busy machine a worker needs more than the 5 s after which it is taken for a hung one.
    server = start(*UVICORN, "--workers", "3", "--timeout-worker-healthcheck", "20")
    server.wait_for_log("Application startup complete", 3)
    everybody = Everybody(server.url, ENDLESS, browser)

    def workers() -> list[psutil.Process]:
        children = psutil.Process(server.pid).children()
        return [child for child in children if "spawn_main" in " ".join(child.cmdline())]

    workers()[0].kill()
    server.wait_for_log("Application startup complete", 4)
    everybody.go_on()
    server.signal(signal.SIGHUP)  # a rolling restart
    server.wait_for_log("Application startup complete", 7)
    everybody.go_on()
    everybody.leave()
    everybody.check("`--workers 3`: a worker killed, or restarted by SIGHUP", 4)
