"""recipes/*.md, block by block; `tests/support/readme.py` has the rules."""

import re
from collections.abc import Callable, Iterator
from functools import cache

import pytest

from tests.support.processes import ROOT, Process, starting
from tests.support.readme import Block, Readme
from tests.support.recipes import start_recipe

READMES = [Readme(f"recipes/{file.name}") for file in sorted((ROOT / "recipes").glob("*.md"))]


def in_its_group(readme: Readme, block: Block) -> object:
    """The blocks that a server is needed for are run by one worker."""
    found = re.match(r"run with ([\w.]+)", block.mark)
    marks = [pytest.mark.xdist_group(f"the words about {found[1]}")] if found else []
    return pytest.param(readme, block, id=f"{readme.path}, {block}", marks=marks)


@pytest.fixture(scope="module")
def serve(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], Process]]:
    """Start the server of a recipe, once."""
    folder = tmp_path_factory.mktemp("words")
    with starting(folder) as start:
        yield cache(lambda recipe: start_recipe(start, recipe, folder))


@pytest.mark.parametrize(
    ("readme", "block"), [in_its_group(each, block) for each in READMES for block in each.blocks]
)
def test_a_block_is_as_it_says(
    readme: Readme, block: Block, serve: Callable[[str], Process]
) -> None:
    readme.check(block, serve)
