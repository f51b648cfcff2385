"""What a stream costs: this project's server and clients beside the alternatives, in one run.

Run it with `python bench/run.py` (about ten minutes, on a machine that does nothing else), or with
`--quick` to see in half a minute that it works. It prints the table, and writes results.json,
results.md and plot.svg.

Each server gets one core, and the load generator another. The rounds are interleaved, because the
speed of a machine drifts; the tables show medians of the rounds.
"""

import argparse
import asyncio
import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path
from statistics import median
from typing import Any

import uvloop
from load import (
    Load,
    Server,
    Window,
    allow_open_files,
    free_port,
    listening,
    open_streams,
    read_one,
)
from readers import READERS

HERE = Path(__file__).parent
CORES = sorted(os.sched_getaffinity(0))
SERVER_CORE, LOAD_CORE = CORES[0], CORES[-1]
BUSY = 0.8  # a load generator that uses more of its core than this may be the bottleneck


@dataclass(frozen=True)
class Candidate:
    """A server to be measured: how it is started, and where its stream is."""

    name: str
    command: tuple[str, ...]
    path: str = "/sse"
    drawn: bool = True  # in the plot, if its path is /sse


def uvicorn(app: str, directory: Path = HERE / "servers") -> tuple[str, ...]:
    quiet = ("--no-access-log", "--log-level", "warning")
    where = ("--app-dir", str(directory), "--port", "{port}")
    return (sys.executable, "-m", "uvicorn", app, *where, *quiet)


def script(name: str, interpreter: str = sys.executable) -> tuple[str, ...]:
    return (interpreter, str(HERE / "servers" / name), "{port}")


OURS = uvicorn("main:app", HERE.parent)
CANDIDATES = (
    Candidate("main.py /sse", OURS),
    Candidate("main.py /ndjson", OURS, "/ndjson"),
    Candidate("main.py /text", OURS, "/text"),
    Candidate("main.py /sse without EndStreams", uvicorn("with_end_streams:without"), drawn=False),
    Candidate("FastAPI StreamingResponse", uvicorn("fastapi_streaming:app")),
    Candidate("the same with EndStreams", uvicorn("with_end_streams:streaming"), drawn=False),
    Candidate("FastAPI EventSourceResponse", uvicorn("fastapi_eventsource:app")),
    Candidate("sse-starlette", uvicorn("starlette_sse:app")),
    Candidate("aiohttp-sse on uvloop", script("aiohttp_eventsource.py")),
    Candidate("Node http", script("node_http.mjs", "node")),
    Candidate("bare ASGI on uvicorn", (*uvicorn("bare_asgi:app"), "--lifespan", "off")),
    Candidate("bare uvloop protocol", script("bare_uvloop.py")),
)
# Tries the load generator: each event is 200 ms late and costs 500 µs of CPU, each stream 64 KB.
LATE, BURN, HELD = 0.2, 0.000_500, 64 * 1024
KNOWN = Candidate("known", (*script("known.py"), str(LATE), str(BURN), str(HELD)))
CANNED = Candidate("canned", script("canned.py"))
# Where the readers read: its name, the server, and the path for each format.
SOURCES = (
    ("an event at a time", CANNED, "/events/{form}"),
    ("500 events at a time", CANNED, "/blocks/{form}"),
    ("main.py", CANDIDATES[0], "/{form}"),
)
SOCKET = "a socket, nothing parsed"  # how fast the server sends


@dataclass(frozen=True)
class Plan:
    """How much of everything; seconds where nothing else is said."""

    rounds: int
    streams: int  # that are open at once, in the table
    interval: float  # between their events
    growth: tuple[int, ...]  # streams that are open at once, in the plot; an event a second each
    drawn: int  # servers in the plot
    settle: float  # from the opening of the last stream to the window
    window: float
    catch_up: float  # for a server that is behind to open its streams
    openings: int  # bursts
    burst: float
    one_reader: int  # events
    reader: int  # events
    at_least: float  # of the known figures, in the check of the load generator


FULL = Plan(
    rounds=3,
    streams=2000,
    interval=0.25,
    growth=(100, 300, 1000, 3000, 10_000),
    drawn=len(CANDIDATES),
    settle=0.5,
    window=3.0,
    catch_up=8.0,
    openings=15,
    burst=0.25,
    one_reader=10_000,
    reader=30_000,
    at_least=0.95,
)
QUICK = Plan(
    rounds=1,
    streams=40,
    interval=0.1,
    growth=(10, 40),
    drawn=2,
    settle=0.1,
    window=0.5,
    catch_up=5.0,
    openings=1,
    burst=0.1,
    one_reader=500,
    reader=2000,
    at_least=0.5,
)


