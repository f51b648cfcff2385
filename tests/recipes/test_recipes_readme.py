"""recipes/*.md, block by block; `tests/support/readme.py` has the rules."""

from pathlib import Path

import pytest

from tests.support.processes import ROOT, Start
from tests.support.readme import Block, Readme
from tests.support.recipes import start_recipe

READMES = [Readme(f"recipes/{file.name}") for file in sorted((ROOT / "recipes").glob("*.md"))]
BLOCKS = [
    pytest.param(readme, block, id=f"{readme.path}, {block}")
    for readme in READMES
    for block in readme.blocks
]


@pytest.mark.parametrize(("readme", "block"), BLOCKS)
def test_a_block_is_as_it_says(readme: Readme, block: Block, start: Start, tmp_path: Path) -> None:
    readme.check(block, lambda recipe: start_recipe(start, recipe, tmp_path))
