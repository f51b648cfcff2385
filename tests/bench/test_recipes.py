"""The benchmarks of export and tail: they run, and recipes/README.md shows what they measured."""

import json
import subprocess
import sys
from types import ModuleType

import pytest

from tests.support.processes import LIMIT, ROOT, need

sys.path.append(str(ROOT / "bench"))
import export
import tail


@pytest.mark.parametrize("bench", [export, tail])
def test_it_runs(bench: ModuleType) -> None:
    need("sqlite3", "sqlite3")
    need("curl", "curl")
    command = [sys.executable, f"bench/{bench.__name__}.py", "--quick"]
    shown = subprocess.run(
        command, cwd=ROOT, check=True, capture_output=True, text=True, timeout=LIMIT * 3
    ).stdout
    assert shown.startswith("Measured on ")


@pytest.mark.parametrize("bench", [export, tail])
def test_the_readme_shows_what_was_measured(bench: ModuleType) -> None:
    results = json.loads((ROOT / f"bench/{bench.__name__}.json").read_text())
    tables = (ROOT / f"bench/{bench.__name__}.md").read_text()
    assert tables == bench.render(results)
    assert tables in (ROOT / "recipes/README.md").read_text()
