"""Twelve `EventSource`s, through deploy/'s nginx: six run over HTTP/1.1, all over HTTP/2."""

import signal
import subprocess
from pathlib import Path

import requests

from tests.proxies.event_sources import EventSources
from tests.support.browsers import Browser
from tests.support.processes import LIMIT, ROOT, UVICORN, Process, Start, free_port, need, wait_for
from tests.support.proxies import command, deployed, substitute

COUNT = 12
LIVE = (
    "/sse?steps=100000&interval=2"  # a proxy that fills a buffer of 4 KB first takes over a minute
)


def start_nginx(start: Start, server: Process, tmp: Path) -> tuple[str, str]:
    """Start deploy/nginx.conf with deploy/http2.conf and the certificate that it asks for.

    Return its addresses, the second one over HTTP/2.
    """
    http2 = (ROOT / "deploy/http2.conf").read_text()
    port, plain = free_port(), free_port()
    (tmp / "http2.conf").write_text(substitute(http2, {"listen 8443": f"listen 127.0.0.1:{port}"}))
    make_certificate = "".join(
        line.removeprefix("#") for line in http2.splitlines(True) if line.startswith("#     ")
    )
    need("openssl", "openssl")
    subprocess.run(make_certificate, shell=True, check=True, cwd=tmp, timeout=LIMIT)
    config = deployed("nginx", plain, [server.port] * 3, tmp)
    return start(*command("nginx", config), port=plain).url, f"https://127.0.0.1:{port}"


def protocol(browser: Browser) -> str:
    """Return the protocol by which the page came."""
    return str(browser.run("return performance.getEntriesByType('navigation')[0].nextHopProtocol"))


def test_six_run_over_http_1_and_all_over_http_2_and_all_are_resumed(
    browser: Browser, server: Process, start: Start, tmp_path: Path
) -> None:
    http1, http2 = start_nginx(start, server, tmp_path)
    sources = EventSources(browser, http1, LIVE, COUNT)
    assert protocol(browser) == "http/1.1"
    wait_for(lambda: sum(len(got) >= 2 for got in sources.ids()) == 6, "six live streams")
    assert sorted(sources.states()) == ["0"] * 6 + ["1"] * 6
    assert sources.ids().count([]) == 6
    browser.run("readers.find(({ source }) => source.readyState === 1).source.close()")
    wait_for(lambda: sources.ids().count([]) == 5, "the seventh")

    # A redirect leads to https.
    certificate = str(tmp_path / "http2.crt")
    answer = requests.get(f"{http2}/sse/", allow_redirects=False, verify=certificate, timeout=LIMIT)
    assert answer.headers["Location"] == f"{http2}/sse"

    sources = EventSources(browser, http2, LIVE, COUNT)
    assert protocol(browser) == "h2"
    wait_for(lambda: all(len(got) >= 2 for got in sources.ids()), "twelve live streams")
    assert sources.errors() == [0] * COUNT
    server.signal(signal.SIGTERM)
    assert server.wait() == -signal.SIGTERM
    # The first error is the end of the stream, the second one an attempt while nobody listens.
    wait_for(lambda: min(sources.errors()) >= 2, "an attempt of each")
    before = [len(got) for got in sources.ids()]
    server.start()
    wait_for(
        lambda: all(len(got) >= n + 2 for got, n in zip(sources.ids(), before, strict=True)),
        "twelve streams that have gone on",
    )
    for got in sources.ids():
        assert got == list(range(len(got)))
    sources.close()  # or their attempts in vain would be on the console of the next test


def test_over_http_2_one_without_an_answer_leaves_the_others_alone(
    browser: Browser, start: Start, tmp_path: Path
) -> None:
    """When the server is full nginx closes a stream without an answer, not their connection."""
    server = start(*UVICORN, "--limit-concurrency", "5")  # four streams: it counts who asks, too
    _, http2 = start_nginx(start, server, tmp_path)
    sources = EventSources(browser, http2, LIVE, COUNT)
    server.wait_for_log('"GET /sse.* 503', 3 * COUNT)

    def four() -> list[tuple[int, int]] | None:
        running = [(i, len(got)) for i, got in enumerate(sources.ids()) if got]
        assert len(running) <= 4
        return running if len(running) == 4 else None

    # The connection by which the page came counts too, until uvicorn closes it.
    running: list[tuple[int, int]] = wait_for(four, "four streams")
    lost = sources.errors()
    wait_for(lambda: all(len(sources.ids()[i]) > n for i, n in running), "them to go on")
    assert [sources.errors()[i] for i, _ in running] == [lost[i] for i, _ in running]
    sources.close()
