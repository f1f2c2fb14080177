"""The training floor on two real ranks (gloo): every ZeRO stage trains the same run, and a resumed run is bit-equal."""

import gzip
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from pipeline.checkpoint.deepspeed_files import MOMENTS, WEIGHT, ZeroState
from pipeline.checkpoint.format import verify
from pipeline.config.schedule import invariance_budget, learning_rate
from pipeline.train.optim import build_optimizer
from pldr_model.loss import cross_entropy
from pldr_model.model import PLDRModel
from tests.pipeline.train.zero_worker import STEPS, configuration

WORKER = "tests.pipeline.train.zero_worker"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("fp32")


@pytest.fixture(scope="module")
def fp32(start_ranks, folder):
    return start_ranks(WORKER, folder, "0,1,2,3", "fp32")


def losses(points: dict) -> list[float]:
    return [points[str(step)]["train/loss"] for step in sorted(int(s) for s in points)]


def plain_pytorch(clip_by: str, g_source: str) -> list[float]:
    """The same run on one process without DeepSpeed: the mean over the global batch, clipped, AdamW."""
    config = configuration(Path("/unused"), 0, "fp32", clip_by, g_source)
    torch.manual_seed(config.seed)
    model = PLDRModel(config.model)
    optimizer = build_optimizer(model, config.train)
    seen = []
    for step in range(STEPS):
        rng = np.random.default_rng(step * config.train.global_batch)
        ids = torch.from_numpy(rng.integers(4, 67, size=(8, 17)))
        loss = cross_entropy(model(ids[:, :-1]), ids[:, 1:])
        optimizer.zero_grad()
        loss.backward()
        if clip_by == "norm":
            torch.nn.utils.clip_grad_norm_(model.parameters(), config.train.clip)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(config.train, step)
        optimizer.step()
        seen.append(loss.item())
    return seen


@pytest.mark.parametrize("clip_by", ["norm", "value"])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_every_zero_stage_trains_like_plain_pytorch(fp32, stage, clip_by):
    """PLGA's fp32 gradients are ill-conditioned at the start (design of the model): sums in another order, as on another
    CPU or with another number of threads, differ by 1e-3 after two updates and by ten times more with each further one. So
    its first two updates are compared; the SDPA twin, on the same optimizer, clipping and accumulation, has none of that."""
    twin = losses(fp32[f"{stage}-{clip_by}"]["sdpa"])
    assert len(twin) == 6 and twin[-1] != twin[1]
    assert twin == pytest.approx(plain_pytorch(clip_by, "identity"), abs=2e-5)
    learned = losses(fp32[f"{stage}-{clip_by}"]["straight"])
    assert learned[:4] == pytest.approx(plain_pytorch(clip_by, "learned")[:4], abs=5e-3)


def test_clipping_by_norm_and_by_value_are_different_runs(fp32):
    assert losses(fp32["1-norm"]["straight"])[-1] != losses(fp32["1-value"]["straight"])[-1]


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_a_resumed_run_is_bit_equal(fp32, stage):
    for clip_by in ("norm", "value"):
        result = fp32[f"{stage}-{clip_by}"]
        assert list(result["resumed"]) == ["4", "5", "6"]
        for step, values in result["resumed"].items():
            straight = result["straight"][step]
            for key in values:
                if key != "train/tokens_per_second" and not key.startswith("system/"):
                    assert values[key] == straight[key], (step, key)


def test_a_run_from_another_runs_checkpoint_has_its_own_recipe(fp32):
    assert len(fp32["recipes"]) == 2  # ZeRO 1 and 3
    for recipe in fp32["recipes"]:
        assert recipe["groups"] == [[0.5, [0.5, 0.6], 1e-3], [9.0, [0.5, 0.6], 1e-3]]
        # The budget of the steps before is what they were trained with.
        before = fp32["1-norm"]["straight"]["3"]["invariance/budget"]
        assert recipe["grown"] == pytest.approx(before + recipe["by"], rel=1e-12)


def test_what_is_logged(fp32):
    points = fp32["1-norm"]["straight"]
    assert {key for key in points["6"] if not key.startswith("system/")} == {
        "data/epoch", "data/tokens", "data/padding_share", "data/left_out_sequences",
        "train/loss", "train/lr", "train/grad_norm", "train/tokens_per_second", "train/skipped_steps", "train/spikes",
        "val/loss_block", "val/loss_cached", "val/leak_gap", "val/bits_per_byte",
        "invariance/budget", "invariance/order_parameter_A", "invariance/order_parameter_A_LM",
        "invariance/order_parameter_A_P", "invariance/order_parameter_G", "invariance/attention_alive",
        *(f"invariance/log10_order_parameter_{name}" for name in ("A", "A_LM", "A_P", "G")),
        *(f"invariance/{what}/layer-{layer}" for what in ("rotary_share", "rank_G") for layer in (0, 1)),
    }  # fmt: skip
    assert points["6"]["invariance/budget"] == pytest.approx(fp32["1-norm"]["budget"], rel=1e-12)
    last = points["6"]
    assert last["val/leak_gap"] == pytest.approx(last["val/loss_cached"] - last["val/loss_block"])
    assert last["val/bits_per_byte"] == pytest.approx(last["val/loss_cached"] / math.log(2) / 2.0)


