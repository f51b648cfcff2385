"""Make the tables of faults: what gets lost and what comes twice, here and with what others offer.

Run `python -m tests.faults.streams`: twenty minutes. It prints two Markdown tables: of main.py and
the others, and of the others with `EndStreams` in front, for the faults by which a server is asked
to stop. All run on the same uvicorn, one after the other, and get the same readers and faults.
"""

import argparse
import json
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from tests.support import stopping
from tests.support.event_sources import Event, EventSource, event_sources
from tests.support.processes import ENVIRONMENT, LOG_CONFIG, ROOT, Process, free_port, wait_for
from tests.support.raw_reader import RawReader, many_descriptors, read_until, wait_until_idle

PATIENCE = 60.0  # seconds that a reader tries to get what is missing


@dataclass(frozen=True)
class Served:
    """What uvicorn serves."""

    app: str
    path: str = "/stream"
    ended: bool = False  # with EndStreams in front


OURS = "main.py"
SERVERS = {
    OURS: Served("main:app", "/sse"),
    "sse-starlette": Served("tests.support.others:sse_starlette"),
    "EventSourceResponse": Served("tests.support.others:event_source_response"),
    "StreamingResponse": Served("tests.support.others:streaming_response"),
}
ENDED = {
    "sse-starlette": Served("tests.support.others:sse_starlette", ended=True),
    "EventSourceResponse": Served("tests.support.others:event_source_response", ended=True),
    "StreamingResponse, SSE by hand": Served("tests.support.others:sse_by_hand", ended=True),
}


class Reader(EventSource):
    """Leaves after the last event. That it leaves does not count as a cut."""

    cut_before: int | None = None  # as often it was cut until then

    def take(self, event: Event) -> None:
        super().take(event)
        if json.loads(event.data)["is_last_event"] and self.task:
            self.cut_before = self.cut
            self.task.cancel()

    def was_cut(self) -> bool:
        return bool(self.cut if self.cut_before is None else self.cut_before)

    def count(self) -> Counter[int]:
        """Return how often each event came."""
        return Counter(json.loads(event.data)["event_id"] for event in self.events)


# The faults ---------------------------------------------------------------------------------------


def save_a_file(server: Process) -> None:
    stopping.save_a_file(server)
    server.wait_for_log("Application startup complete", count=2)


def press_ctrl_c(server: Process) -> None:
    stopping.press_ctrl_c(server)
    server.wait()


def terminate(server: Process) -> None:
    stopping.terminate(server)
    server.wait()


def pull_the_plug(server: Process) -> None:
    server.kill()


@dataclass
class Fault:
    """What is done to a server in mid-stream, and with which streams."""

    name: str
    strike: Callable[[Process], None]
    query: str = "steps=20&interval=0.4"
    steps: int = 20
    options: tuple[str, ...] = ()
    stuck: bool = False  # a reader that reads nothing is there too


FAULTS = [
    Fault("`--reload`: a file is saved", save_a_file, options=("--reload",)),
    Fault("Ctrl-C, started again", press_ctrl_c),
    Fault("SIGTERM, started again", terminate),
    Fault("SIGTERM while all streams sleep 10 s", terminate, "steps=2&interval=10", 2),
    Fault(
        "SIGTERM with a reader that never reads (`--timeout-graceful-shutdown 1`)",
        terminate,
        options=("--timeout-graceful-shutdown", "1"),
        stuck=True,
    ),
    Fault("kill -9, started again", pull_the_plug),
]
VANISH = "readers vanish: generators closed"


@dataclass
class Result:
    tried: int = 0
    lost: int = 0
    doubled: int = 0
    cut: int = 0
    took: float = 0.0  # seconds, the longest

    def __str__(self) -> str:
        counts = f"{self.lost} lost, {self.doubled} doubled"
        return f"{counts}, {self.cut} cut off; {self.took:.1f} s"


def start(served: Served, folder: Path, *options: str) -> Process:
    """Start a server in a folder of its own, in which a file can be saved."""
    (folder / "log.json").write_text(json.dumps(LOG_CONFIG))
    port = free_port()
    command = [sys.executable, "-m", "uvicorn", served.app, "--port", str(port)]
    command += ["--no-access-log", "--log-config", "log.json", *options]
    environment = {**ENVIRONMENT, "PYTHONPATH": str(ROOT)}
    if served.ended:
        environment["END_STREAMS"] = "1"
    return Process(command, folder / "server.log", port, cwd=folder, env=environment)


