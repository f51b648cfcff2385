"""The benchmark: it runs, all its servers send the same events, and its figures are right.

Nothing here judges how fast anything is: that is for `python bench/run.py` on a quiet machine.
"""

import json
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest
from httpx_sse import connect_sse

from tests.support.processes import LIMIT, ROOT, need

sys.path.append(str(ROOT / "bench"))
import load
import readers
import run

DATA = [
    '{"event_id":0,"data":"Step 1 of 3: ☕","is_last_event":false}',
    '{"event_id":1,"data":"Step 2 of 3: ☕","is_last_event":false}',
    '{"event_id":2,"data":"Step 3 of 3: ☕","is_last_event":true}',
]
SENT = [
    *((candidate, candidate.path) for candidate in run.CANDIDATES),
    *((run.CANNED, path.format(form=form)) for _, server, path in run.SOURCES
      if server is run.CANNED for form in ("sse", "ndjson")),
]  # fmt: skip


@pytest.mark.parametrize(
    ("candidate", "path"), SENT, ids=[f"{candidate.name}{path}" for candidate, path in SENT]
)
def test_all_servers_send_the_same_events(candidate: run.Candidate, path: str) -> None:
    if candidate.command[0] == "node":
        need("node", "nodejs")
    interval = 0.1
    with run.running(candidate) as server, httpx.Client(timeout=LIMIT) as client:
        url = f"http://127.0.0.1:{server.port}{path}?steps=3&interval={interval}"
        start = time.monotonic()
        if path.endswith("/sse"):
            with connect_sse(client, "GET", url) as source:
                events = list(source.iter_sse())
            assert [event.data for event in events] == DATA
            assert [event.id for event in events] == ["0", "1", "2"]
            assert {event.retry for event in events} == {1000}
            assert {event.event for event in events} == {"message"}
        else:
            answer = client.get(url)
            texts = [json.loads(line)["data"] for line in DATA]
            lines = texts if path == "/text" else DATA
            assert answer.content.decode() == "".join(f"{line}\n" for line in lines)
        took = time.monotonic() - start
    if candidate is not run.CANNED:
        assert took >= 2 * interval


def test_a_reader_is_exact_about_lateness_and_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter([10.0, 11.25, 11.5, 12.0, 14.5])
    monkeypatch.setattr(time, "perf_counter", lambda: next(times))
    counters = load.Counters(recording=True)
    reader = load.Reader(b"", 1.0, counters)
    reader.data_received("HTTP/1.1 200 OK\r\n\r\nStep 1 of 9: ☕\n".encode())
    reader.data_received("Step 2 of 9: ☕\n".encode())
    reader.data_received("Step 3 of 9: ☕\n".encode()[:14])  # cut in the ☕
    reader.data_received("Step 3 of 9: ☕\n".encode()[14:])
    reader.data_received("Step 5 of 9: ☕\n".encode())
    assert counters.lateness == [0.25, 0.0, 0.5]
    assert counters.lost == 1
    assert counters.opened == 1


def test_a_load_generator_that_sees_too_little_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    # The server, which has the right figure on its command line, does less than is expected.
    monkeypatch.setattr(run, "LATE", 60.0)
    with pytest.raises(SystemExit, match="The load generator saw"):
        run.check_load_generator(run.QUICK)


def test_one_reader_notices_a_missing_event() -> None:
    with run.running(run.KNOWN) as server, pytest.raises(ValueError, match="4 events instead of 5"):
        load.read_one(server, "/sse", 5)


# All of the benchmark, but of one server; test_all_servers… has the others.
SHORT = """
import sys
sys.path.append("bench")
import run
run.CANDIDATES = run.CANDIDATES[:1]
run.SOURCES = run.SOURCES[-1:]
run.main()
"""


@pytest.mark.timeout(LIMIT * 11)
def test_a_quick_run_measures_everything(tmp_path: Path) -> None:
    """It ends at once if the load generator does not find the faults of a server that has them."""
    command = [sys.executable, "-c", SHORT, "--quick", "--out", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=LIMIT * 10)
    assert done.returncode == 0, done.stderr

    rows = {}
    for line in done.stdout.splitlines():
        if line.startswith("| "):
            name, *cells = [cell.strip() for cell in line.strip("|").split("|")]
            rows[name] = cells
    ours = run.CANDIDATES[0].name
    assert len(rows[ours]) == 8
    for cell in rows[ours]:
        assert re.fullmatch(r"-?[0-9,.]+%?( \\\*)?", cell), rows[ours]
    for reader in readers.READERS:
        assert all(int(cell.replace(",", "")) > 0 for cell in rows[reader])
    for name in ("fastapi", "uvicorn", "uvloop", "sse-starlette", "aiohttp-sse", "Python"):
        assert re.search(rf"\b{name} [0-9.]+", done.stdout)

    results = json.loads((tmp_path / "results.json").read_text())
    (window,) = results["steady"][ours]
    assert 0 < window["streams"] <= run.QUICK.streams
    assert window["lost"] == window["broken"] == 0
    assert window["events"] > 0
    assert window["late"] == sorted(window["late"])
    assert window["cpu"] > 0
    assert (tmp_path / "results.md").read_text() == done.stdout.removesuffix("\n")
    picture = (tmp_path / "plot.svg").read_text()
    assert picture.startswith("<?xml")
    assert set(results["growth"]) <= set(re.findall(r">([^<]+)</text>", picture))


def test_the_tables_are_made_from_the_figures() -> None:
    results = json.loads((ROOT / "bench/results.json").read_text())
    tables = (ROOT / "bench/results.md").read_text()
    assert tables == run.render(results)
    assert tables.strip() in (ROOT / "bench/README.md").read_text()


def test_what_is_too_much_for_the_machine_is_told(tmp_path: Path) -> None:
    prlimit = shutil.which("prlimit")
    assert prlimit
    command = [prlimit, "--nofile=200:200", sys.executable, str(ROOT / "bench/run.py")]
    done = subprocess.run([*command, "--out", str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 1
    assert "needs 10200 open files, `ulimit -n` allows 200" in done.stderr
