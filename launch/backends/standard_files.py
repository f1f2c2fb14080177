"""The three standard files of this process are open, whoever started it."""

from __future__ import annotations

import contextlib
import os


def open_standard_files() -> None:
    """Open what was closed at the start (`>&-`) as /dev/null. It comes before anything else is opened: no file or pipe of ours
    may get the number that others print to."""
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            with contextlib.suppress(OSError):
                os.open(os.devnull, os.O_RDWR)
