"""The clients in an odd environment: what they say is true, in one line."""

import os
import re
import socket
import ssl
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.clients.conftest import Main
from tests.support.processes import LIMIT, need, run_client
from tests.support.wrong_servers import WHOLE, WrongServer, all_clients, error, go_on, wrong_server

FROM_THE_ENVIRONMENT = {
    *("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY"),
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
    ("client", "variable", "content"),
    [
        ("client", "REQUESTS_CA_BUNDLE", None),
        ("client", "CURL_CA_BUNDLE", "no certificate"),
        ("client_sync", "REQUESTS_CA_BUNDLE", None),
        ("client_sync", "CURL_CA_BUNDLE", "no certificate"),
        ("client_sync", "SSLKEYLOGFILE", None),  # aiohttp cannot be imported with one
    ],
)
def test_a_file_of_the_environment_that_cannot_be_used_is_told_at_once(
    client: str,
    variable: str,
    content: str | None,
    main: Main,
    environment: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    file = tmp_path / "folder" / "file"
    if content:
        file.parent.mkdir()
        file.write_text(content)
    environment.setenv(variable, str(file))
    with wrong_server(WHOLE) as server:
        url = server.url.replace("http:", "https:")
        printed = main(client, url)
        (sentence,) = printed.err
        assert printed.status == 1
        assert re.match(
            f"Cannot (connect to|read) {url}: .*({file}|no certificate or crl)", sentence
        )
        # Without TLS, nobody needs them.
        assert main(client, server.url).status == 0


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

    with TLSServer(go_on) as server:
        server.url = server.url.replace("http://127.0.0.1", "https://localhost")
        yield server


@all_clients
def test_a_certificate_that_is_not_trusted(
    client: str, tls_server: WrongServer, main: Main, tmp_path: Path
) -> None:
    refused = main(client, tls_server.url)
    assert (refused.status, len(refused.err)) == (1, 1)
    assert "certificate verify failed" in refused.err[0]
    # In a process of its own: aiohttp reads the certificates when it is imported.
    bundle = str(tmp_path / "cert.pem")
    trusting = {**os.environ, "REQUESTS_CA_BUNDLE": bundle, "SSL_CERT_FILE": bundle}
    trusted = run_client(f"{client}.py", tls_server.url, env=trusting)
    assert trusted.returncode == 0, trusted.stderr


# Proxies ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("proxy", "scheme"),
    [
        ("http://127.0.0.1:1", "http"),
        ("http://127.0.0.1:1", "https"),
        ("socks5h://127.0.0.1:1", "http"),
        ("http://no-such-host.invalid:1", "http"),
    ],
)
@all_clients
def test_a_dead_proxy_is_not_mistaken_for_the_server(
    client: str, proxy: str, scheme: str, main: Main, environment: pytest.MonkeyPatch
) -> None:
    set_proxies(environment, proxy)
    with wrong_server(WHOLE) as server:
        printed = main(client, server.url.replace("http:", f"{scheme}:"))
        assert printed.status == 1
        failed = "(the proxy failed|a redirect or a proxy)"
        assert re.match(rf"Cannot (connect to|read) .*: {failed}", printed.err[-1])
        assert not server.connections
        environment.setenv("no_proxy", "127.0.0.1")  # goes around it
        assert main(client, server.url).status == 0


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
