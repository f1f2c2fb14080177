"""`pldr bench train`: that both sides do the same work, and that it runs to its end."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch

from pipeline.bench import train
from pipeline.config.run import RunConfig
from pipeline.network import free_port

# In its own process, since it joins a process group; it also prints the folders that were saved to.
SCRIPT = """
import json, sys
from unittest.mock import patch
from pipeline.config.run import RunConfig
from pipeline.bench import train as bench
config = RunConfig.model_validate(json.loads(sys.argv[1]))
with patch.object(bench, "Saver", wraps=bench.Saver) as saver:
    result = bench.bench(config, port=int(sys.argv[2]), steps=3, batch=None, saves=1)
folders = [str(call.args[1]) for call in saver.call_args_list]
print(json.dumps({**result, "folders": folders}))
"""


def configuration(run_dir, **train):
    return RunConfig.model_validate(
        {
            "name": "b",
            "run_dir": str(run_dir),
            "data": {"sources": [{"url": "unused"}]},
            "model": {
                "vocab_size": 67,
                "num_layers": 2,
                "num_heads": 1,
                "head_dim": 4,
                "context_length": 8,
                "A_dff": 6,
            },
            "train": {"steps": 4, "warmup_steps": 0, "global_batch": 4, "micro_batch": 2, "precision": "fp32", **train},
        }
    )


@pytest.mark.slow
def test_a_tiny_model_is_timed_and_saved_in_its_run_dir(tmp_path):
    run_dir = tmp_path / "new" / "run"
    words = [json.dumps(configuration(run_dir).as_dict()), str(free_port())]
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, *words],
        env={**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"},
        capture_output=True, text=True, timeout=200,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["micro_batches"] == 2 and result["zero_stage"] == 1 and result["overhead"] > -1
    assert min(result["plain_step_seconds"], result["deepspeed_step_seconds"], result["save_seconds"]) > 0
    assert [os.path.dirname(folder) for folder in result["folders"]] == [str(run_dir)]
    assert not list(run_dir.iterdir())


@pytest.mark.parametrize("clip_by", ["value", "norm"])
def test_plain_pytorch_clips_once_and_as_the_run_does(tmp_path, monkeypatch, clip_by):
    clips, real = [], {by: getattr(torch.nn.utils, f"clip_grad_{by}_") for by in ("value", "norm")}
    norms, foreach_norm = [], torch._foreach_norm
    for by, function in real.items():
        monkeypatch.setattr(
            torch.nn.utils,
            f"clip_grad_{by}_",
            lambda p, clip, by=by, f=function: clips.append((by, clip)) or f(p, clip),
        )
    monkeypatch.setattr(torch, "_foreach_norm", lambda *given: norms.append(given) or foreach_norm(*given))
    config = configuration(tmp_path, clip_by=clip_by, clip=0.5)
    step = train._plain_step(config, list(np.random.default_rng(0).integers(4, 67, (2, 2, 9))))
    step()
    assert clips == [(clip_by, 0.5)] and len(norms) == (clip_by == "norm")


def test_plain_pytorch_is_compiled_where_the_run_is(tmp_path, monkeypatch):
    compiled = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self: compiled.append(self))
    train._plain_step(configuration(tmp_path), [])
    assert not compiled
    train._plain_step(configuration(tmp_path, compile=True), [])
    assert [type(layer).__name__ for layer in compiled] == ["DecoderLayer"] * 2
