"""Where a run comes from, under the names that MLflow's pages read: who began it, with which command, from which code.

MLflow's own client sets these tags for the run of a script; ours are made for a command that may run long before MLflow can be
reached, and name the code's commit, wherever the environment lies.
"""

from __future__ import annotations

import getpass
import os
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

USER_TAG, SOURCE_TAG, SOURCE_TYPE_TAG = "mlflow.user", "mlflow.source.name", "mlflow.source.type"
COMMIT_TAG = "mlflow.source.git.commit"
YAMLS = (".yaml", ".yml")


def origin_tags() -> dict[str, str]:
    """The tags of a run that this process begins; what is not known is left out."""
    tags = {USER_TAG: _user(), SOURCE_TAG: command(sys.argv), SOURCE_TYPE_TAG: "LOCAL", COMMIT_TAG: git_commit()}
    return {key: value for key, value in tags.items() if value}


def command(argv: list[str]) -> str:
    """The command in short: `pldr run quickstart.yaml`. Options and overrides are left out, also the word after an option
    unless it is a YAML: the run's parameters have their values, and MLflow shows what stands after the last slash."""
    program = Path(argv[0]).name
    words = [
        Path(word).name
        for before, word in pairwise(argv)
        if not word.startswith("-") and "=" not in word and (not before.startswith("-") or word.endswith(YAMLS))
    ]
    return " ".join(["pldr" if program.endswith(".py") else program, *words])


def git_commit() -> str | None:
    """The commit of the code, None outside a checkout."""
    here = Path(__file__).resolve().parent
    try:
        found = subprocess.run(
            ["git", "rev-parse", "HEAD"], cwd=here, capture_output=True, text=True, timeout=10, check=True,
            env={**os.environ, "GIT_OPTIONAL_LOCKS": "0"},
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return None
    return found.stdout.strip()


def _user() -> str | None:
    try:
        return getpass.getuser()
    except (OSError, KeyError):  # a user without a name, as in a container
        return None