# Measuring ----------------------------------------------------------------------------------------


@contextmanager
def running(candidate: Candidate) -> Iterator[Server]:
    """Start the server on its core, and end it with its block."""
    port = free_port()
    command = [word.replace("{port}", str(port)) for word in candidate.command]
    with listening(candidate.name, command, port, SERVER_CORE) as process:
        server = Server(port, process.pid)
        if candidate is not CANNED:  # whatever it imports or caches with its first streams
            uvloop.run(open_streams(server, candidate.path, 0.1))
            time.sleep(0.2)  # and until it has closed them
        yield server


def tell(what: str) -> None:
    print(f"{time.strftime('%H:%M:%S')}  {what}", file=sys.stderr, flush=True)


async def grow(
    server: Server, path: str, interval: float, counts: tuple[int, ...], plan: Plan
) -> list[Window]:
    """Watch one server with ever more streams, until it falls behind."""
    load = Load(server, path, interval)
    windows: list[Window] = []
    for count in counts:
        await load.open(count - len(load.readers), plan.catch_up)
        await asyncio.sleep(plan.settle)
        windows.append(await load.watch(plan.window))
        if windows[-1].events < 0.9 * windows[-1].due:
            break
    await load.close()
    return windows


async def watch_known(server: Server, seconds: float) -> Window:
    """Watch the known server, once each of its streams has lost its event."""
    load = Load(server, "/sse", 0.1)
    await load.open(20, 60)
    await load.wait_for(5)
    window = await load.watch(seconds)
    await load.close()
    return window


def check_load_generator(plan: Plan) -> dict[str, list[float]]:
    """Measure a server whose faults are known; return what it saw, each beside what is known.

    Exits if not all of it is found.
    """
    with running(KNOWN) as server:
        window = uvloop.run(watch_known(server, plan.window))
        opening = uvloop.run(open_streams(server, "/sse", 0.2))
        one_reader = read_one(server, "/sse", 3)
    late, burn = LATE * 1e3, BURN * 1e6
    seen = {
        "ms late": [window.late[0], late],
        "µs of CPU for an event": [window.cpu, burn],
        "KB for a stream": [window.memory, HELD / 1024],
        "events lost of each stream": [window.lost / window.streams, 1],
        "µs for a stream of one event": [1e6 / opening["per_second"], burn],
        "ms for three events": [3e3 / one_reader["per_second"], late + 3 * burn / 1e3],
    }
    for what, (value, known) in seen.items():
        if value < plan.at_least * known:
            raise SystemExit(f"The load generator saw {value:.2f} {what}: {known:.2f} are known.")
        # A part of what is more is what the server itself needs.
        if value > 1.6 * known:
            tell(f"is the machine busy? {value:.2f} {what}, where {known:.2f} would do")
    return seen


def measure(plan: Plan) -> dict[str, Any]:
    """Run it all; return what was seen in each round."""
    candidates = [c for c in CANDIDATES if c.command[0] != "node" or shutil.which("node")]
    results: dict[str, Any] = {
        "heading": heading(),
        "plan": asdict(plan),
        "steady": {c.name: [] for c in candidates},
        "opening": {c.name: [] for c in candidates},
        "one_reader": {c.name: [] for c in candidates},
        "growth": {},
        "readers": {name: {source[0]: [] for source in SOURCES} for name in (*READERS, SOCKET)},
    }
    tell("the load generator, against a server with known faults")
    results["check"] = check_load_generator(plan)
    for number in range(plan.rounds):
        for candidate in candidates:
            tell(f"{plan.streams} streams, round {number + 1} of {plan.rounds}: {candidate.name}")
            with running(candidate) as server:
                counts = (plan.streams,)
                windows = uvloop.run(grow(server, candidate.path, plan.interval, counts, plan))
            results["steady"][candidate.name] += map(asdict, windows)
    tell(f"opening streams, and one reader, {plan.openings} times")
    with ExitStack() as stack:
        servers = [(c, stack.enter_context(running(c))) for c in candidates]
        for number in range(plan.openings):
            for candidate, server in servers:
                seen = uvloop.run(open_streams(server, candidate.path, plan.burst))
                results["opening"][candidate.name].append(seen)
                if number < plan.openings / 3:
                    seen = read_one(server, candidate.path, plan.one_reader)
                    results["one_reader"][candidate.name].append(seen)
    tell("the readers")
    with ExitStack() as stack:
        sources = {c: stack.enter_context(running(c)) for c in {s[1] for s in SOURCES}}
        for _ in range(plan.rounds):
            for source, candidate, path in SOURCES:
                server = sources[candidate]
                for name in READERS:
                    seen = read(name, server, path, plan.reader)
                    results["readers"][name][source].append(seen)
                seen = read_one(server, path.format(form="ndjson"), plan.reader)
                results["readers"][SOCKET][source].append(seen)
    for candidate in [c for c in candidates if c.path == "/sse" and c.drawn][: plan.drawn]:
        tell(f"up to {plan.growth[-1]} streams: {candidate.name}")
        with running(candidate) as server:
            windows = uvloop.run(grow(server, candidate.path, 1.0, plan.growth, plan))
        results["growth"][candidate.name] = list(map(asdict, windows))
    return results


