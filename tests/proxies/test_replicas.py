"""Three servers behind the proxies of deploy/: whatever happens to a server, no reader notices."""

import json
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, suppress
from functools import partial
from pathlib import Path

import psutil
import pytest
import requests

from tests.proxies import event_sources as in_a_browser
from tests.support.browsers import Browser
from tests.support.event_sources import EventSources, event_sources
from tests.support.processes import (
    LIMIT,
    ROOT,
    UVICORN,
    Process,
    RunningClient,
    Start,
    free_port,
    need,
    wait_for,
)
from tests.support.proxies import command, deployed, read, substitute, unit
from tests.support.raw_reader import RawReader, read_until

PROXIES = ("nginx", "haproxy")
in_one_worker = pytest.mark.xdist_group("more")  # they share Chromium, and servers
# So that it is seen soon what they are for.
SOONER = {
    "nginx": {"send_timeout 30s": "send_timeout 2s", "_read_timeout 12s": "_read_timeout 5s"},
    "haproxy": {
        "timeout client 30s": "timeout client 2s",
        "timeout server 12s": "timeout server 5s",
    },
}


class Deployment:
    """Three servers started as deploy/'s systemd unit says, behind one of deploy/'s proxies."""

    def __init__(self, name: str, tmp: Path, changes: dict[str, str], options: list[str]) -> None:
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
        self.port, self.url = port, self.processes[-1].url

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

    def close(self) -> None:
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
    name = request.param
    deployment = Deployment(name, tmp_path_factory.mktemp(name), SOONER[name], [])
    with closing(deployment):
        yield deployment


@pytest.fixture
def deployment(shared_deployment: Deployment) -> Deployment:
    """The same ones, whatever the test before has killed."""
    shared_deployment.start_again()
    return shared_deployment


@pytest.fixture
def readers() -> Iterator[EventSources]:
    with event_sources() as sources:
        yield sources


@pytest.fixture
def browser(browsers: Callable[[str], Browser]) -> Iterator[Browser]:
    """Chromium."""
    browser = browsers("chromium")
    yield browser
    browser.open("about:blank")
    browser.console()


def begin(port: int, path: str) -> RawReader:
    """Ask for a stream, and wait for its first event."""
    reader = RawReader(port, path)
    assert read_until([reader], lambda: reader.arrivals)
    assert reader.status == 200
    return reader


class Everybody:
    """Many readers of the same stream, three of them in a browser; what they show in the end.

    With a folder to write in, both line readers are there too.
    """

    def __init__(
        self,
        port: int,
        query: str,
        readers: EventSources,
        browser: Browser,
        count: int = 30,
        folder: Path | None = None,
    ) -> None:
        url, self.readers = f"http://127.0.0.1:{port}", readers
        self.clients = [
            RunningClient(folder, client, f"{url}/ndjson?{query}")
            for client in ("client_sync", "client_async")
            if folder
        ]
        for client in self.clients:  # they take a while to start
            client.wait_for_lines(1)
        self.in_a_browser = in_a_browser.EventSources(
            browser, f"{url}/openapi.json", f"/sse?{query}", 3
        )
        self.crowd = readers.open(port, count, path=f"/sse?{query}")
        try:
            wait_for(lambda: all(self.ids()), "the first events")
        finally:  # pytest shows it if they do not come
            print(self.ids(), self.in_a_browser.states(), [source.status for source in self.crowd])

    def ids(self) -> list[list[int]]:
        """Return the event ids that each reader has had."""
        lines = [[line.partition("  ")[2] for line in client.lines()] for client in self.clients]
        return [
            *([int(event.id) for event in source.events] for source in self.crowd),
            *([json.loads(line)["event_id"] for line in each] for each in lines),
            *self.in_a_browser.ids(),
        ]

    def go_on(self) -> None:
        """Wait until each reader has had some more events."""
        before = self.ids()

        def all_have_gone_on() -> bool:
            return all(len(a) > len(b) + 2 for a, b in zip(self.ids(), before, strict=True))

        wait_for(all_have_gone_on, "more events for everybody")

    def leave(self) -> None:
        self.readers.close(self.crowd)
        self.in_a_browser.close()

    def finish(self, steps: int) -> None:
        """Wait for the end of the streams, which nobody may miss."""
        wait_for(lambda: {source.status for source in self.crowd} == {204}, "the 204 for everybody")
        wait_for(lambda: self.in_a_browser.states() == "222", "the 204 that closes an EventSource")
        assert [client.wait() for client in self.clients] == [0] * len(self.clients)
        assert {ids[-1] for ids in self.ids()} == {steps - 1}

    def check(self, fault: str, times: int) -> None:
        """Every reader has had every event once and in order. Print a row of tests/README.md.

        The rows are seen with `pytest -n 0 -s`.
        """
        everybody = self.ids()
        lost = sum(max(ids) + 1 - len({*ids}) for ids in everybody)
        doubled = sum(len(ids) - len({*ids}) for ids in everybody)
        print(f"\n| {fault} ({self.interrupted()} streams cut) | {times} | {lost} | {doubled} |")
        for ids in everybody:
            assert ids == list(range(len(ids)))

    def interrupted(self) -> int:
        """Return how many streams have ended too soon, properly or not."""
        again = sum(source.opened - 1 for source in self.crowd)
        return again + sum(self.in_a_browser.errors())


