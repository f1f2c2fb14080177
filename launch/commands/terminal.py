"""What the command line prints: plain lines, and on a terminal status lines that the next one overwrites."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable

_live = False


def report(text: str) -> None:
    """Print a plain line."""
    global _live
    if _live:
        print()
        _live = False
    print(text, flush=True)


def report_live(text: str) -> None:
    """Print a line that the next one overwrites, on a terminal."""
    global _live
    width = os.get_terminal_size().columns if sys.stdout.isatty() else 200
    print(f"\r\033[K{text[: width - 1]}", end="", flush=True)
    _live = True


def status_lines(*, json: bool) -> Callable[[str], None]:
    """For a training's status lines, indented: on a terminal each makes room for the next."""
    write = report_live if sys.stdout.isatty() and not json else report
    return lambda text: write(f"  {text}")
