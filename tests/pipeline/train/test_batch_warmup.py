"""`train.batch_warmup` on two real ranks: global batches that grow, against plain PyTorch; resumes, rollbacks, other ranks."""

from pathlib import Path

import numpy as np
import pytest
import torch

from pipeline.config.batches import batch_at, batch_sizes, planned_sequences, stretches
from pipeline.config.load import parse_config
from pipeline.config.schedule import learning_rate
from pipeline.config.train import TrainConfig
from pipeline.errors import ConfigError
from pipeline.train.deepspeed_config import accumulation_steps
from pipeline.train.freeze import num_batches
from pipeline.train.optim import build_optimizer
from pldr_model.loss import total_loss
from pldr_model.model import PLDRModel
from tests.helpers.recipe_runs import RECIPE_WORKER
from tests.pipeline.train.recipe_worker import growing

SIZES = [4, 4, 4, 8, 16, 16]


def losses(points: dict) -> list[float]:
    return [points[str(step)]["train/loss"] for step in sorted(int(s) for s in points)]


def plain_pytorch(sizes: list[int]) -> list[float]:
    """The mean over each global batch, clipped, AdamW, on one process without DeepSpeed."""
    config = growing(Path("/unused"), 1)
    torch.manual_seed(config.seed)
    model = PLDRModel(config.model)
    optimizer = build_optimizer(model, config.train)
    seen, position = [], 0
    for step, size in enumerate(sizes):
        ids = torch.from_numpy(np.random.default_rng(position).integers(4, 67, size=(size, 17)))
        loss = total_loss(model(ids[:, :-1], targets=ids[:, 1:]), config.model).total
        optimizer.zero_grad()
        loss.backward()
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(config.train, step)
        optimizer.step()
        seen.append(loss.item())
        position += size
    return seen


def check(run: dict, limit: float = 2e-5) -> None:
    """The losses after each step of another size are those of the gradients of its complete batch."""
    seen, reference = losses(run["straight"]), plain_pytorch(SIZES)
    assert seen == pytest.approx(reference, abs=limit)
    assert losses(run["resumed"]) == seen[2:]
    assert run["state"] == {"sequences_consumed": 52, "tokens_consumed": 52 * 16, "sequences_left_out": 0}
    assert run["samples"] == 52
    assert run["straight"]["6"]["data/epoch"] == 0.52


def test_a_growing_batch_trains_like_plain_pytorch_and_resumes_bit_equal_from_within(recipe_runs):
    check(recipe_runs["growing"])


def test_the_comparison_would_notice_a_step_that_ends_after_another_number_of_micro_batches():
    """What DeepSpeed's count would do, if it were not begun anew: the fourth step ends after its first micro batch."""
    config = growing(Path("/unused"), 1)
    torch.manual_seed(config.seed)
    model, reference = PLDRModel(config.model), plain_pytorch(SIZES)
    optimizer = build_optimizer(model, config.train)
    seen, position = [], 0
    for step, size in enumerate(SIZES):
        ids = torch.from_numpy(np.random.default_rng(position).integers(4, 67, size=(size, 17)))
        seen.append(total_loss(model(ids[:, :-1], targets=ids[:, 1:]), config.model).total.item())
        used = ids[:4] if step == 3 else ids
        optimizer.zero_grad()
        total_loss(model(used[:, :-1], targets=used[:, 1:]), config.model).total.backward()
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(config.train, step)
        optimizer.step()
        position += size
    assert max(abs(a - b) for a, b in zip(seen, reference, strict=True)) > 2e-4


@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, 2, 3])
def test_at_every_zero_stage(more_recipe_runs, stage):
    check(more_recipe_runs["growing"][str(stage)])


@pytest.fixture(scope="module")
def offloaded(start_ranks, tmp_path_factory):
    return start_ranks(RECIPE_WORKER, tmp_path_factory.mktemp("offloaded"), "offloaded", "fp32")


@pytest.mark.slow
@pytest.mark.parametrize("how", ["2-optimizer", "3-optimizer", "3-parameters"])
def test_with_states_in_cpu_memory(offloaded, how):
    check(offloaded[how])