def read(name: str, server: Server, path: str, steps: int) -> dict[str, float]:
    """Let a reader read one stream, in a process of its own on the load's core."""
    form = READERS[name][0]
    url = f"http://127.0.0.1:{server.port}{path.format(form=form)}?steps={steps}&interval=0"
    cpu = server.cpu()
    command = [sys.executable, str(HERE / "readers.py"), name, url]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{name} failed on {url}:\n{done.stderr}")
    seen: dict[str, float] = json.loads(done.stdout)
    if seen["events"] != steps:
        raise SystemExit(f"{name} got {seen['events']} events of {steps} from {url}")
    return {
        "per_second": (steps - 1) / seen["seconds"],
        "cpu": seen["cpu"] / steps * 1e6,
        "reader_share": seen["cpu"] / seen["seconds"],
        "server_share": (server.cpu() - cpu) / seen["seconds"],
    }


def heading(*more: str) -> dict[str, str]:
    """The date, the machine, and the versions of what is compared and of these packages."""
    cpu = platform.processor() or platform.machine()
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            cpu = line.partition(":")[2].strip()
            break
    packages = (
        "fastapi starlette pydantic uvicorn uvloop httptools sse-starlette aiohttp aiohttp-sse "
        "requests urllib3 httpx httpx-sse"
    )
    versions = {"Python": platform.python_version()}
    versions |= {name: importlib.metadata.version(name) for name in (*packages.split(), *more)}
    if node := shutil.which("node"):
        version = subprocess.run([node, "--version"], capture_output=True, text=True, check=True)
        versions["Node"] = version.stdout.strip().removeprefix("v")
    return {
        "date": date.today().isoformat(),
        "machine": f"{cpu}, {os.cpu_count()} cores, {platform.system()} {platform.release()}",
        "versions": ", ".join(f"{name} {version}" for name, version in versions.items()),
    }


# Showing ------------------------------------------------------------------------------------------


def middle(rounds: list[dict[str, Any]], key: str) -> float:
    return float(median(seen[key] for seen in rounds))


def marked(text: str, rounds: list[dict[str, Any]], key: str = "load_share") -> str:
    """Mark a figure that may be the load generator's and not the server's."""
    return f"{text} \\*" if middle(rounds, key) > BUSY else text


def table(head: list[str], rows: list[list[str]]) -> str:
    """A Markdown table: the first column to the left, figures to the right."""
    rule = ["---", *["---:"] * (len(head) - 1)]
    return "\n".join(f"| {' | '.join(row)} |" for row in [head, rule, *rows])


def round_to(value: float, step: int) -> str:
    """A figure as it may be quoted: 12,340 and not 12,338."""
    return f"{round(value / step) * step:,}"


