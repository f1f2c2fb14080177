"""What tests of sweeps that run several children at once share."""

import pytest
import yaml


@pytest.fixture
def sweep(tmp_path, make_run, monkeypatch):
    """The YAML of a sweep of four children."""
    make_run(tmp_path, ranks=1)
    tree = {"name": "four", "config": "tiny.yaml", "run_dir": str(tmp_path / "sweep"), "until": "train",
            "grid": {"seed": [1, 2, 3, 4]}}  # fmt: skip
    (tmp_path / "sweep.yaml").write_text(yaml.safe_dump(tree))
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    return "sweep.yaml"
