"""A run directory with everything that training needs, and copies of it to train in."""

import contextlib
import shutil

import pytest

from launch.cli import main


@pytest.fixture(scope="module")
def tokens(tmp_path_factory, make_run):
    """A run directory with everything that training needs, and its YAML beside it."""
    folder = tmp_path_factory.mktemp("faults")
    config = make_run(folder, steps=60, checkpoint_every=10, validate_every=60, log_every=5)
    with contextlib.chdir(folder):
        for stage in ("shard", "tokenizer", "tokenize"):
            assert main([stage, str(config)]) == 0
    return folder


@pytest.fixture
def work(tokens, tmp_path):
    """A copy of it to train in."""
    shutil.copytree(tokens, tmp_path / "work")
    return tmp_path / "work"
