"""The recipes as the tests run them: `uvicorn recipes.NAME:app` on some free port."""

import json
from pathlib import Path
from typing import Any

from tests.support.processes import ROOT, Process, Start, start_app

__all__ = ["RECIPES", "start_app", "start_changed", "start_recipe"]

# Every recipe that there is, such as "recipes.basics"; a file without an app helps others.
RECIPES = sorted(
    f"recipes.{file.stem}"
    for file in (ROOT / "recipes").glob("*.py")
    if "\napp = " in file.read_text()
)


def start_recipe(start: Start, recipe: str, tmp_path: Path, **environment: str) -> Process:
    """Start the server of a recipe; wait until it listens. More can be put in its environment."""
    # So that tests which run at once do not meet in one file.
    if recipe == "recipes.long_task":
        environment = {"DATABASE_URL": f"sqlite:///{tmp_path}/long_task.sqlite"} | environment
    return start_app(start, f"{recipe}:app", **environment)


def start_changed(start: Start, recipe: str, **settings: Any) -> Process:
    """Start a recipe with other constants, `feed__KEEP=10`, and the rest in its environment.

    It logs at DEBUG: the parrot says then when it stops.
    """
    changes = {name.replace("__", "."): settings[name] for name in settings if "__" in name}
    environment = {name: value for name, value in settings.items() if "__" not in name}
    app = recipe if ":" in recipe else f"tests.support.changed:{recipe}"
    return start_app(start, app, "--log-level=debug", CONSTANTS=json.dumps(changes), **environment)
