"""The benchmarks of the recipes: they run, and bench/README.md shows what they measured."""

import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from tests.support.processes import LIMIT, ROOT, miss, need

sys.path.append(str(ROOT / "bench"))
import answers
import export
import fanout
import long_task
import tail


def run_quickly(bench: ModuleType) -> str:
    command = [sys.executable, f"bench/{bench.__name__}.py", "--quick"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=LIMIT * 10)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_fanout_runs_and_everybody_gets_everything() -> None:
    need("nginx", "nginx")
    need("redis-server", "redis-server")
    if not Path("/usr/lib/nginx/modules/ngx_nchan_module.so").exists():
        miss("nchan", "libnginx-mod-nchan")
    shown = run_quickly(fanout)
    single, bursts, crowd = (
        [[cell.strip() for cell in row.strip("|").split("|")] for row in table.splitlines()[2:]]
        for table in shown.split("\n\n")
        if table.startswith("|")
    )
    assert [row[0] for row in single] == [candidate.name for candidate in fanout.CANDIDATES]
    assert [row[0] for row in bursts] == [candidate.name for candidate in fanout.CANDIDATES]
    assert [row[0] for row in crowd] == [
        candidate.name for candidate in fanout.CANDIDATES if candidate.command == fanout.OURS
    ]
    assert {tuple(row[-2:]) for row in single + bursts + crowd} == {("0", "0")}


@pytest.mark.parametrize("bench", [export, tail, long_task, answers])
def test_it_runs(bench: ModuleType) -> None:
    need("sqlite3", "sqlite3")
    need("curl", "curl")
    need("redis-server", "redis-server")
    assert run_quickly(bench).startswith("Measured on ")


@pytest.mark.parametrize("bench", [export, tail, fanout, long_task, answers])
def test_the_readme_shows_what_was_measured(bench: ModuleType) -> None:
    results = json.loads((ROOT / f"bench/{bench.__name__}.json").read_text())
    tables = (ROOT / f"bench/{bench.__name__}.md").read_text()
    assert tables == bench.render(results)
    assert tables in (ROOT / "bench" / "README.md").read_text()
