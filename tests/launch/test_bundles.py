"""`pldr bundle` and `pldr bundle verify` from a real checkpoint."""

import json
import os
import shutil
import subprocess
import sys

import pytest

from launch.cli import main
from pipeline.storage import MANIFEST

AFTER_TRAINING = ("consolidate", "extract", "validate", "bundle")


def test_bundle_verify_is_verify_and_an_error_is_one_line(capsys, tmp_path):
    for words in (["bundle", "verify"], ["verify"]):
        assert main([*words, str(tmp_path / "nowhere")]) == 1
        errors = capsys.readouterr().err
        assert "nowhere: no such bundle folder" in errors and errors.count("\n") == 1
    (tmp_path / "empty").mkdir()
    assert main(["bundle", "verify", "--json", str(tmp_path / "empty")]) == 1
    out, errors = capsys.readouterr()
    assert "MANIFEST.json: missing" in json.loads(out)["error"] and errors.count("\n") == 1


@pytest.mark.slow
@pytest.mark.parametrize("weight_format", ["fp32", "int8"])
def test_the_same_checkpoint_gives_the_same_bytes_elsewhere_and_later(
    capsys, monkeypatch, tmp_path, make_run, weight_format
):
    """One training; then everything after it twice: here, and in a copy of the run directory by another process with
    another hash seed, time zone, working directory and, of course, at another time."""
    path = make_run(tmp_path, steps=20, warmup_steps=2, validate_every=20, checkpoint_every=20, ranks=1)
    settings = [f"post.weight_format={weight_format}", "post.max_format_loss=1", "post.register_as=null"]
    monkeypatch.chdir(tmp_path)
    for stage in ("shard", "tokenizer", "tokenize", "train"):
        assert main([stage, str(path), *settings]) == 0, capsys.readouterr().err
    shutil.copytree(tmp_path / "run", tmp_path / "copies" / "other")
    other = [f"run_dir={tmp_path / 'copies' / 'other'}", f"tracking.uri=sqlite:///{tmp_path}/run/mlflow.db"]
    environment = {**os.environ, "PYTHONHASHSEED": "77", "TZ": "Asia/Tokyo"}
    for stage in AFTER_TRAINING:
        extra = ["--uncertified"] if stage == "bundle" else []
        expected = 3 if stage == "validate" else 0  # 20 steps make no invariant model
        assert main([stage, str(path), *settings, *extra]) == expected, capsys.readouterr().err
        command = [sys.executable, "-m", "launch.cli", stage, str(path), *settings, *other, *extra]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=200)
        assert done.returncode == expected, done.stderr
    first, second = (tmp_path / folder / "bundle" for folder in ("run", "copies/other"))
    names = sorted(p.name for p in first.iterdir())
    assert MANIFEST in names and names == sorted(p.name for p in second.iterdir())
    for name in names:
        whole = (first / name).read_bytes()
        assert whole == (second / name).read_bytes(), name
        assert str(tmp_path).encode() not in whole, name
    capsys.readouterr()
    assert main(["bundle", "verify", str(second), "--json"]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["certified"] is False and result["weight_format"] == weight_format
