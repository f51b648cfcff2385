"""The tests' packages from npm (package.json), installed once for all workers."""

import fcntl
import subprocess
from pathlib import Path

from tests.support.processes import need

HERE = Path(__file__).parent


def node_modules() -> Path:
    """Return the folder of the installed packages; install them, as locked, if it is missing."""
    npm = need("npm", "nodejs npm")
    modules = HERE / "node_modules"
    with (HERE / "package.json").open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # several workers come here at once
        # npm writes this file last: without it an installation was broken off.
        if not (modules / ".package-lock.json").exists():
            command = [npm, "ci", "--prefix", str(HERE), "--no-audit", "--no-fund"]
            subprocess.run(command, check=True)
    return modules
