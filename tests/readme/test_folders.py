"""The folders' READMEs: their blocks, their links, and their tables, which are of what is run."""

import re
from pathlib import Path

import pytest

from tests.faults import picture
from tests.faults import streams as faults
from tests.support.fault_proxy import plans
from tests.support.processes import ROOT, UVICORN, Start
from tests.support.readme import Block, Readme

EVERY = sorted([ROOT / "README.md", *ROOT.glob("[!.]*/README.md")])
FOLDERS = [
    Readme(str(file.relative_to(ROOT)))
    for file in EVERY
    if file.parent not in (ROOT, ROOT / "recipes")  # those have a test of their own
]


@pytest.mark.parametrize(
    ("readme", "block"),
    [(readme, block) for readme in FOLDERS for block in readme.blocks],
    ids=lambda value: value.path if isinstance(value, Readme) else str(value),
)
def test_a_block_is_as_it_says(readme: Readme, block: Block, start: Start) -> None:
    readme.check(block, lambda _: start(*UVICORN))


def anchors(file: Path) -> set[str]:
    """Return what can stand behind the # of a link to this file, as GitHub makes it of headings."""
    headings = re.findall(r"^#+ (.*)", file.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("file", EVERY, ids=lambda file: str(file.relative_to(ROOT)))
def test_every_link_leads_somewhere(file: Path) -> None:
    text = re.sub(r"^```.*?^```", "", file.read_text(), flags=re.MULTILINE | re.DOTALL)
    links = re.findall(r"\]\((?!https?:)([^)#]*)#?([^)]*)\)", text)
    for path, anchor in links:
        target = file.parent / path if path else file
        assert target.exists(), path
        assert not anchor or anchor in anchors(target), f"{path}#{anchor}"


def test_the_first_screen_has_both_commands_and_names_every_folder() -> None:
    first_screen = (ROOT / "README.md").read_text().partition("\n## The lines that")[0]
    assert first_screen.count("```sh") == 2
    assert first_screen.count("\n") < 40
    for folder in ("page", *{file.parent.name for file in EVERY if file.parent != ROOT}):
        assert f"({folder}/)" in first_screen


def table(heading: str) -> list[str]:
    """Return the first cells of the table below a heading of tests/README.md, without its head."""
    section = (ROOT / "tests/README.md").read_text().partition(f"\n### {heading}\n")[2]
    rows = re.findall(r"^\| *(.*?) *\|", section.partition("\n### ")[0], re.MULTILINE)
    return rows[2:]


def test_the_tables_are_of_what_is_done() -> None:
    stopped = [fault.name for fault in faults.FAULTS]
    assert table("When a server stops") == [*stopped, faults.VANISH]
    assert table("The others with `EndStreams` in front") == [
        fault.name for fault in faults.FAULTS if fault.strike is not faults.pull_the_plug
    ]
    assert table("When a connection breaks") == list(plans(1))
    replicas = (ROOT / "tests/proxies/test_replicas.py").read_text()
    done = re.findall(r'\.check\("(.*)", \d+\)', replicas)
    assert set(table("Behind `deploy/`")) == set(done)


def test_the_picture_is_of_the_first_table() -> None:
    drawn = picture.draw(picture.README.read_text())
    assert picture.PICTURE.read_text() == drawn, "run python -m tests.faults.picture"