def test_a_traced_step_and_a_slow_rank_change_no_number_and_are_seen(fp32, folder):
    watched, straight = fp32["watched"], fp32["3-norm"]["straight"]
    for step, values in straight.items():
        for key in values:
            if key != "train/tokens_per_second" and not key.startswith("system/"):
                assert watched[step][key] == values[key], (step, key)
    last = watched["6"]
    assert last["system/slowest_rank"] == 1 and last["system/data_wait_seconds"] >= 0.1
    assert last["system/rank_seconds_max"] - last["system/rank_seconds_min"] > 0.05
    assert last["system/rank_seconds_median"] == pytest.approx(
        (last["system/rank_seconds_max"] + last["system/rank_seconds_min"]) / 2
    )
    for rank in (0, 1):
        traces = folder / "watched" / "logs" / "profile" / "steps-000002-000003"
        with gzip.open(traces / f"rank-{rank}.json.gz", "rt") as stream:
            names = {event.get("name", "") for event in json.load(stream)["traceEvents"]}
        assert {name for name in names if name.startswith("train step")} == {"train step 2", "train step 3"}
        assert any("gloo" in name or "c10d" in name for name in names)
        assert "aten::" in (traces / f"rank-{rank}.txt").read_text()


def test_checkpoints_written_to_the_nodes_own_disk_first_are_the_same(fp32, folder):
    for name in ("step-000003", "step-000006"):
        one, other = folder / "z3-norm" / "checkpoints" / name, folder / "watched" / "checkpoints" / name
        assert verify(one)["step"] == verify(other)["step"]
        assert [p.name for p in sorted((other / name).iterdir())] == [p.name for p in sorted((one / name).iterdir())]
        a, b = (
            ZeroState(one / name),
            ZeroState(other / name),
        )  # not the bytes: the padding of ZeRO-3's pieces is garbage
        assert len(a.shapes) > 30 and a.shapes == b.shapes
        assert all(torch.equal(a.tensor(n, key), b.tensor(n, key)) for n in a.shapes for key in (WEIGHT, *MOMENTS))
    assert not [p for p in (folder / "nvme").rglob("*") if p.is_file()]
    # One that could not be copied to the run directory is reported and not committed; training and the next save continue.
    assert fp32["failing_copy"] == {"left": ["step-000006"], "staged": []}
    log = (folder / "rank0.log").read_text()
    assert "warning: " in log and "copy/checkpoints/step-000003: the checkpoint was not saved" in log


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("bad", [0, 1])
def test_one_rank_that_cannot_write_at_the_last_step_stops_all_of_them_with_one_line(fp32, stage, bad):
    """Not with a hang in a barrier: both ranks report that nothing was saved and why, and no checkpoint is left."""
    for message in fp32["failing"][f"{stage}-{bad}"]["messages"]:
        assert "step-000006: the checkpoint was not saved" in message and "No space left" in message
    assert fp32["failing"][f"{stage}-{bad}"]["left"] == []


def test_gradient_norm_agrees_over_stages(fp32):
    norms = [fp32[f"{stage}-norm"]["sdpa"]["3"]["train/grad_norm"] for stage in range(4)]
    assert norms == pytest.approx([norms[0]] * 4, rel=1e-3) and norms[0] > 0


@pytest.mark.slow
def test_bf16_resumes_bit_equal(start_ranks, tmp_path):
    result = start_ranks(WORKER, tmp_path, "1,2,3", "bf16")
    runs = [run for name, run in result.items() if name.endswith(("-norm", "-value"))]
    assert len(runs) == 6
    for run in runs:
        assert losses(run["resumed"]) == losses(run["straight"])[3:]


def test_the_schedule_is_the_golden_one():
    """Learning rates of ../shared/golden/*/trajectory.json: warm-up 3, cosine to 10 % over 12 steps."""
    from pipeline.config.train import TrainConfig

    train = TrainConfig(steps=12, warmup_steps=3, max_lr=1e-3, global_batch=4, micro_batch=2)
    golden = {
        0: 0.0,
        1: 0.0003333333333333333,
        2: 0.0006666666666666666,
        3: 0.001,
        4: 0.0009728616793536587,
        5: 0.00089471999940354,
        6: 0.0007750000000000001,
        11: 0.00012713832064634127,
    }
    for step, rate in golden.items():
        assert learning_rate(train, step) == pytest.approx(rate, rel=1e-9)
    assert invariance_budget(train) == pytest.approx(0.1 * sum(learning_rate(train, s) for s in range(12)))


def test_the_published_runs_budgets():
    """SOC-2 13.7, SUB-2 4.1 (lr 3e-4, warm-up 2000, 250k steps, decay 0.1)."""
    from pipeline.config.train import TrainConfig

    assert invariance_budget(TrainConfig(max_lr=1e-3, warmup_steps=1000)) == pytest.approx(13.7, abs=0.1)
    assert invariance_budget(TrainConfig(max_lr=3e-4, warmup_steps=2000)) == pytest.approx(4.1, abs=0.05)
