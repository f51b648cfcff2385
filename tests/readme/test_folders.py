"""The folders' READMEs: their blocks, their links, and their tables, which are of what is run."""

import re
from pathlib import Path

import pytest

from tests.faults import picture
from tests.faults import streams as faults
from tests.support.fault_proxy import complete_answer, plans
from tests.support.processes import ROOT, UVICORN, Process, Start
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


def table(heading: str) -> list[list[str]]:
    """Return the rows of the table below a heading of tests/README.md, its head first."""
    section = (ROOT / "tests/README.md").read_text().partition(f"\n### {heading}\n")[2]
    head, _, *rows = re.findall(r"^\|.*\|$", section.partition("\n### ")[0], re.MULTILINE)
    return [re.split(r" *\| *", row)[1:-1] for row in [head, *rows]]


def test_the_table_of_stopped_servers_is_of_what_faults_py_does() -> None:
    head, *stopped, vanished = table("When a server stops")
    assert head[4:] == [name for name in faults.SERVERS if name != faults.OURS]
    assert [row[0] for row in stopped] == [fault.name for fault in faults.FAULTS]
    assert {(lost, doubled) for _, _, lost, doubled, *_ in stopped} == {("0", "0")}
    assert vanished[0] == faults.VANISH


def test_the_table_of_the_others_with_end_streams_is_of_what_faults_py_does() -> None:
    head, *ended = table("The others with `EndStreams` in front")
    assert head[2:] == list(faults.ENDED)
    assert [row[0] for row in ended] == [
        fault.name for fault in faults.FAULTS if fault.strike is not faults.pull_the_plug
    ]
    assert {cell.partition(";")[0] for row in ended for cell in row[2:]} == {
        "0 lost, 0 doubled, 0 cut off"
    }


def test_the_picture_is_of_that_table() -> None:
    drawn = picture.draw(picture.README.read_text())
    assert picture.PICTURE.read_text() == drawn, "run python -m tests.faults.picture"


def test_the_table_of_broken_connections_is_of_what_fault_proxy_py_does(
    shared_server: Process,
) -> None:
    tried = plans(len(complete_answer(shared_server.port)))
    assert table("When a connection breaks")[1:] == [
        [name, str(len(plan)), "0", "0"] for name, plan in tried.items()
    ]


def test_the_table_of_replicas_is_of_what_is_done_to_them() -> None:
    tests = (ROOT / "tests/proxies/test_replicas.py").read_text()
    rows = table("Behind `deploy/`")[1:]
    assert {fault for fault, *_ in rows} == set(re.findall(r'\.check\("(.*)", \d+\)', tests))
    assert {(lost, doubled) for _, _, lost, doubled in rows} == {("0", "0")}
