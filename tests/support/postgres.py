"""A PostgreSQL server with a cluster of its own, for a test to read, stop and kill."""

import atexit
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any

import psutil
import psycopg

from tests.support.processes import LIMIT, Process, free_port, need, wait_for

# Where Debian puts the server's programs: not on the PATH.
PLACES = os.pathsep.join(str(path) for path in Path("/usr/lib/postgresql").glob("*/bin"))
SETTINGS = {
    "listen_addresses": "127.0.0.1",
    "unix_socket_directories": "",
    "shared_buffers": "16MB",
    # A server that is killed loses nothing by it: only a machine that loses power does.
    "fsync": "off",
}


def has_ended(process: psutil.Process) -> bool:
    """Tell whether it has, also where nobody has asked for its exit status yet."""
    with suppress(psutil.NoSuchProcess):
        return bool(process.status() == psutil.STATUS_ZOMBIE)
    return True


class Postgres(Process):
    """`database_url` names its one database, which is empty."""

    @property
    def database_url(self) -> str:
        return f"postgresql://postgres@127.0.0.1:{self.port}/postgres"

    def wait_until_listening(self) -> None:
        """Wait until it takes connections: it listens before that, while it recovers."""
        super().wait_until_listening()

        def answers() -> bool:
            with suppress(psycopg.OperationalError), psycopg.connect(self.database_url):
                return True
            return False

        wait_for(answers, "PostgreSQL to take connections")

    def signal(self, signum: int, everyone: bool = False) -> None:
        """Send a signal to the server, or to the process of each connection as well.

        Each of those has a process group of its own.
        """
        server = psutil.Process(self.pid)
        connections = server.children(recursive=True) if everyone else []
        for process in (server, *connections):
            with suppress(psutil.NoSuchProcess):
                process.send_signal(signum)

    def kill(self) -> None:
        """Pull the plug: kill -9 for the server and the process of each connection."""
        if self.popen.poll() is None:
            # The server first, or it would take note and start what it has lost again. What is
            # left of it would keep it from being started again.
            left = psutil.Process(self.pid).children(recursive=True)
            self.popen.kill()
            self.popen.wait(LIMIT)
            for process in left:
                with suppress(psutil.NoSuchProcess):
                    process.kill()
            wait_for(lambda: all(map(has_ended, left)), "the connections' processes to end")


def new_directory() -> Path:
    """Not pytest's own, which belongs to one user only: PostgreSQL refuses to run as root."""
    directory = Path(tempfile.mkdtemp(prefix="postgres-"))
    if os.getuid() == 0:
        shutil.chown(directory, "postgres", "postgres")
    return directory


def as_its_user(directory: Path) -> dict[str, Any]:
    """Options for a process of PostgreSQL's."""
    user = {"user": "postgres", "group": "postgres", "extra_groups": []}
    return {"cwd": directory, **(user if os.getuid() == 0 else {})}


@cache
def empty_cluster() -> Path:
    """Make a cluster that each test copies: to make one needs ten times as much CPU."""
    initdb = need("initdb", "postgresql", PLACES)
    directory = new_directory()
    atexit.register(shutil.rmtree, directory)
    how = ["--no-sync", "--auth=trust", "--username=postgres", "--encoding=UTF8"]
    command = [initdb, *how, "--locale=C.UTF-8", str(directory / "cluster")]
    options = as_its_user(directory)
    subprocess.run(command, check=True, capture_output=True, timeout=LIMIT, **options)
    return directory / "cluster"


@contextmanager
def running_postgres() -> Iterator[Postgres]:
    """Run a server on a new cluster."""
    postgres = need("postgres", "postgresql", PLACES)
    cluster = empty_cluster()
    directory = new_directory()
    try:
        subprocess.run(["cp", "-a", cluster, directory], check=True, timeout=LIMIT)
        port = free_port()
        command = [postgres, "-D", str(directory / "cluster"), "-p", str(port)]
        for name, value in SETTINGS.items():
            command += ["-c", f"{name}={value}"]
        server = Postgres(command, directory / "server.log", port, **as_its_user(directory))
        try:
            yield server
        finally:
            server.kill()
    finally:
        shutil.rmtree(directory)
