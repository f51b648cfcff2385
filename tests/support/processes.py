"""What all tests use: a real server in a process of its own, and clients run as people do."""

import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NoReturn

import pytest

ROOT = Path(__file__).parents[2]
LIMIT = 60.0  # seconds that anything may take before a test calls it stuck
# With it, output would be live even where a program forgets to flush.
ENVIRONMENT = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}

# For `--log-config`: main.py's generator tells at DEBUG when it is closed.
LOG_CONFIG = {
    "version": 1,
    "disable_existing_loggers": False,
    "formatters": {"plain": {"format": "%(levelname)s %(message)s"}},
    "handlers": {"stderr": {"class": "logging.StreamHandler", "formatter": "plain"}},
    "loggers": {
        name: {"handlers": ["stderr"], "level": level}
        for name, level in {"uvicorn": "INFO", "main": "DEBUG", "tests": "DEBUG"}.items()
    },
}


def wait_for(condition: Callable[[], Any], what: str, limit: float = LIMIT) -> Any:
    """Return the first true value of `condition()`; fail if none comes within `limit` seconds."""
    end = time.monotonic() + limit
    pause = 0.01
    while not (value := condition()):
        if time.monotonic() > end:
            pytest.fail(f"waited {limit:.0f} s in vain for {what}")
        time.sleep(pause)
        pause = min(1.2 * pause, 0.1)  # to ask a browser costs more than to wait
    return value


def need(program: str, package: str, places: str = "/usr/sbin:/sbin") -> str:
    """Return the path of a program; without it skip the test, or with CI=true fail it."""
    path = shutil.which(program) or shutil.which(program, path=places)
    if not path:
        miss(program, package)
    return path


def miss(program: str, package: str) -> NoReturn:
    """Skip the test, or with CI=true fail it, because a program is not installed."""
    message = f"{program} is not installed: apt-get install {package}"
    if os.environ.get("CI") == "true":
        pytest.fail(message)
    pytest.skip(message)


def free_port() -> int:
    """Return a port of 127.0.0.1 that nobody listens on.

    Below those that the kernel hands out (32768 and up), or another test might get it first.
    """
    while True:
        port = random.randrange(10_000, 32_000)
        with suppress(OSError), socket.create_server(("127.0.0.1", port)):
            return port


class Process:
    """A server in a process (and process group) of its own, and what it has printed so far."""

    def __init__(self, command: list[str], log: Path, port: int, **options: Any) -> None:
        self.command = command
        self.log_file = log
        self.port = port
        self.url = f"http://127.0.0.1:{port}"
        self.options = options
        self.start()

    def start(self) -> None:
        """Start it, for the first time or again, and wait until it listens."""
        with self.log_file.open("ab") as log:
            self.popen = subprocess.Popen(
                self.command,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                **{"cwd": ROOT, "env": ENVIRONMENT, **self.options},
            )
        self.wait_until_listening()

    def wait_until_listening(self) -> None:
        def listening() -> bool:
            if self.popen.poll() is not None:
                pytest.fail(f"{self.command} ended at once:\n{self.log}")
            with socket.socket() as probe:
                return probe.connect_ex(("127.0.0.1", self.port)) == 0

        wait_for(listening, f"{self.command} to listen")

    @property
    def pid(self) -> int:
        return self.popen.pid

    @property
    def log(self) -> str:
        return self.log_file.read_text()

    def wait_for_log(self, pattern: str, count: int = 1) -> list[str]:
        """Return the matches of `pattern` in the log, once there are `count` of them."""

        def matches() -> list[str] | None:
            found = re.findall(pattern, self.log)
            return found if len(found) >= count else None

        return list(wait_for(matches, f"{count} × {pattern!r} in the log"))

    def signal(self, signum: int, everyone: bool = False) -> None:
        """Send a signal to the process, or to its whole group, as Ctrl-C in a terminal does."""
        (os.killpg if everyone else os.kill)(self.pid, signum)

    def wait(self) -> int:
        """Wait until the process has ended; return its exit status (-n: killed by signal n)."""
        return self.popen.wait(LIMIT)

    def kill(self) -> None:
        """Pull the plug: kill -9 for the process and all that it has started."""
        try:
            os.killpg(self.pid, signal.SIGKILL)
        except ProcessLookupError:
            return
        self.popen.wait(LIMIT)


Start = Callable[..., Process]


@contextmanager
def starting(directory: Path) -> Iterator[Start]:
    """Run servers until the end of the block, with their logs in this directory.

    `start(*command)` starts one, with `{port}` in it replaced by a free port.
    """
    processes: list[Process] = []

    def start(*command: str, port: int | None = None, **options: Any) -> Process:
        port = port or free_port()
        words = [word.replace("{port}", str(port)) for word in command]
        log = directory / f"server-{len(processes)}.log"
        processes.append(Process(words, log, port, **options))
        return processes[-1]

    try:
        yield start
    finally:
        for process in processes:
            process.kill()


UVICORN = (sys.executable, "-m", "uvicorn", "main:app", "--port", "{port}")


def start_app(start: Start, app: str, *options: str, **environment: str) -> Process:
    """Start `uvicorn app` with this in its environment; wait until it listens."""
    command = (sys.executable, "-m", "uvicorn", app, "--port", "{port}", *options)
    return start(*command, env=ENVIRONMENT | environment)


def run_python(code: str) -> subprocess.CompletedProcess[str]:
    """Run a program from the project's root to its end."""
    command = [sys.executable, "-c", code]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=LIMIT * 2)


def run_client(script: str, *arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run a client to its end; return its exit status, standard output and standard error."""
    return subprocess.run(
        [sys.executable, ROOT / script, *arguments],
        capture_output=True,
        text=True,
        timeout=LIMIT * 2,
        **{"env": ENVIRONMENT, **options},
    )


class RunningClient:
    """A client in a process of its own, and what it has printed so far."""

    def __init__(self, folder: Path, client: str, *arguments: str) -> None:
        self.out, self.err = folder / f"{client}.out", folder / f"{client}.err"
        with self.out.open("wb") as out, self.err.open("wb") as err:
            command = [sys.executable, str(ROOT / f"{client}.py"), *arguments]
            self.popen = subprocess.Popen(command, stdout=out, stderr=err, env=ENVIRONMENT)

    def lines(self) -> list[str]:
        return self.out.read_text().splitlines()

    def wait_for_lines(self, count: int) -> list[str]:
        wait_for(lambda: len(self.lines()) >= count, f"{count} lines from {self.popen.args!r}")
        return self.lines()

    def wait(self) -> int:
        return self.popen.wait(LIMIT)

    @property
    def errors(self) -> list[str]:
        return self.err.read_text().splitlines()
