"""Proxies in front of the server, started by the tests: on loopback, in the foreground.

The stock ones proxy as they come from Debian, with compression on for the three media types and
nothing tuned for streams; the deployed ones run the files in deploy/. What the tests change (ports,
paths, who it runs as) has nothing to do with how they proxy.
"""

import getpass
import grp
import os
import sys
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from time import monotonic

import requests
from starlette.types import ASGIApp, Message, Receive, Scope, Send

import main
from tests.support.processes import LIMIT, ROOT, Process, free_port, need

USER = getpass.getuser()
GROUP = grp.getgrgid(os.getgid()).gr_name

NGINX_PATHS = """
    access_log off;
    client_body_temp_path {tmp}/body;
    proxy_temp_path {tmp}/proxy;
    fastcgi_temp_path {tmp}/fastcgi;
    uwsgi_temp_path {tmp}/uwsgi;
    scgi_temp_path {tmp}/scgi;
"""

NGINX = """
user {user};
pid {tmp}/nginx.pid;
events { }
http {
    {paths}
    gzip on;
    gzip_types text/plain application/x-ndjson text/event-stream;
    server {
        listen 127.0.0.1:{port};
        location / {
            proxy_pass http://127.0.0.1:{backend};
        }
    }
}
""".replace("{paths}", NGINX_PATHS)

# The time limits are those of Debian's haproxy.cfg.
HAPROXY = """
defaults
    mode http
    timeout connect 5000
    timeout client 50000
    timeout server 50000
    compression algo gzip
    compression type text/plain application/x-ndjson text/event-stream
frontend http
    bind 127.0.0.1:{port}
    default_backend streams
backend streams
    server one 127.0.0.1:{backend}
"""

APACHE = """
ServerRoot {tmp}
ServerName 127.0.0.1
PidFile {tmp}/apache.pid
DefaultRuntimeDir {tmp}
ErrorLog /dev/stderr
User www-data
Group www-data
Listen 127.0.0.1:{port}
LoadModule mpm_event_module /usr/lib/apache2/modules/mod_mpm_event.so
LoadModule authz_core_module /usr/lib/apache2/modules/mod_authz_core.so
LoadModule filter_module /usr/lib/apache2/modules/mod_filter.so
LoadModule deflate_module /usr/lib/apache2/modules/mod_deflate.so
LoadModule proxy_module /usr/lib/apache2/modules/mod_proxy.so
LoadModule proxy_http_module /usr/lib/apache2/modules/mod_proxy_http.so
AddOutputFilterByType DEFLATE text/plain application/x-ndjson text/event-stream
ProxyPass / http://127.0.0.1:{backend}/
"""

STOCK = {"nginx": NGINX, "haproxy": HAPROXY, "varnish": "", "apache": APACHE}


def command(name: str, config: Path) -> list[str]:
    """Return what starts a proxy with this configuration in the foreground."""
    if name == "nginx":
        nginx = need("nginx", "nginx")
        return [nginx, "-e", "stderr", "-c", str(config), "-g", "daemon off;"]
    if name == "haproxy":
        return [need("haproxy", "haproxy"), "-db", "-f", str(config)]
    return [need("apache2", "apache2"), "-DFOREGROUND", "-f", str(config)]


def start_stock(name: str, backend: int, tmp: Path, extra: str = "") -> Process:
    """Start a stock proxy, in front of the server on port `backend`.

    `extra` is a line for HAProxy's `defaults`.
    """
    port = free_port()
    if name == "varnish":
        # Its built-in rules, no -f. "-j none": as ourselves, since nobody else may read tmp.
        words = [need("varnishd", "varnish"), "-F", "-j", "none", "-n", str(tmp / "varnish")]
        words += ["-a", f"127.0.0.1:{port}", "-b", f"127.0.0.1:{backend}"]
    else:
        config = tmp / f"{name}.conf"
        text = STOCK[name].replace("defaults", f"defaults\n    {extra}")
        values = {"user": USER, "tmp": tmp, "port": port, "backend": backend}
        for key, value in values.items():
            text = text.replace(f"{{{key}}}", str(value))
        config.write_text(text)
        words = command(name, config)
    return Process(words, tmp / f"{name}.log", port)


