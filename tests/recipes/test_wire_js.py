"""recipes/pages/wire.js, what the recipes' pages share, in Node."""

import subprocess
from pathlib import Path

from tests.support.processes import LIMIT, need


def test_the_reader_of_events() -> None:
    node = need("node", "nodejs")
    command = [node, "--test", str(Path(__file__).with_name("wire.test.mjs"))]
    result = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT)
    assert result.returncode == 0, result.stdout + result.stderr
