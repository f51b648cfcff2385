"""Stopping a server that has streams open, of every kind in tests/support/endings.py."""

import re
import signal
from collections.abc import Callable, Iterable
from pathlib import Path

from tests.support.processes import Process
from tests.support.raw_reader import RawReader, read_until

KINDS = ("/streaming", "/sync_streaming", "/event_source", "/sse_starlette")


def terminate(server: Process) -> None:
    """Send SIGTERM to the process that was started, as systemd and Docker do."""
    server.signal(signal.SIGTERM)


def press_ctrl_c(server: Process) -> None:
    """Send SIGINT to everyone in the foreground, once."""
    server.signal(signal.SIGINT, everyone=True)


def save_a_file(server: Process) -> None:
    """Do what an editor does, in the folder that `--reload` watches."""
    Path(server.options["cwd"], "saved.py").touch()


def assert_no_error(server: Process) -> None:
    assert not re.search("Traceback|ERROR|CRITICAL|Exception", server.log), server.log


class Streams:
    """Endless streams, half of them busy, half asleep for a minute after their first event.

    A sync generator in `time.sleep` cannot be woken: its stream ends when it wakes up by itself. So
    none of them is asleep.

    Whose generator is asleep in an `await`, as most are, is seen to be closed before its body ends.
    Starlette and FastAPI only drop one that stands at its `yield`, which a sync generator always
    does in the end: Python closes it when it collects it. So it is when a reader leaves.
    """

    def __init__(self, server: Process, paths: Iterable[str], count: int) -> None:
        self.server = server
        self.asleep: list[str] = []
        self.readers: dict[str, RawReader] = {}
        for path in paths:
            for number in range(count):
                name = f"{path}-{number}"
                interval = (0.5, 60)[number % 2]
                if path.endswith("/sync_streaming"):
                    interval = 0.1
                elif interval == 60:
                    self.asleep.append(name)
                target = f"{path}?reader={name}&interval={interval}"
                self.readers[name] = RawReader(server.port, target)
        self.read_until(lambda reader: reader.arrivals)

    def read_until(self, condition: Callable[[RawReader], object]) -> None:
        readers = self.readers.values()
        assert read_until(readers, lambda: all(condition(reader) for reader in readers))

    def assert_ended_properly(self) -> None:
        """Each body has its end, and one only, after its generator was closed."""
        self.read_until(lambda reader: reader.ended_at)
        assert [name for name, reader in self.readers.items() if not reader.ended_properly] == []
        log = self.server.log.splitlines()
        assert {log.count(f"INFO ended {name}") for name in self.readers} == {1}
        for name in self.asleep:
            assert log.index(f"INFO closed {name}") < log.index(f"INFO ended {name}")
