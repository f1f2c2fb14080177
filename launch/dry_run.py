"""`--dry-run` of the launch verbs: print what would be written and started, and do neither."""

from __future__ import annotations

import os
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from launch.terminal import say


def dry_run(files: dict[Path, str], commands: Sequence[Sequence[str]], environment: dict[str, str]) -> dict[str, Any]:
    """Print what would be written and started."""
    for path, text in files.items():
        say(f"# file {path}\n{text}")
    prefix = "".join(f"{name}={shlex.quote(value)} " for name, value in environment.items())
    lines = [prefix + shlex.join(command) for command in commands]
    for line in lines:
        say(f"# command, in {os.getcwd()}\n{line}")
    return {"files": {str(path): text for path, text in files.items()}, "commands": lines}
