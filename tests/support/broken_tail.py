"""recipes.tail, whose look at the log raises the exception that the file `FAULT` names.

While the file `FAULT.read` is there, each read is an EIO, as on a disk that is ill.
"""

import builtins
import errno
import os
from pathlib import Path
from typing import Any

from recipes import tail
from tests.support import changed

FAULT = Path(os.environ["FAULT"])


class BrokenPath(type(Path())):  # type: ignore[misc]
    def stat(self, **options: Any) -> os.stat_result:
        if FAULT.exists():
            raise getattr(builtins, FAULT.read_text() or "OSError")(f"a fault for {self}")
        status: os.stat_result = super().stat(**options)
        return status


class BrokenFile(tail.LogFile):
    def read_at(self, start: int, end: int) -> bytes:
        if FAULT.with_suffix(".read").exists():
            raise OSError(errno.EIO, "a fault")
        return super().read_at(start, end)


tail.LOG, tail.LogFile = BrokenPath(tail.LOG), BrokenFile  # type: ignore[misc]
app = changed.tail