def render(results: dict[str, Any]) -> str:
    """The tables of results.md, from what is in results.json."""
    plan = results["plan"]
    about = results["heading"]
    rate = plan["streams"] / plan["interval"]
    rows = []
    for name, rounds in results["steady"].items():
        sent = median(seen["events"] / seen["due"] for seen in rounds)
        late = [median(seen["late"][i] for seen in rounds) for i in (0, 1)]
        late.append(max(seen["late"][2] for seen in rounds))
        opening, one_reader = results["opening"][name], results["one_reader"][name]
        rows.append(
            [
                name,
                marked(f"{middle(rounds, 'cpu'):.0f}", rounds),
                f"{middle(rounds, 'memory'):.0f}",
                *[marked(f"{value:.1f}", rounds) for value in late],
                f"{sent:.0%}",
                marked(round_to(middle(opening, "per_second"), 100), opening),
                marked(round_to(middle(one_reader, "per_second"), 1000), one_reader),
            ]
        )
    head = "server|CPU µs per event|KB per stream|late p50 ms|p99 ms|max ms|sent|opened per s"
    parts = [
        f"Measured on {about['date']}: {about['machine']}. {about['versions']}.",
        f"{plan['streams']:,} open streams, an event each {plan['interval']} s "
        f"({rate:,.0f} events a second), each server on one core:",
        table([*head.split("|"), "one reader, events per s"], rows),
    ]
    rows = [
        [
            f"{seen['streams']:,}",
            marked(f"{seen['cpu']:.0f}", [seen]),
            f"{seen['memory']:.0f}",
            *[marked(f"{value:.1f}", [seen]) for value in seen["late"]],
            f"{seen['events']:,}",
            str(seen["lost"] + seen["broken"]),
        ]
        for seen in results["growth"][CANDIDATES[0].name]
    ]
    head = "open streams|CPU µs per event|KB per stream|late p50 ms|p99 ms|max ms|events|lost"
    parts += [f"{CANDIDATES[0].name}, an event a second:", table(head.split("|"), rows)]
    rows = []
    for name, sources in results["readers"].items():
        figures = [round_to(middle(rounds, "per_second"), 1000) for rounds in sources.values()]
        rows.append([name, *figures])
    head = "reader, events per s on one core|" + "|".join(f"from {s[0]}" for s in SOURCES)
    parts += ["Readers of one stream without intervals:", table(head.split("|"), rows)]
    saw = "; ".join(
        f"{value:.1f} {what} ({known:.1f})" for what, (value, known) in results["check"].items()
    )
    parts.append(
        "The load generator, tried on a server with known faults, saw, with what is known and "
        f"without what that server itself needs in brackets: {saw}."
    )
    text = "\n\n".join(parts) + "\n"
    if "\\*" in text:
        text += (
            f"\n\\* The load generator used more than {BUSY:.0%} of its core: "
            "the server may do better than this.\n"
        )
    return text


def plot(results: dict[str, Any], file: Path) -> None:
    """Draw cost per event and lateness over the number of streams."""
    import matplotlib as mpl

    mpl.use("svg")
    from matplotlib import pyplot as plt
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    plt.rcParams |= {"svg.fonttype": "none", "svg.hashsalt": "bench", "font.size": 9}
    # A light ground of its own, so that it can be read on a dark page too.
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.8), facecolor="#fafafa", layout="constrained")
    colors = plt.get_cmap("tab10").colors  # type: ignore[attr-defined]
    for color, (name, windows) in zip(colors, results["growth"].items(), strict=False):
        streams = [seen["streams"] for seen in windows]
        ours = name.startswith("main.py")
        style: dict[str, Any] = {"color": color, "marker": "o", "markersize": 3, "label": name}
        style |= {"linewidth": 2.5, "zorder": 3} if ours else {"linewidth": 1.2}
        axes[0].plot(streams, [seen["cpu"] for seen in windows], **style)
        axes[1].plot(streams, [max(seen["late"][1], 0.1) for seen in windows], **style)
    for axis, title in zip(axes, ("CPU µs per event", "lateness p99, ms"), strict=True):
        axis.set(xscale="log", yscale="log", title=title, xlabel="open streams, an event a second")
        axis.set_facecolor("#fafafa")
        axis.grid(alpha=0.3, which="both", linewidth=0.5)
        axis.spines[["top", "right"]].set_visible(False)
        axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
        axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.yaxis.set_minor_formatter(NullFormatter())
        axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right center", frameon=False)
    figure.savefig(file, metadata={"Date": None})
    plt.close(figure)


def write(results: dict[str, Any], directory: Path) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    text = json.dumps(results, indent=1, ensure_ascii=False)
    (directory / "results.json").write_text(f"{text}\n")
    (directory / "results.md").write_text(render(results))
    plot(results, directory / "plot.svg")


def main() -> None:
    """Measure, print the tables, and write them down."""
    parser = argparse.ArgumentParser(
        description="Measure what a stream costs, here and with the alternatives."
    )
    parser.add_argument("--quick", action="store_true", help="small numbers, which say nothing")
    parser.add_argument(
        "--out", type=Path, help="directory for the results (default: bench/; with --quick none)"
    )
    arguments = parser.parse_args()
    if len(CORES) < 2:
        raise SystemExit("The benchmark needs two cores: one for the server, one for the load.")
    plan = QUICK if arguments.quick else FULL
    allow_open_files(max(plan.streams, *plan.growth) + 200)
    os.sched_setaffinity(0, [LOAD_CORE])
    results = measure(plan)
    print(render(results))
    if directory := arguments.out or (None if arguments.quick else HERE):
        write(results, directory)


if __name__ == "__main__":
    main()
