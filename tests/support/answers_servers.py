"""The recipe `answers` as tests run it: `uvicorn tests.support.answers_servers:app`.

CONSTANTS (JSON) in the environment changes constants of its modules: {"answers.KEEP": 1}.
"""

import importlib
import json
import os

for name, value in json.loads(os.environ.get("CONSTANTS", "{}")).items():
    module, constant = f"recipes.{name}".rsplit(".", 1)
    holder = importlib.import_module(module)
    assert hasattr(holder, constant), name
    setattr(holder, constant, value)

from recipes.answers import app  # noqa: E402

__all__ = ["app"]
