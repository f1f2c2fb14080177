"""`--dry-run` of the launch verbs: print what would be written and started, and do neither."""

from __future__ import annotations

import os
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from launch.commands.terminal import say


def dry_run(
    files: dict[Path, str],
    commands: Sequence[Sequence[str]],
    environment: Mapping[str, str],
    *,
    job_file: Path | None = None,
) -> dict[str, Any]:
    """Print what would be written and started. environment: all that the commands would get; shown is what differs from ours.
    job_file: what is written only at the start, when it is known where training begins."""
    for path, text in files.items():
        say(f"# file {path}\n{text}")
    if job_file is not None:
        say(f"# file {job_file}, written at the start: the configuration, the MLflow run, the checkpoint to begin with")
    lines = [shlex.join([*_env(environment), *command]) for command in commands]
    for line in lines:
        say(f"# command, in {os.getcwd()}\n{line}")
    late = [] if job_file is None else [str(job_file)]
    return {"files": {str(path): text for path, text in files.items()}, "commands": lines, "written_at_start": late}


def _env(environment: Mapping[str, str]) -> list[str]:
    """The words of `env` that make this process's environment that one."""
    removed = [word for name in sorted(os.environ.keys() - environment.keys()) for word in ("-u", name)]
    changed = [f"{name}={value}" for name, value in sorted(environment.items()) if os.environ.get(name) != value]
    return ["env", *removed, *changed] if removed or changed else []