@pytest.mark.parametrize("name", PROXIES)
def test_the_file_is_accepted_without_a_warning(name: str, tmp_path: Path) -> None:
    config = deployed(name, free_port(), [8001, 8002, 8003], tmp_path)
    check = [*command(name, config), {"nginx": "-t", "haproxy": "-c"}[name]]
    done = subprocess.run(check, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert not re.search("warn", done.stdout + done.stderr, re.IGNORECASE)


def test_systemd_accepts_the_unit(tmp_path: Path) -> None:
    analyze = need("systemd-analyze", "systemd")
    need("curl", "curl")
    text = (ROOT / "deploy/streams@.service").read_text()
    file = tmp_path / "streams@8001.service"
    file.write_text(substitute(text, {"/srv/streams/.venv/bin/uvicorn": sys.executable}))
    done = subprocess.run([analyze, "verify", file], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


ENDLESS = "steps=100000&interval=0.2"


@in_one_worker
def test_servers_killed_one_after_the_other(
    deployment: Deployment, readers: EventSources, browser: Browser
) -> None:
    everybody = Everybody(deployment.port, ENDLESS, readers, browser)
    for victim in deployment.replicas:
        wait_for(partial(count_streams, victim), "a stream to cut")
        victim.kill()
        victim.start()
    everybody.go_on()
    everybody.leave()
    everybody.check("one of three servers killed with `kill -9` in mid-stream", 3)


@in_one_worker
def test_rolling_restart_under_200_readers(
    deployment: Deployment, readers: EventSources, browser: Browser
) -> None:
    everybody = Everybody(deployment.port, ENDLESS, readers, browser, 200)
    for replica in deployment.replicas:
        assert count_streams(replica) > 20
        # What `systemctl restart` does.
        replica.signal(signal.Signals[unit(replica.port)["KillSignal"]])
        assert replica.wait() == -signal.SIGTERM
        replica.start()
        subprocess.run(unit(replica.port)["ExecStartPost"].split(), check=True, timeout=LIMIT)
    everybody.go_on()
    everybody.leave()
    assert everybody.interrupted() >= 200 - 20
    assert "Traceback" not in "".join(replica.log for replica in deployment.replicas)
    everybody.check("a server restarted (SIGTERM) under 200 readers", 3)


@in_one_worker
def test_all_servers_down_at_once(
    deployment: Deployment, readers: EventSources, browser: Browser, tmp_path: Path
) -> None:
    """The proxy must not answer an `EventSource` with an error: it would give up."""
    everybody = Everybody(deployment.port, "steps=20&interval=0.2", readers, browser, 10, tmp_path)
    for replica in deployment.replicas:
        replica.kill()
    # The first error is the cut, the next one is an attempt in vain.
    wait_for(lambda: min(everybody.in_a_browser.errors()) >= 2, "an attempt of each EventSource")
    assert "2" not in everybody.in_a_browser.states()
    for replica in deployment.replicas:
        replica.start()
    everybody.finish(20)
    everybody.check("all three servers killed at once, then started", 1)


@in_one_worker
def test_a_server_that_hangs(
    deployment: Deployment, readers: EventSources, browser: Browser, tmp_path: Path
) -> None:
    everybody = Everybody(deployment.port, "steps=20&interval=0.2", readers, browser, 10, tmp_path)
    assert count_streams(deployment.replicas[0])
    # It keeps its connections and takes new ones, but does nothing.
    deployment.replicas[0].signal(signal.SIGSTOP)
    everybody.finish(20)
    deployment.replicas[0].kill()
    assert everybody.interrupted()
    everybody.check("a server hangs (`kill -STOP`)", 1)


@in_one_worker
def test_readers_that_leave_or_never_read(deployment: Deployment) -> None:
    wait_for(lambda: deployment.streams() == 0, "the readers of other tests to leave")
    with closing(begin(deployment.port, "/sse?interval=0.5")):
        assert deployment.streams() == 1
    wait_for(lambda: deployment.streams() == 0, "the server to see that it left", 8)
    with closing(RawReader(deployment.port, "/sse?steps=100000&interval=0", receive_buffer=4096)):
        wait_for(lambda: deployment.streams() == 1, "the stream")
        wait_for(lambda: deployment.streams() == 0, "the proxy to let it go")


@in_one_worker
@pytest.mark.parametrize("name", PROXIES)
def test_a_full_server_passes_its_reader_on_and_a_cut_looks_like_a_cut(
    browser: Browser, name: str, tmp_path: Path
) -> None:
    """With two connections uvicorn refuses the second one, so each has room for one stream.

    With h11, since uvicorn's httptools sends the end of a body that it cuts even to a proxy that
    speaks HTTP/1.0.
    """
    deployment = Deployment(name, tmp_path, {}, ["--limit-concurrency", "2", "--http", "h11"])
    url, long = deployment.url, "/sse?steps=100&interval=10"
    with closing(deployment):
        with ExitStack() as readers:
            # They take places that the proxy knows nothing of.
            for replica in deployment.replicas[:2]:
                readers.enter_context(closing(begin(replica.port, long)))
            for _ in range(3):
                assert read(f"{url}/ndjson?steps=1").status == 200
            readers.enter_context(closing(begin(deployment.replicas[2].port, long)))
            assert read(f"{url}/ndjson?steps=1").status == 503
            sources = in_a_browser.EventSources(
                browser, f"{url}/openapi.json", "/sse?steps=2&interval=0", 1
            )
            wait_for(lambda: min(sources.errors()) >= 2, "attempts in vain")
        wait_for(lambda: sources.ids() == [[0, 1]], "a place for the EventSource")
        sources.close()

        # Plain text has no other sign of a cut than a body without its end.
        client = RunningClient(tmp_path, "client", f"{url}/text?interval=10")
        client.wait_for_lines(1)
        for replica in deployment.replicas:
            replica.kill()
        assert client.wait() == 1
        assert "cut off in mid-stream" in client.errors[-1]


def test_ten_seconds_of_silence_and_a_redirect(server: Process, tmp_path: Path) -> None:
    """Neither cuts the stream. A redirect leads to the proxy: nobody else reaches the server."""
    with ExitStack() as stack:
        readers: list[RawReader] = []
        for name in PROXIES:
            port = free_port()
            config = deployed(name, port, [server.port] * 3, tmp_path)
            proxy = Process(command(name, config), tmp_path / f"{name}.log", port)
            stack.callback(proxy.kill)
            answer = requests.get(f"{proxy.url}/sse/", allow_redirects=False, timeout=LIMIT)
            assert answer.headers["Location"] == f"{proxy.url}/sse"
            # The server sees that a reader has left, although it has nothing to send.
            begin(port, "/sse?interval=10").close()
            left = lambda: count_streams(server) == len(readers)  # noqa: E731
            wait_for(left, "the server to see that its reader left", 9)
            readers.append(RawReader(port, "/ndjson?steps=2&interval=10"))
            assert read_until(readers, lambda: readers[-1].arrivals)
        assert read_until(readers, lambda: all(reader.ended_at for reader in readers))
    for reader in readers:
        assert reader.event_ids == [0, 1]
        assert reader.arrivals[-1] - reader.arrivals[0] > 9


@in_one_worker
def test_workers_without_a_proxy(start: Start, readers: EventSources, browser: Browser) -> None:
    """On one machine `--workers` does the same: uvicorn starts the ones anew that die."""
    # On a busy machine a worker needs more than the 5 s after which it is taken for a hung one.
    server = start(*UVICORN, "--workers", "3", "--timeout-worker-healthcheck", "20")
    server.wait_for_log("Application startup complete", 3)
    everybody = Everybody(server.port, ENDLESS, readers, browser)

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
