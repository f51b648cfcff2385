"""A README tells no tales: what its fenced blocks say is done, and compared with what they show.

A comment stands right in front of each block, its mark, and says how the block is checked:

`<!-- run with recipes.basics -->`
    A console block. Each line after `$ ` is run by bash, from the project's root, in a terminal of
    its own, while `uvicorn recipes.basics:app` runs on some free port, with the environment that
    `tests/support/recipes.py` names. Commands say `localhost:8000`; the free port is put in its
    place, and taken out again of what is printed. Below a command stands what it prints, standard
    error too; see `shows`. `^C` on a line of its own is Ctrl-C, pressed when all that stands above
    it has been printed.
`<!-- run with recipes.basics: a program -->`
    Python, run against such a server. If the next block is marked `<!-- what it prints -->`, its
    standard output is compared with that. It must end by itself, without a word on standard error.
`<!-- run -->`, `<!-- run: a program -->`
    The same without a server.
`<!-- from recipes/basics.py -->`
    Lines of that file, exactly as they are there.
`<!-- tested in tests/recipes/test_basics.py: sixty streams -->`
    What needs more than that: a test in that file takes it, by `README.tested("sixty streams")`.
`<!-- not run here: it does not end -->`
    Nothing is checked, for the reason given.
"""

import contextlib
import os
import pty
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from tests.support.processes import LIMIT, ROOT, Process, need, wait_for

PORT = 8000  # what a README says
PATH = f"{Path(sys.executable).parent}:{os.environ['PATH']}"  # `python` is the one of the tests
UUID = r"\b[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}\b"


class Block(NamedTuple):
    mark: str
    text: str
    line: int  # of the README, from 1

    def __str__(self) -> str:  # the name of its test
        return f"line {self.line}: {self.mark}"


