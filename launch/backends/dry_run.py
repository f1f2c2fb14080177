"""`--dry-run` of the launch verbs: report what would be written and started, and do neither."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pipeline.environment import search_path


def dry_run(
    files: dict[Path, str],
    commands: Sequence[Sequence[str]],
    environment: Mapping[str, str],
    *,
    report: Callable[[str], None],
    job_file: Path | None = None,
) -> dict[str, Any]:
    """Report what would be written and started.

    environment: all that the commands would get; what differs from ours is shown. job_file: a file that is written only at
    the start, when it is known where training begins.
    """
    for path, text in files.items():
        report(f"# file {path}\n{text}")
    if job_file is not None:
        report(
            f"# file {job_file}, written at the start: the configuration, the MLflow run, the checkpoint to begin with"
        )
    # A shell does not have ours for where modules are found, so they are shown with each command that runs Python.
    ours = search_path() if any(sys.executable in command for command in commands) else {}
    shell = {name: value for name, value in os.environ.items() if name not in ours}
    lines = [shlex.join([*_env(shell, environment), *command]) for command in commands]
    for line in lines:
        report(f"# command, in {os.getcwd()}\n{line}")
    late = [] if job_file is None else [str(job_file)]
    return {"files": {str(path): text for path, text in files.items()}, "commands": lines, "written_at_start": late}


def _env(shell: Mapping[str, str], environment: Mapping[str, str]) -> list[str]:
    """The words of `env` that turn a shell's environment into that one."""
    removed = [word for name in sorted(shell.keys() - environment.keys()) for word in ("-u", name)]
    changed = [f"{name}={value}" for name, value in sorted(environment.items()) if shell.get(name) != value]
    return ["env", *removed, *changed] if removed or changed else []
