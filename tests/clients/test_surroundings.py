"""The clients in an odd environment, and before odd answers: what they say is true, in one line.

Proxies and certificates come from the environment, so these clients run in processes of their own.
"""

import asyncio
import os
import re
import socket
import ssl
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.processes import LIMIT, free_port, need, run_client, wait_for
from tests.support.wrong_servers import (
    ALL,
    CHUNKED,
    CLIENTS,
    END,
    STREAM,
    WHOLE,
    Connection,
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


def run(client: str, url: str, **variables: str) -> tuple[int, str]:
    """Run a client with these variables, and none of the kind besides; return its last line."""
    kept = {k: v for k, v in os.environ.items() if k.upper() not in FROM_THE_ENVIRONMENT}
    done = run_client(f"{client}.py", url, env={**kept, **variables})
    assert "Traceback" not in done.stderr
    assert "standard output" not in done.stderr
    return done.returncode, done.stderr.splitlines()[-1]


def proxies(address: str) -> dict[str, str]:
    return {"http_proxy": address, "https_proxy": address}


# Certificates -------------------------------------------------------------------------------------


@pytest.mark.parametrize("variable", ["REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE"])
@pytest.mark.parametrize("what", ["missing", "garbage"])
@with_requests
def test_certificates_that_cannot_be_used(
    client: str, what: str, variable: str, tmp_path: Path
) -> None:
    bundle = tmp_path / "ca.pem"
    if what == "garbage":
        bundle.write_text("no certificate")
    with wrong_server(WHOLE) as server:
        url = server.url.replace("http:", "https:")
        status, sentence = run(client, url, **{variable: str(bundle)})
        assert status == 1
        assert re.match(
            f"Cannot (connect to|read) {url}: .*({bundle}|no certificate or crl)", sentence
        )
        # Without TLS, nobody needs them.
        status, _ = run(client, server.url, **{variable: str(bundle)})
        assert status == 0


def test_a_file_of_the_environment_is_told_at_once_by_its_name(tmp_path: Path) -> None:
    """aiohttp itself cannot be imported then."""
    log = str(tmp_path / "missing" / "keys")
    with wrong_server(WHOLE) as server:
        url = server.url.replace("http:", "https:")
        status, sentence = run("client_sync", url, SSLKEYLOGFILE=log)
    assert status == 1
    assert sentence.startswith(f"Cannot read {url}: No such file or directory: {log}. ")


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
    status, sentence = run(client, tls_server.url)
    assert status == 1
    assert "certificate verify failed" in sentence
    bundle = str(tmp_path / "cert.pem")
    status, _ = run(client, tls_server.url, REQUESTS_CA_BUNDLE=bundle, SSL_CERT_FILE=bundle)
    assert status == 0
    # For another name than the certificate's it is not trusted either.
    url = tls_server.url.replace("localhost", "127.0.0.1")
    status, sentence = run(client, url, REQUESTS_CA_BUNDLE=bundle, SSL_CERT_FILE=bundle)
    assert status == 1
    assert "certificate verify failed" in sentence


# Proxies ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", ["http", "https"])
@all_clients
def test_a_dead_proxy_is_not_mistaken_for_the_server(client: str, scheme: str) -> None:
    with wrong_server(WHOLE) as server:
        proxy = f"http://127.0.0.1:{free_port()}"
        url = server.url.replace("http:", f"{scheme}:")
        status, sentence = run(client, url, **proxies(proxy))
        assert status == 1
        assert re.match(r"Cannot (connect to|read) .*: the proxy failed \(", sentence)
        assert not server.connections
        # NO_PROXY goes around it.
        status, _ = run(client, server.url, **proxies(proxy), no_proxy="127.0.0.1")
        assert status == 0


@pytest.mark.parametrize("proxy", ["socks5h://127.0.0.1:1", "http://no-such-host.invalid:1"])
@all_clients
def test_it_is_the_proxy_that_cannot_be_reached(client: str, proxy: str) -> None:
    with wrong_server(WHOLE) as server:
        status, sentence = run(client, server.url, **proxies(proxy))
        assert not server.connections
    assert status == 1
    assert re.match(
        r"Cannot (connect to|read) .*: (the proxy failed|a redirect or a proxy)", sentence
    )


@pytest.mark.parametrize("proxy", ["http://", "http://[::1", "http://127.0.0.1:99999", "://", " "])
@all_clients
def test_a_proxy_that_is_no_address(client: str, proxy: str) -> None:
    with wrong_server(WHOLE) as server:
        status, sentence = run(client, server.url, **proxies(proxy))
    # Where a library ignores such a proxy, the stream is read.
    assert status == 0 or re.match(r"Cannot (connect to|read) ", sentence)
    assert "nobody listens" not in sentence


@pytest.mark.parametrize("status", ["407 Proxy Authentication Required", "502 Bad Gateway"])
@all_clients
def test_a_proxy_that_refuses_to_connect(client: str, status: str) -> None:
    with wrong_server(error(status)) as proxy:
        url = "https://example.invalid/"
        exit_status, sentence = run(client, url, **proxies(proxy.url.removesuffix("/ndjson")))
    assert exit_status == 1
    assert re.match(rf"Cannot (connect to|read) {url}: the proxy failed \(", sentence)
    assert status.split(" ", 1)[1] in sentence


@all_clients
def test_a_proxy_that_works(client: str) -> None:
    with wrong_server(WHOLE) as proxy:
        status, _ = run(
            client, "http://example.invalid/", **proxies(proxy.url.removesuffix("/ndjson"))
        )
        assert [connection.path for connection in proxy.connections] == ["http://example.invalid/"]
    assert status == 0


@pytest.mark.parametrize("netrc", ["missing", "machine\nwhat is this"])
@all_clients
def test_a_netrc_that_cannot_be_used(client: str, netrc: str, tmp_path: Path) -> None:
    file = tmp_path / "netrc"
    if netrc != "missing":
        file.write_text(netrc)
    with wrong_server(WHOLE) as server:
        status, _ = run(client, server.url, NETRC=str(file))
    assert status == 0


# Odd answers --------------------------------------------------------------------------------------


EARLY_HINTS = b"HTTP/1.1 103 Early Hints\r\nLink: </a>; rel=preload\r\n\r\n"


@pytest.mark.parametrize("interim", [b"HTTP/1.1 100 Continue\r\n\r\n", EARLY_HINTS * 2])
@all_clients
def test_an_interim_answer_comes_first(client: str, interim: bytes) -> None:
    with wrong_server(interim + WHOLE) as server:
        status, sentence = run(client, server.url)
        assert len(server.connections) == 1
    if "103" not in str(interim) or client == "client_async":
        assert status == 0
    else:  # http.client takes it for the answer, and there is no way to read on
        assert status == 1
        assert "answered 103 Early Hints" in sentence
        assert "interim" in sentence


@both_line_readers
def test_an_interim_answer_and_then_silence(client: str) -> None:
    def answer(connection: Connection) -> None:
        connection.send(b"HTTP/1.1 100 Continue\r\n\r\n")
        connection.wait_until_closed()

    module = load(client, CONNECT_TIMEOUT=0.5, STALL_TIMEOUT=0.5, GIVE_UP_AFTER=0.5)
    with wrong_server(answer) as server:
        begun = time.monotonic()
        ids, sentence = read(module, server.url)
        assert ids == []
        assert sentence
        assert "most recently because it timed out" in sentence
        assert time.monotonic() - begun < LIMIT
        wait_for(lambda: server.connections[0].closed, "the connection to be closed")


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
def test_an_address_that_is_no_text_is_told_at_once(client: str) -> None:
    address: Any = None
    ids, sentence = read(load(client, FIRST_DELAY=LIMIT), address)
    assert ids == []
    assert sentence
    assert sentence.startswith("Cannot read None: ")


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