class Readme:
    """The blocks of a README, in order. `path` is where it is in the project."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.text = (ROOT / path).read_text()
        self.blocks = [
            Block(found[1] or "", found[2], self.text.count("\n", 0, found.start()) + 1)
            for found in re.finditer(
                r"^(?:<!-- ([^\n]*) -->\n)?```\w+\n(.*?)^```$", self.text, re.MULTILINE | re.DOTALL
            )
        ]
        # A fence without a language, or an indented one, would go unseen.
        assert len(re.findall(r"^\s*```", self.text, re.MULTILINE)) == 2 * len(self.blocks), path

    def marked(self, mark: str) -> list[str]:
        """Return the texts of the blocks with this mark."""
        return [block.text for block in self.blocks if block.mark == mark]

    def only(self, mark: str) -> str:
        """Return the text of the one block with this mark."""
        (text,) = self.marked(mark)
        return text

    def tested(self, name: str) -> str:
        """Return the text of the one block that is marked `tested in …: name`."""
        (text,) = (
            block.text
            for block in self.blocks
            if re.fullmatch(rf"tested in \S+: {re.escape(name)}", block.mark)
        )
        return text

    def check(self, block: Block, start: Callable[[str], Process]) -> None:
        """Do with a block what its mark says. `start("recipes.basics")` starts that server."""
        following = self.blocks[self.blocks.index(block) + 1 :]
        output = following[0].text if following and following[0].mark == PRINTS else None
        if found := re.fullmatch(r"run(?: with (\S+))?(: a program)?", block.mark):
            port = start(found[1]).port if found[1] else PORT
            if found[2]:
                check_program(block.text, output, port)
            else:
                check_commands(block.text, port)
        elif block.mark == PRINTS:
            before = self.blocks[self.blocks.index(block) - 1]
            assert before.mark.endswith(": a program"), "no program stands before it"
        elif found := re.fullmatch(r"from (\S+)", block.mark):
            check_excerpt(block.text, found[1])
        elif found := re.fullmatch(r"tested in (\S+): (.+)", block.mark):
            assert f'.tested("{found[2]}")' in (ROOT / found[1]).read_text(), "no test takes it"
        else:
            assert re.fullmatch(r"not run here: .+", block.mark), (
                "it does not say how it is checked"
            )


PRINTS = "what it prints"


class Terminal:
    """Runs a command line in a terminal of its own, and knows what is on the screen by now."""

    def __init__(self, command: str) -> None:
        (program,) = re.findall(r"^[\w-]+", command)
        if subprocess.run(["bash", "-c", f"type {program}"], capture_output=True).returncode:
            need(program, program)
        self.screen = ""
        self.output, terminal = pty.openpty()
        self.process = subprocess.Popen(
            ["bash", "-c", command],
            stdout=terminal,
            stderr=terminal,
            cwd=ROOT,
            env={**os.environ, "PATH": PATH},
            start_new_session=True,
        )
        os.close(terminal)
        self.reader = threading.Thread(target=self._read)
        self.reader.start()

    def _read(self) -> None:
        # Linux ends what a terminal gives with an error.
        with (
            contextlib.suppress(OSError),
            os.fdopen(self.output, newline="", errors="replace") as lines,
        ):
            for line in lines:
                self.screen += line.replace("\r\n", "\n")

    def interrupt_after(self, shown: str) -> None:
        """Press Ctrl-C when this is on the screen, as `shows` has it."""
        wait_for(lambda: shows(shown + "...\n", self.screen), f"{shown!r} on the screen")
        os.killpg(self.process.pid, signal.SIGINT)

    def wait(self) -> str:
        """Wait until the command has ended; return all that it printed."""
        self.process.wait(LIMIT)
        self.reader.join(LIMIT)
        return self.screen

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)


def shows(readme: str, screen: str, ids: dict[str, str] | None = None) -> bool:
    """Tell whether the screen shows what the README does.

    Times of day and durations (`12:00:00.000`, `1.00 s`) may be others. A line `...` stands for any
    number of lines, `…` in a line for anything. A UUID stands for the one that came: `ids` has
    those that are known, by the README's, and is told of new ones.
    """
    ids = {} if ids is None else ids

    def timeless(text: str) -> str:
        text = re.sub(r"\b\d\d:\d\d:\d\d\.\d{3}\b", "TIME", text)
        return re.sub(r"\b\d+\.\d\d s\b", "DURATION", text)

    new = [uuid for uuid in dict.fromkeys(re.findall(UUID, readme)) if uuid not in ids]
    pattern = re.escape(timeless(replaced(readme, ids)))
    pattern = pattern.replace(re.escape("...\n"), "(?:.*\n)*").replace("…", ".*")
    for number, uuid in enumerate(new):
        name = f"uuid_{number}"
        pattern = pattern.replace(re.escape(uuid), f"(?P<{name}>{UUID})", 1)
        pattern = pattern.replace(re.escape(uuid), f"(?P={name})")
    found = re.fullmatch(pattern, timeless(screen))
    if found:
        ids.update((uuid, found[f"uuid_{number}"]) for number, uuid in enumerate(new))
    return found is not None


def replaced(text: str, replacements: dict[str, str]) -> str:
    for old, new in replacements.items():
        text = text.replace(old, new)
    return text


def commands(block: str) -> list[tuple[str, str]]:
    """Return the commands of a console block, each with the output that the README shows."""
    nothing, *parts = re.split(r"^\$ (.*)\n", block, flags=re.MULTILINE)
    assert nothing == ""
    return list(zip(parts[::2], parts[1::2], strict=True))


def check_commands(block: str, port: int = PORT) -> None:
    """Run each command of a console block, and compare what it prints with what is shown."""
    ids: dict[str, str] = {}
    for command, shown in commands(block):
        terminal = Terminal(replaced(command, {f"localhost:{PORT}": f"localhost:{port}", **ids}))
        try:
            above, ctrl_c, below = shown.partition("^C\n")
            if ctrl_c:
                terminal.interrupt_after(above)
                # More may have come until the key was pressed, and a line may have been cut.
                shown = above + "...\n…" + below
            screen = terminal.wait().replace(f":{port}", f":{PORT}")
        finally:
            terminal.kill()
        assert shows(shown, screen, ids), f"$ {command}\n{screen}"


def check_program(program: str, shown: str | None, port: int) -> None:
    """Run a Python program; compare its standard output with `shown`, if there is that."""
    result = subprocess.run(
        [sys.executable, "-c", program.replace(f"localhost:{PORT}", f"localhost:{port}")],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=LIMIT,
    )
    assert result.stderr == ""
    assert shown is None or shows(shown, result.stdout.replace(f":{port}", f":{PORT}"))


def check_excerpt(lines: str, file: str) -> None:
    """Look for lines in a file of the project, given by its path in it."""
    assert lines in (ROOT / file).read_text(), f"not in {file}"


def copy_section(number: int, file: Path) -> None:
    """Write a numbered section of main.py to a file of its own, as a person copies it."""
    text = (ROOT / "main.py").read_text()
    file.write_text(re.split(r"^(?=# \d\. )", text, flags=re.MULTILINE)[number])
