"""recipes.tail, whose look at the log raises the exception that the file `FAULT` names.

`KEEP_ALIVE` says after how many seconds of silence a reader hears something, and looks by itself.
"""

import builtins
import os
from pathlib import Path
from typing import Any

from recipes import tail

FAULT = Path(os.environ["FAULT"])


class BrokenPath(type(Path())):  # type: ignore[misc]
    def stat(self, **options: Any) -> os.stat_result:
        if FAULT.exists():
            raise getattr(builtins, FAULT.read_text() or "OSError")(f"a fault for {self}")
        status: os.stat_result = super().stat(**options)
        return status


tail.LOG = BrokenPath(tail.LOG)
tail.KEEP_ALIVE = float(os.environ["KEEP_ALIVE"])
app = tail.app
