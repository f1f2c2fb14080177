"""A copy of the finished run for tests that damage it."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from pipeline.config.paths import RunPaths
from pipeline.config.run import RunConfig

Finished = tuple[RunConfig, RunPaths]
Run = tuple[str, str]


@pytest.fixture
def copied(finished: Finished, tmp_path: Path) -> Run:
    """Documents and tokens of the finished run, to damage."""
    for name in ("documents", "tokens"):
        shutil.copytree(finished[1].root / name, tmp_path / name)
    return str(tmp_path / "documents"), str(tmp_path / "tokens")