def substitute(text: str, replacements: dict[str, str]) -> str:
    """Replace texts that must be there, or the test would not run what it says it runs."""
    for old, new in replacements.items():
        assert old in text, f"{old!r} is not there"
        text = text.replace(old, new)
    return text


def deployed(
    name: str, port: int, ports: list[int], tmp: Path, changes: dict[str, str] | None = None
) -> Path:
    """Write deploy/'s configuration with these ports, and paths below `tmp`; return where it is."""
    servers = {f"127.0.0.1:{8001 + i}": f"127.0.0.1:{p}" for i, p in enumerate(ports)}
    if name == "nginx":
        source = ROOT / "deploy/nginx.conf"
        own = {
            "listen 8000;": f"listen 127.0.0.1:{port};",
            "user www-data;": f"user {USER};",
            "/run/nginx.pid": f"{tmp}/nginx.pid",
            "http {\n": "http {" + NGINX_PATHS.replace("{tmp}", str(tmp)),
        }
    else:
        source = ROOT / "deploy/haproxy.cfg"
        own = {
            "bind :8000": f"bind 127.0.0.1:{port}",
            "user haproxy": f"user {USER}",
            "group haproxy": f"group {GROUP}",
            "log /dev/log local0": "log stdout format raw local0",
        }
    config = tmp / source.name
    config.write_text(substitute(source.read_text(), own | servers | (changes or {})))
    return config


def unit(port: int) -> dict[str, str]:
    """Return the settings of deploy/streams@.service for one port, with our paths."""
    text = substitute(
        (ROOT / "deploy/streams@.service").read_text(),
        {
            "/srv/streams/.venv/bin/uvicorn": f"{sys.executable} -m uvicorn",
            "/srv/streams": str(ROOT),
            "%i": str(port),
        },
    )
    lines = (line for line in text.splitlines() if "=" in line and not line.startswith("#"))
    return dict(line.split("=", 1) for line in lines)


def without(header: bytes) -> ASGIApp:
    """The server, but its answers lack one header."""

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        async def send_without(message: Message) -> None:
            if message["type"] == "http.response.start":
                kept = [(k, v) for k, v in message["headers"] if k.lower() != header]
                message = {**message, "headers": kept}
            await send(message)

        await main.app(scope, receive, send_without)

    return app


# For `uvicorn proxies:…`
without_cache_control = without(b"cache-control")
without_x_accel_buffering = without(b"x-accel-buffering")


@dataclass
class Reading:
    """What a reader got, and when: seconds after it sent the request."""

    status: int
    encoding: str | None
    body: bytes = b""
    events: list[float] = field(default_factory=list)

    def is_live(self, interval: float) -> bool:
        """Tell whether each event came when it was due, and before the next one was."""
        return all(
            k * interval <= arrived < (k + 1) * interval for k, arrived in enumerate(self.events)
        )


def pieces(response: requests.Response) -> Iterator[bytes]:
    """Yield what has arrived, as it arrives, decompressed."""
    decompressor = zlib.decompressobj(wbits=31)
    while piece := response.raw.read1(65536):
        if response.headers.get("Content-Encoding") == "gzip":
            piece = decompressor.decompress(piece)
        yield piece


def read(url: str, gzip: bool = False, last_event_id: int | None = None) -> Reading:
    """Read a stream to its end. Each event has the word "Step" once."""
    headers = {"Accept-Encoding": "gzip" if gzip else "identity"}
    if last_event_id is not None:
        headers["Last-Event-ID"] = str(last_event_id)
    start = monotonic()
    with requests.get(url, headers=headers, stream=True, timeout=LIMIT) as response:
        reading = Reading(response.status_code, response.headers.get("Content-Encoding"))
        for piece in pieces(response):
            reading.body += piece
            new = reading.body.count(b"Step") - len(reading.events)
            reading.events += [monotonic() - start] * new
    return reading
