"""The sections of main.py that the README calls copyable, each cut out into a file of its own."""

import re
from pathlib import Path

from tests.support.processes import ROOT

HEADING = re.compile(r"^# (\d)\. .* -+$", re.M)


def copy_section(number: int, file: Path) -> None:
    """Write what stands below the heading `# N.` of main.py, up to the next one."""
    _, *rest = HEADING.split((ROOT / "main.py").read_text())
    sections = dict(zip(rest[::2], rest[1::2], strict=True))
    file.write_text(sections[str(number)])
