"""recipes/README.md, block by block; `tests/support/readme.py` has the rules."""

from pathlib import Path

import pytest

from tests.support.processes import Start
from tests.support.readme import Block, Readme
from tests.support.recipes import start_recipe

README = Readme("recipes/README.md")


@pytest.mark.parametrize("block", README.blocks, ids=str)
def test_a_block_is_as_it_says(block: Block, start: Start, tmp_path: Path) -> None:
    README.check(block, lambda recipe: start_recipe(start, recipe, tmp_path))
