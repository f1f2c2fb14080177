"""DeepSpeed's checkpoints to one file, for every ZeRO stage; and what is not trusted."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from pipeline.bundle.weights import load_weights
from pipeline.errors import UserError
from pipeline.io.storage import MANIFEST, manifest_of, publish_bytes, publish_json, sha256_file
from pipeline.post.consolidate import consolidate

ROOT = Path(__file__).resolve().parents[3]
CASES = {1: ["fp32-0", "fp32-1", "fp32-3", "bf16-0"], 2: ["fp32-1", "fp32-2", "fp32-3", "bf16-2"]}
STEP = "step-000002"


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """world-{1,2}/CASE/step-000002, made by real DeepSpeed jobs of one and of two ranks, side by side."""
    out = tmp_path_factory.mktemp("checkpoints")
    jobs = []
    for world, cases in CASES.items():
        port = free_port()
        for rank in range(world):
            env = {
                **os.environ,
                "PYTHONPATH": str(ROOT),
                "OMP_NUM_THREADS": "1",
                "DS_ACCELERATOR": "cpu",
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(world),
            }
            script = str(Path(__file__).with_name("checkpoint_writer.py"))
            command = [sys.executable, script, str(out / f"world-{world}"), *cases]
            jobs.append(subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True))
    outputs = [job.communicate(timeout=200)[0] for job in jobs]
    assert all(job.returncode == 0 for job in jobs), "\n".join(outputs)[-4000:]
    return out


@pytest.fixture
def checkpoint(checkpoints: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(checkpoints / "world-2" / "fp32-2" / STEP, tmp_path / STEP))


def recommit(checkpoint: Path) -> None:
    """Write a manifest and COMMITTED that fit the folder as it is now."""
    files = {n: e for n, e in manifest_of(checkpoint, leave_out=["COMMITTED"]).items() if n != MANIFEST}
    publish_json(checkpoint / MANIFEST, {"schema_version": 1, "files": files})
    publish_bytes(checkpoint / "COMMITTED", sha256_file(checkpoint / MANIFEST).encode())


def refused(checkpoint: Path) -> str:
    out = checkpoint.parent / "weights"
    with pytest.raises(UserError) as caught:
        consolidate(checkpoint, out)
    assert not out.exists() and "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(("world", "case"), [(world, case) for world, cases in CASES.items() for case in cases])
def test_every_stage_gives_the_live_weights(checkpoints: Path, tmp_path: Path, world: int, case: str) -> None:
    folder = checkpoints / f"world-{world}" / case
    result = consolidate(folder / STEP, tmp_path / "weights")
    live = load_file(folder / "live.safetensors")
    got = load_file(tmp_path / "weights" / "model.safetensors")
    assert got.keys() == live.keys() and all(t.dtype == torch.float32 for t in got.values())
    for name, tensor in live.items():
        assert torch.equal(got[name].to(tensor.dtype), tensor), name
    if case.startswith("bf16"):  # the fp32 masters, not their bf16 rounding
        assert any(not torch.equal(t, t.bfloat16().float()) for t in got.values())
    assert result["step"] == 2 and result["data_fingerprint"] == "f00d"
    assert result["num_parameters"] == sum(t.numel() for t in got.values())
    model, source = load_weights(tmp_path / "weights")
    assert (source["invariance_budget"], source["frozen"]) == (0.25, None)
    assert source["mlflow_run_id"] == "run" and not model.training
    recipe = source["recipe"]
    assert (source["seed"], recipe["steps"], recipe["metric_weight_decay"]) == (1, 4, None)
    assert recipe["g_source"] == "learned" and "micro_batch" not in recipe
    assert torch.equal(model.layers[1].attention.plga.W, got["layers.1.attention.plga.W"])


def test_the_same_checkpoint_gives_the_same_bytes(checkpoints: Path, tmp_path: Path) -> None:
    source = checkpoints / "world-2" / "fp32-3" / STEP
    consolidate(source, tmp_path / "one")
    consolidate(source, tmp_path / "two")
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_a_checkpoint_that_is_not_committed_is_refused(checkpoint: Path) -> None:
    (checkpoint / "COMMITTED").unlink()
    assert "no COMMITTED" in refused(checkpoint)


def test_any_damage_is_named(checkpoint: Path) -> None:
    for path in sorted(p for p in checkpoint.rglob("*") if p.is_file() and p.name != "COMMITTED"):
        original = path.read_bytes()
        middle = len(original) // 2
        for damaged in (original[:middle] + bytes([original[middle] ^ 1]) + original[middle + 1 :], original[:-1], b""):
            path.write_bytes(damaged)
            assert path.name in refused(checkpoint)
        path.unlink()
        assert path.name in refused(checkpoint)
        path.write_bytes(original)
    stray = checkpoint / STEP / "zero_pp_rank_9_mp_rank_00_optim_states.pt"
    stray.write_bytes(b"x")
    assert stray.name in refused(checkpoint)


@pytest.mark.parametrize("victim", ["mp_rank_00_model_states.pt", "zero_pp_rank_1_mp_rank_00_optim_states.pt"])
def test_a_checkpoint_that_holds_code_is_not_run(checkpoint: Path, victim: str, tmp_path: Path) -> None:
    witness = tmp_path / "pwned"

    class Malice:
        def __reduce__(self) -> tuple[Any, ...]:
            return (Path.touch, (witness,))

    torch.save({"module": Malice(), "optimizer_state_dict": Malice()}, checkpoint / STEP / victim)
    recommit(checkpoint)
    assert "not a checkpoint file: damaged" in refused(checkpoint)
    assert not witness.exists()
    torch.load(checkpoint / STEP / victim, weights_only=False)
    assert witness.exists()  # the trap was a real one


def test_a_checkpoint_of_another_model_is_named(checkpoint: Path) -> None:
    state = json.loads((checkpoint / "state.json").read_text())
    for key, value, message in (
        ("num_layers", 3, "layers.2.*is missing"),
        ("num_layers", 1, "layers.1.* is not in the model"),
        ("vocab_size", 41, r"embedding.weight is \[40, 12\], state.json describes \[41, 12\]"),
        ("nmu_heads", 2, "nmu_heads"),
    ):
        changed = {**state, "config": {**state["config"], "model": {**state["config"]["model"], key: value}}}
        publish_json(checkpoint / "state.json", changed)
        recommit(checkpoint)
        with pytest.raises(UserError, match=message):
            consolidate(checkpoint, checkpoint.parent / "weights")


def test_nan_weights_are_refused_by_name(checkpoints: Path, tmp_path: Path) -> None:
    checkpoint = Path(shutil.copytree(checkpoints / "world-1" / "fp32-0" / STEP, tmp_path / STEP))
    path = checkpoint / STEP / "mp_rank_00_model_states.pt"
    content = torch.load(path, weights_only=True)
    content["module"]["layers.0.attention.plga.P"][0, 0, 0] = float("nan")
    torch.save(content, path)
    recommit(checkpoint)
    assert "layers.0.attention.plga.P holds NaN" in refused(checkpoint)


def test_masters_in_an_unknown_order_are_refused(checkpoints: Path, tmp_path: Path) -> None:
    checkpoint = Path(shutil.copytree(checkpoints / "world-1" / "bf16-0" / STEP, tmp_path / STEP))
    path = checkpoint / STEP / "mp_rank_00_model_states.pt"
    content = torch.load(path, weights_only=True)
    groups = content["optimizer"]["fp32_groups"]
    same = next(
        (i, j) for i, a in enumerate(groups[0]) for j, b in enumerate(groups[0]) if i < j and a.shape == b.shape
    )
    groups[0][same[0]], groups[0][same[1]] = groups[0][same[1]], groups[0][same[0]]
    torch.save(content, path)
    recommit(checkpoint)
    assert "unknown order" in refused(checkpoint)


def test_damaged_weights_are_refused(checkpoints: Path, tmp_path: Path) -> None:
    consolidate(checkpoints / "world-1" / "fp32-1" / STEP, tmp_path / "weights")
    path = tmp_path / "weights" / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(data)
    with pytest.raises(UserError, match=r"model\.safetensors: sha256 differs"):
        load_weights(tmp_path / "weights")
    path.unlink()
    with pytest.raises(UserError, match=r"model\.safetensors: no such file"):
        load_weights(tmp_path / "weights")