def strike_in_mid_stream(served: Served, fault: Fault, readers: int, result: Result) -> None:
    """Let the readers read, strike, start the server again if it is down; add up what came."""
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        server = start(served, folder, *fault.options)
        stack.callback(server.kill)
        if fault.stuck:
            stuck = RawReader(server.port, f"{served.path}?steps=100000&interval=0")
            stack.callback(stuck.close)
            wait_until_idle(server)
        crowd = [Reader(server.port, f"{served.path}?{fault.query}") for _ in range(readers)]
        sources = stack.enter_context(event_sources())
        for reader in crowd:
            sources.loop.call_soon_threadsafe(reader.open)
        wait_for(lambda: all(reader.events for reader in crowd), "the first events")
        time.sleep(0.5)  # into mid-stream

        struck_at = time.monotonic()
        fault.strike(server)
        result.took = max(result.took, time.monotonic() - struck_at)
        if fault.strike is not save_a_file:
            server.start()
        end = time.monotonic() + PATIENCE
        while time.monotonic() < end and not all(r.task and r.task.done() for r in crowd):
            time.sleep(0.1)
    counts = [reader.count() for reader in crowd]
    result.tried += readers
    result.lost += sum(fault.steps - len(count) for count in counts)
    result.doubled += sum(count.total() - len(count) for count in counts)
    result.cut += sum(reader.was_cut() for reader in crowd)


def vanish(served: Served, readers: int) -> float:
    """Let readers vanish in three ways; return how long, at most, until their generators ended."""
    took = 0.0
    with tempfile.TemporaryDirectory() as folder:
        server = start(served, Path(folder))
        try:
            for wave, (way, query) in enumerate(
                [
                    ("close", "interval=10"),
                    ("reset", "interval=10"),
                    ("vanish", "steps=1000&interval=1"),
                ]
            ):
                crowd = [RawReader(server.port, f"{served.path}?{query}") for _ in range(readers)]
                read_until(crowd, lambda: all(reader.arrivals for reader in crowd))  # noqa: B023
                vanished_at = time.monotonic()
                for reader in crowd:
                    getattr(reader, way)()
                wait_for(
                    lambda: server.log.count("generator closed") == readers * (wave + 1),  # noqa: B023
                    "the end of the generators",
                )
                took = max(took, time.monotonic() - vanished_at)
        finally:
            server.kill()
    return took


def print_row(*cells: object) -> None:
    print("|", " | ".join(map(str, cells)), "|", flush=True)


def print_head(*cells: str) -> None:
    print_row(*cells)
    print_row(*["---"] * len(cells))


def main() -> int:
    """Print the tables; return 1 if main.py or `EndStreams` lost, doubled or cut off anything."""
    parser = argparse.ArgumentParser(description="Make the tables of faults.")
    parser.add_argument("--readers", type=int, default=200)
    parser.add_argument("--tries", type=int, default=3)
    parser.add_argument("--vanishing", type=int, default=1000, help="0: leave it out")
    parser.add_argument("--only", default="", help="only faults whose name has this in it")
    parser.add_argument("--ours", action="store_true", help="leave out the others")
    arguments = parser.parse_args()
    names = [OURS] if arguments.ours else list(SERVERS)
    faults = [fault for fault in FAULTS if arguments.only in fault.name]
    faulty = False

    def strike_all(fault: Fault, all_served: list[Served]) -> list[Result]:
        results = [Result() for _ in all_served]
        for _ in range(arguments.tries):
            for served, result in zip(all_served, results, strict=True):
                strike_in_mid_stream(served, fault, arguments.readers, result)
        return results

    with many_descriptors(4096):
        print_head("fault", "times tried", "lost", "doubled", *names[1:])
        for fault in faults:
            ours, *others = strike_all(fault, [SERVERS[name] for name in names])
            cut_by_us = ours.cut if fault.strike is not pull_the_plug else 0
            faulty = faulty or bool(ours.lost or ours.doubled or cut_by_us)
            tried = f"{ours.tried} streams; {ours.took:.1f} s"
            print_row(fault.name, tried, ours.lost, ours.doubled, *others)
        if arguments.vanishing:
            seconds = [f"{vanish(SERVERS[name], arguments.vanishing):.1f} s" for name in names]
            tried = f"{3 * arguments.vanishing} readers; {seconds[0]}"
            print_row(VANISH, tried, "–", "–", *seconds[1:])

        if not arguments.ours:
            print()
            print_head("fault", "times tried", *ENDED)
            for fault in faults:
                if fault.strike is pull_the_plug:
                    continue  # nothing can end then
                results = strike_all(fault, list(ENDED.values()))
                faulty = faulty or any(each.lost or each.doubled or each.cut for each in results)
                print_row(fault.name, f"{results[0].tried} streams", *results)
    return int(faulty)


if __name__ == "__main__":
    sys.exit(main())
