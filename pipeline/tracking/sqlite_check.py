"""Whether a SQLite file is damaged, or only said to be: an error of one connection is no proof."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from pipeline.io.mounts import writable

SUSPECT = ("not a database", "malformed", "is encrypted", "disk i/o error")
INTACT, NOT_CHECKED = 0, 4
_CHECK = f"""
import sqlite3, sys
try:
    rows = sqlite3.connect(sys.argv[1], uri=True, timeout=5).execute("PRAGMA integrity_check(1)").fetchall()
except sqlite3.Error as error:
    sys.exit(1 if any(words in str(error).lower() for words in {SUSPECT}) else {NOT_CHECKED})
sys.exit({INTACT} if rows == [("ok",)] else 1)
"""


def is_damaged(file: Path) -> bool:
    """Whether SQLite's integrity_check fails. False also where it cannot be run: the file is gone or locked.

    In a process of its own: connections of this one may be what is broken, and a new one shares their memory.
    """
    mode = "mode=rw" if writable(file.parent) else "immutable=1"
    done = subprocess.run([sys.executable, "-I", "-c", _CHECK, f"{file.as_uri()}?{mode}"], capture_output=True)
    return done.returncode not in (INTACT, NOT_CHECKED)