@pytest.mark.slow
def test_in_bf16(start_ranks, tmp_path):
    """Losses are off by a rounding of bf16; a batch that ended early would be off by more."""
    for run in start_ranks(RECIPE_WORKER, tmp_path, "rounded", "bf16").values():
        check(run, limit=1e-2)


@pytest.mark.slow
def test_a_rollback_trains_the_repeated_steps_on_batches_of_their_size(more_recipe_runs):
    """Three steps, back to step 2, and steps 3 to 6 again."""
    back = more_recipe_runs["grown_back"]
    assert back["sizes"] == [4, 4, 4, *SIZES[2:]]
    assert back["consumed"] == sum(back["sizes"]) and back["left_out"] == 4


@pytest.mark.slow
def test_it_resumes_on_another_number_of_ranks(recipe_runs, recipe_runs_on_one_rank):
    seen = losses(recipe_runs["growing"]["straight"])[2:]
    assert losses(recipe_runs_on_one_rank["growing"]) == pytest.approx(seen, abs=2e-5)


WARMUP = [{"batch": 8, "steps": 10}, {"batch": 16, "steps": 5}]
TRAIN = TrainConfig(steps=20, warmup_steps=2, global_batch=32, micro_batch=4, batch_warmup=WARMUP)


def test_the_sizes_follow_from_the_step():
    sizes = [batch_at(TRAIN, step) for step in range(20)]
    assert sizes == [8] * 10 + [16] * 5 + [32] * 5 and batch_sizes(TRAIN) == [8, 16, 32]
    for step in range(20):
        assert planned_sequences(TRAIN, from_step=step) == sum(sizes[step:])
        assert [size for size, steps in stretches(TRAIN, step) for _ in range(steps)] == sizes[step:]
    usual = TRAIN.model_copy(update={"batch_warmup": None})
    assert planned_sequences(usual) == 640 and list(stretches(usual, 3)) == [(32, 17)]


@pytest.mark.parametrize(("step", "batches"), [(0, 10 + 2), (9, 1 + 5 + 1), (18, 4), (30, 4)])
def test_a_freeze_takes_its_mean_over_as_many_sequences_as_without(step, batches):
    rule = {"at_step": 1, "sequences": 100}
    train = TrainConfig(**{**TRAIN.model_dump(), "freeze_g": rule})
    assert num_batches(train, step) == batches
    assert num_batches(train.model_copy(update={"batch_warmup": None}), step) == 4


@pytest.mark.parametrize(
    ("warmup", "message"),
    [
        ([{"batch": 32, "steps": 1}], "must grow"),
        ([{"batch": 16, "steps": 1}, {"batch": 8, "steps": 1}], "must grow"),
        ([{"batch": 6, "steps": 1}], "batch 6 is not a multiple of micro_batch 4"),
        ([{"batch": 8, "steps": 20}], "its 20 steps must be fewer than steps 20"),
        ([], "at least 1"),
    ],
)
def test_sizes_that_make_no_sense_are_one_line(warmup, message):
    tree = growing(Path("/unused"), 1).as_dict()
    tree["train"] |= {"steps": 20, "global_batch": 32, "micro_batch": 4, "batch_warmup": warmup}
    with pytest.raises(ConfigError, match=message):
        parse_config(tree, where="test")


def test_ranks_that_a_small_batch_does_not_divide_are_one_line():
    assert accumulation_steps(TRAIN, 2) == 4
    with pytest.raises(ConfigError, match=r"train.batch_warmup: batch 8 is not a multiple of micro_batch 4 x 4 ranks"):
        accumulation_steps(TRAIN, 4)


def test_what_ranks_could_not_agree_on_is_one_line():
    tree = growing(Path("/unused"), 1).as_dict()
    tree["train"]["on_spike"], tree["data"]["on_bad_shard"] = "rollback", "skip"
    with pytest.raises(ConfigError, match="train.batch_warmup: .*change one of the three"):
        parse_config(tree, where="test")
