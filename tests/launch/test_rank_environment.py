"""What a rank finds in its environment before it starts its work (pipeline/worker.py, pipeline/network.py)."""

import json

import fsspec.config

from pipeline import worker


def test_fsspec_gets_what_came_by_the_file(tmp_path, monkeypatch):
    """fsspec reads its variables once, at import, which is before the file is read."""
    file = tmp_path / "environment.json"
    file.write_text(json.dumps({"FSSPEC_PLDRTEST_KEY": "k"}))
    monkeypatch.setenv(worker.ENVIRONMENT_FILE, str(file))
    monkeypatch.setenv("FSSPEC_PLDRTEST_KEY", "is set anew, and taken away after the test")
    try:
        worker.take_environment()
        assert fsspec.config.conf["pldrtest"] == {"key": "k"}
    finally:
        fsspec.config.conf.pop("pldrtest", None)
