"""A recipe with other constants: `uvicorn tests.support.changed:feed`.

They are in the environment: `CONSTANTS={"feed.KEEP": 10, "relay.client.timeout": 1}`.
"""

import importlib
import json
import os
from typing import Any


def __getattr__(recipe: str) -> Any:
    if recipe.startswith("_"):
        raise AttributeError(recipe)
    app = importlib.import_module(f"recipes.{recipe}").app
    for name, value in json.loads(os.environ.get("CONSTANTS", "{}")).items():
        module, *path, constant = name.split(".")
        holder: object = importlib.import_module(f"recipes.{module}")
        for part in path:
            holder = getattr(holder, part)
        assert hasattr(holder, constant), name
        setattr(holder, constant, value)
    return app
