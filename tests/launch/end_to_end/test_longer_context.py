"""A model is tuned to a longer context: a run of its own begins with an earlier one's weights, at scaled positions."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file

from launch.cli import main

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
YARN = "{type: yarn, factor: 2, original_context_length: 48}"


def test_a_run_tunes_earlier_weights_to_a_longer_context(
    make_run: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = str(make_run(tmp_path, steps=20, checkpoint_every=10, ranks=1, warmup_steps=5))
    monkeypatch.chdir(tmp_path)
    stages = ("shard", "tokenizer", "tokenize", "train", "consolidate")
    for stage in stages:
        assert main([stage, config]) == 0
    tuned = ["run_dir=tuned", "train.init_from=run", "model.context_length=96", f"model.rope_scaling={YARN}"]
    tuned += ["train.steps=2", "train.warmup_steps=1", "train.max_lr=1e-9"]
    for stage in stages[:3]:
        assert main([stage, config, *tuned]) == 0
    (tmp_path / "run" / "weights").rename(tmp_path / "elsewhere")
    capsys.readouterr()
    assert main(["train", config, *tuned]) == 2 and "no consolidated weights" in capsys.readouterr().err
    (tmp_path / "elsewhere").rename(tmp_path / "run" / "weights")
    assert main(["train", config, *tuned]) == 0 and "with the weights of run (step-000020)" in capsys.readouterr().out
    assert main(["consolidate", config, *tuned]) == 0

    before, after = (load_file(tmp_path / run / "weights" / "model.safetensors") for run in ("run", "tuned"))
    assert all(float((after[name] - weight).abs().max()) < 1e-7 for name, weight in before.items())
    record = json.loads((tmp_path / "tuned" / "weights" / "config.json").read_text())
    assert record["model"]["context_length"] == 96 and record["model"]["rope_scaling"]["type"] == "yarn"
    assert record["source"]["step"] == 2 and record["source"]["recipe"]["init_from"] == "run"
    assert main(["extract", config, *tuned]) == 0
    capsys.readouterr()
    assert main(["validate", config, *tuned, "model.rope_scaling=null"]) == 2  # other positions than these weights have
    assert "a checkpoint of another model: its rope_scaling is" in capsys.readouterr().err
