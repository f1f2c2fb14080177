"""Where a run's files are."""

from pathlib import Path

import pytest

from pipeline.config.paths import RunPaths, expanded
from pipeline.errors import ConfigError


def test_a_home_that_is_not_known_is_one_line(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    assert RunPaths("~/runs").root == Path("/home/me/runs")

    def no_home(path):
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "expanduser", no_home)
    with pytest.raises(ConfigError, match="train.staging ~/x: this user has no home directory; set HOME"):
        expanded("~/x", "train.staging")
