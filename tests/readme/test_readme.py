"""The README tells no tales: its commands are run, its outputs and its excerpts compared.

Each fenced block has a comment in front of it that says what is done with it here. The server is
the one that the README starts, on its port 8000, but quicker where ten seconds are shown.
"""

import re
import signal
import socket
import sys
from pathlib import Path

import pytest

import main
from tests.support.processes import ENVIRONMENT, ROOT, UVICORN, Process, Start, wait_for
from tests.support.raw_reader import RawReader, read_until
from tests.support.readme import (
    PORT,
    Block,
    Readme,
    Terminal,
    check_commands,
    check_excerpt,
    check_program,
    commands,
    copy_section,
    shows,
)

README = Readme("README.md")

pytestmark = pytest.mark.xdist_group("port 8000")


def start_on_port_8000(start: Start, app: str) -> Process:
    with socket.socket() as probe:
        if probe.connect_ex(("127.0.0.1", PORT)) == 0:
            pytest.fail(f"port {PORT} is taken: stop what listens there, the README needs it")
    return start(sys.executable, "-m", "uvicorn", app, port=PORT)


def test_every_block_says_how_it_is_checked() -> None:
    known = r"run|run, .*|run: .*|from \S+|test command|not run here: .*"
    assert [block for block in README.blocks if not re.fullmatch(known, block.mark)] == []


def test_commands_and_programs_print_what_the_readme_shows(start: Start) -> None:
    start_on_port_8000(start, "tests.support.quick:app")
    for block in README.marked("run"):
        check_commands(block)
    program = README.only("run: a program")
    check_program(program, "".join(f"Step {i} of 10: ☕\n" for i in range(1, 11)), PORT)


def test_the_plug_is_pulled(start: Start) -> None:
    block = README.only("run, with kill -9 of the server after the third event, and a new one")
    ((command, shown),) = commands(block)
    server = start_on_port_8000(start, "main:app")
    terminal = Terminal(command)
    wait_for(lambda: '"event_id": 2' in terminal.screen, "the third event")
    server.kill()
    wait_for(lambda: "resuming" in terminal.screen, "the client to notice")
    start_on_port_8000(start, "tests.support.quick:app")
    screen = terminal.wait()
    assert shows(shown, screen), screen
    assert [int(i) for i in re.findall(r'"event_id": (\d+)', screen)] == list(range(10))


def test_the_lines_that_everybody_writes(tmp_path: Path, start: Start) -> None:
    (tmp_path / "own.py").write_text(README.only("run: the lines that everybody writes"))
    server = start(sys.executable, "-m", "uvicorn", "own:app", "--port", "{port}", cwd=tmp_path)
    check_commands(README.only("run: what curl prints of them"), server.port)


def test_an_app_with_two_sections_of_main_py(tmp_path: Path, start: Start) -> None:
    """In a folder of its own, in FastAPI's default file: `main.py`."""
    copy_section(2, tmp_path / "stream.py")
    copy_section(4, tmp_path / "end_streams.py")
    (tmp_path / "main.py").write_text(README.only("run: with stream.py and end_streams.py"))
    server = start(*UVICORN, cwd=tmp_path, env=ENVIRONMENT | {"PYTHONUNBUFFERED": "1"})
    left, stays = RawReader(server.port, "/ticks"), RawReader(server.port, "/ticks")
    assert read_until([left, stays], lambda: left.arrivals and stays.arrivals)
    left.close()
    server.wait_for_log("closed")
    server.signal(signal.SIGTERM)
    assert read_until([stays], lambda: stays.ended_at)
    assert stays.ended_properly
    server.wait()
    assert server.log.count("closed") == 2
    assert "ERROR" not in server.log


@pytest.mark.parametrize("block", [b for b in README.blocks if b.mark.startswith("from ")])
def test_an_excerpt_is_in_the_file_that_it_comes_from(block: Block) -> None:
    check_excerpt(block.text, block.mark.removeprefix("from "))


def test_two_commands_do_all_the_set_up() -> None:
    """The run command does not end, so only its parts are checked here; .ci/run runs the other."""
    run = next(block.text for block in README.blocks if block.mark.startswith("not run here: "))
    install, serve = run.strip().rsplit(" && ", 1)
    assert install == "python3 -m venv .venv && .venv/bin/pip install -r requirements.txt"
    assert serve == ".venv/bin/uvicorn main:app --reload"
    assert README.only("test command").count("\n") == 1


def test_ci_installs_what_tests_need() -> None:
    """On this machine it may be there for another reason."""
    installed = re.findall(r'^packages="(.*?)"', (ROOT / ".ci/run").read_text(), re.M | re.S)
    named = (
        package
        for file in (ROOT / "tests").glob("*/*.py")
        for packages in re.findall(r'(?:need|miss)\("[^"]+", "([^"]+)"', file.read_text())
        for package in packages.split()
    )
    assert set(named) - set(installed[0].split()) <= {
        "nodejs",
        "npm",
    }  # only where they are missing


def test_bytes_on_the_wire() -> None:
    event = main.Event(event_id=0, data="Step 1 of 10: ☕", is_last_event=False)
    formats = (main.TextStream, main.NDJSONStream, main.SSEStream)
    text, ndjson, sse = (len(form([]).render(event)) for form in formats)
    row = f"| costs on the wire, for such an event | {text} bytes | {ndjson} bytes | {sse} bytes |"
    assert row in README.text
