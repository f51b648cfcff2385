"""The clients in an odd environment, and before odd answers: what they say is true, in one line."""

import asyncio
import os
import re
import socket
import ssl
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.clients.conftest import Main
from tests.support.processes import LIMIT, free_port, need, run_client
from tests.support.wrong_servers import (
    ALL,
    CHUNKED,
    CLIENTS,
    END,
    STREAM,
    WHOLE,
    WrongServer,
    all_clients,
    both_line_readers,
    chunk,
    error,
    events,
    load,
    read,
    wrong_server,
)

with_requests = pytest.mark.parametrize("client", CLIENTS[:2])
FROM_THE_ENVIRONMENT = {
    *("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY", "NETRC"),
    *("REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE", "SSL_CERT_FILE", "SSL_CERT_DIR"),
}


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """None of this machine's proxies and certificates; each test sets its own."""
    for name in set(os.environ):
        if name.upper() in FROM_THE_ENVIRONMENT:
            monkeypatch.delenv(name)
    return monkeypatch


def set_proxies(environment: pytest.MonkeyPatch, address: str) -> None:
    environment.setenv("http_proxy", address)
    environment.setenv("https_proxy", address)


# Certificates -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("variable", "content"), [("REQUESTS_CA_BUNDLE", None), ("CURL_CA_BUNDLE", "no certificate")]
)
@with_requests
def test_certificates_that_cannot_be_used(
    client: str,
    variable: str,
    content: str | None,
    main: Main,
    environment: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    bundle = tmp_path / "ca.pem"
    if content:
        bundle.write_text(content)
    environment.setenv(variable, str(bundle))
    with wrong_server(WHOLE) as server:
        url = server.url.replace("http:", "https:")
        printed = main(client, url)
        assert printed.status == 1
        assert re.match(
            f"Cannot (connect to|read) {url}: .*({bundle}|no certificate or crl)", printed.err[-1]
        )
        # Without TLS, nobody needs them.
        assert main(client, server.url).status == 0


def test_a_file_of_the_environment_is_told_at_once_by_its_name(
    main: Main, environment: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """aiohttp itself cannot be imported then."""
    log = str(tmp_path / "missing" / "keys")
    environment.setenv("SSLKEYLOGFILE", log)
    with wrong_server(WHOLE) as server:
        url = server.url.replace("http:", "https:")
        printed = main("client_sync", url)
    assert printed.status == 1
    assert printed.err[-1].startswith(f"Cannot read {url}: No such file or directory: {log}. ")


@pytest.fixture
def tls_server(tmp_path: Path) -> Iterator[WrongServer]:
    """A server for `localhost` whose certificate nobody trusts: `cert.pem` in `tmp_path`."""
    openssl = need("openssl", "openssl")
    command = (
        f"{openssl} req -x509 -newkey rsa:2048 -nodes -days 2 -keyout key.pem -out cert.pem "
        "-subj /CN=localhost -addext subjectAltName=DNS:localhost"
    )
    subprocess.run(command.split(), cwd=tmp_path, capture_output=True, timeout=LIMIT, check=True)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tmp_path / "cert.pem", tmp_path / "key.pem")

    class TLSServer(WrongServer):
        def serve(self, connection: socket.socket) -> None:
            try:
                super().serve(context.wrap_socket(connection, server_side=True))
            except OSError:  # the client does not trust us
                connection.close()

    server = TLSServer(lambda connection: connection.send(WHOLE))
    server.url = server.url.replace("http://127.0.0.1", "https://localhost")
    with server.listener:
        threading.Thread(target=server.listen, daemon=True).start()
        yield server
        server.listener.shutdown(socket.SHUT_RDWR)


@all_clients
def test_a_certificate_that_is_not_trusted(
    client: str, tls_server: WrongServer, tmp_path: Path
) -> None:
    """In a process of its own: aiohttp reads the certificates when it is imported."""
    bundle = str(tmp_path / "cert.pem")
    trusting = {**os.environ, "REQUESTS_CA_BUNDLE": bundle, "SSL_CERT_FILE": bundle}
    trusted = run_client(f"{client}.py", tls_server.url, env=trusting)
    assert trusted.returncode == 0, trusted.stderr
    other_name = tls_server.url.replace("localhost", "127.0.0.1")  # than the certificate's
    for url, env in ((tls_server.url, {**os.environ}), (other_name, trusting)):
        refused = run_client(f"{client}.py", url, env=env)
        assert refused.returncode == 1
        (sentence,) = refused.stderr.splitlines()
        assert "certificate verify failed" in sentence


# Proxies ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", ["http", "https"])
@all_clients
def test_a_dead_proxy_is_not_mistaken_for_the_server(
    client: str, scheme: str, main: Main, environment: pytest.MonkeyPatch
) -> None:
    set_proxies(environment, f"http://127.0.0.1:{free_port()}")
    with wrong_server(WHOLE) as server:
        printed = main(client, server.url.replace("http:", f"{scheme}:"))
        assert printed.status == 1
        assert re.match(r"Cannot (connect to|read) .*: the proxy failed \(", printed.err[-1])
        assert not server.connections
        environment.setenv("no_proxy", "127.0.0.1")  # goes around it
        assert main(client, server.url).status == 0


@pytest.mark.parametrize("proxy", ["socks5h://127.0.0.1:1", "http://no-such-host.invalid:1"])
@all_clients
def test_it_is_the_proxy_that_cannot_be_reached(
    client: str, proxy: str, main: Main, environment: pytest.MonkeyPatch
) -> None:
    set_proxies(environment, proxy)
    with wrong_server(WHOLE) as server:
        printed = main(client, server.url)
        assert not server.connections
    assert printed.status == 1
    assert re.match(
        r"Cannot (connect to|read) .*: (the proxy failed|a redirect or a proxy)", printed.err[-1]
    )


@pytest.mark.parametrize("proxy", ["http://", "http://[::1", "http://127.0.0.1:99999", "://", " "])
@all_clients
def test_a_proxy_that_is_no_address(
    client: str, proxy: str, main: Main, environment: pytest.MonkeyPatch
) -> None:
    set_proxies(environment, proxy)
    with wrong_server(WHOLE) as server:
        printed = main(client, server.url)
    # Where a library ignores such a proxy, the stream is read.
    assert printed.status == 0 or re.match(r"Cannot (connect to|read) ", printed.err[-1])
    assert "nobody listens" not in printed.err[-1]


@pytest.mark.parametrize("status", ["407 Proxy Authentication Required", "502 Bad Gateway"])
@all_clients
def test_a_proxy_that_refuses_to_connect(
    client: str, status: str, main: Main, environment: pytest.MonkeyPatch
) -> None:
    url = "https://example.invalid/"
    with wrong_server(error(status)) as proxy:
        set_proxies(environment, proxy.url.removesuffix("/ndjson"))
        printed = main(client, url)
    assert printed.status == 1
    assert re.match(rf"Cannot (connect to|read) {url}: the proxy failed \(", printed.err[-1])
    assert status.split(" ", 1)[1] in printed.err[-1]


@all_clients
def test_a_proxy_that_works(client: str, main: Main, environment: pytest.MonkeyPatch) -> None:
    with wrong_server(WHOLE) as proxy:
        set_proxies(environment, proxy.url.removesuffix("/ndjson"))
        assert main(client, "http://example.invalid/").status == 0
        assert [connection.path for connection in proxy.connections] == ["http://example.invalid/"]


@all_clients
def test_a_netrc_that_cannot_be_used(
    client: str, main: Main, environment: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    file = tmp_path / "netrc"
    environment.setenv("NETRC", str(file))
    with wrong_server(WHOLE) as server:
        assert main(client, server.url).status == 0
        file.write_text("machine\nwhat is this")
        assert main(client, server.url).status == 0


# Odd answers --------------------------------------------------------------------------------------


EARLY_HINTS = b"HTTP/1.1 103 Early Hints\r\nLink: </a>; rel=preload\r\n\r\n"


@pytest.mark.parametrize("interim", [b"HTTP/1.1 100 Continue\r\n\r\n", EARLY_HINTS * 2])
@all_clients
def test_an_interim_answer_comes_first(client: str, interim: bytes, main: Main) -> None:
    with wrong_server(interim + WHOLE) as server:
        printed = main(client, server.url)
        assert len(server.connections) == 1
    if "103" not in str(interim) or client == "client_async":
        assert printed.status == 0
    else:  # http.client takes it for the answer, and there is no way to read on
        assert printed.status == 1
        assert "answered 103 Early Hints" in printed.err[-1]
        assert "interim" in printed.err[-1]


@both_line_readers
def test_headers_of_60_kilobytes(client: str) -> None:
    head = STREAM + b"X: " + b"y" * 60_000 + b"\r\nTransfer-Encoding: chunked\r\n\r\n"
    with wrong_server(head + chunk(events(0, 10)) + END) as server:
        assert read(load(client), server.url) == (ALL, None)


LINES: dict[str, tuple[Any, bool]] = {
    "CRLF": (lambda body: body.replace(b"\n", b"\r\n"), True),
    "empty lines": (lambda body: body.replace(b"\n", b"\n\n \n"), True),
    "no last newline": (lambda body: body[:-1], True),
    "a byte order mark": (lambda body: b"\xef\xbb\xbf" + body, True),
    "UTF-16": (lambda body: body.decode().encode("utf-16"), False),
}


@pytest.mark.parametrize("case", LINES)
@both_line_readers
def test_odd_lines(client: str, case: str) -> None:
    change, readable = LINES[case]
    with wrong_server(CHUNKED + chunk(change(events(0, 10))) + END) as server:
        ids, sentence = read(load(client), server.url)
        assert len(server.connections) == 1
    if readable:
        assert (ids, sentence) == (ALL, None)
    else:
        assert sentence
        assert "sent a line that is not an event: b'" in sentence


@both_line_readers
def test_an_error_of_the_program_goes_through(client: str) -> None:
    """Only what the network does becomes a StreamError."""
    module = load(client)

    def read_sync(url: str) -> None:
        for _ in module.read_events(url):
            raise ConnectionResetError("of the program's own")

    async def read_async(url: str) -> None:
        async for _ in module.read_events(url):
            raise ConnectionResetError("of the program's own")

    with wrong_server(WHOLE) as server, pytest.raises(ConnectionResetError, match="program's own"):
        read_sync(server.url) if client == "client_sync" else asyncio.run(read_async(server.url))
