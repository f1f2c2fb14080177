"""A pipeline whose data stages can run."""

import pytest
import yaml

from pipeline.config.load import load_config
from pipeline.stages.runner import Pipeline
from tests.helpers.stages import corpus, no_launch


@pytest.fixture
def make(tmp_path):
    corpus(tmp_path / "corpus.jsonl", "alpha")
    tree = {
        "name": "t",
        "run_dir": str(tmp_path / "run"),
        "data": {"sources": [{"url": str(tmp_path / "corpus.jsonl")}], "val_fraction": 0.2, "test_fraction": 0.1},
        "model": {"vocab_size": 320, "num_layers": 1, "num_heads": 1, "head_dim": 4, "context_length": 16},
        "train": {"steps": 4, "warmup_steps": 1, "global_batch": 4, "micro_batch": 2, "ranks": 2, "precision": "fp32"},
    }
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(tree))

    def make_pipeline(*overrides, launch=no_launch):
        reported = []
        return Pipeline(load_config(path, list(overrides)), launch=launch, report=reported.append), reported

    return make_pipeline
