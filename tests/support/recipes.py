"""The recipes as the tests run them: `uvicorn recipes.NAME:app` on some free port."""

from pathlib import Path

from tests.support.processes import ROOT, Process, Start, start_app

__all__ = ["NEEDS", "RECIPES", "start_app", "start_recipe"]

# Every recipe that there is, such as "recipes.basics"; a file without an app helps others.
RECIPES = sorted(
    f"recipes.{file.stem}"
    for file in (ROOT / "recipes").glob("*.py")
    if "\napp = " in file.read_text()
)
# What a recipe needs in its environment, so that tests which run at once do not meet in one file.
# `{tmp}` is a directory of the test's own.
NEEDS: dict[str, dict[str, str]] = {
    "recipes.export": {},
    "recipes.tail": {},
    "recipes.tokens": {},
    "recipes.relay": {},
    "recipes.long_task": {"DATABASE_URL": "sqlite:///{tmp}/long_task.sqlite"},
    "recipes.feed": {},
}


def start_recipe(start: Start, recipe: str, tmp_path: Path, **environment: str) -> Process:
    """Start the server of a recipe; wait until it listens. More can be put in its environment."""
    needs = {k: v.replace("{tmp}", str(tmp_path)) for k, v in NEEDS.get(recipe, {}).items()}
    return start_app(start, f"{recipe}:app", **needs | environment)
