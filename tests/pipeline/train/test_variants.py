"""Training on two real ranks with the metric learner's decay on a part of it, and with a constrained constant G."""

import math

import pytest

from pipeline.config.load import parse_config
from pipeline.errors import ConfigError
from tests.pipeline.train.zero_worker import STEPS

WORKER = "tests.pipeline.train.variants_worker"
STAGES = range(4)
OF_G = [f"invariance/{what}/layer-{layer}" for what in ("rotary_share", "rank_G") for layer in (0, 1)]


@pytest.fixture(scope="module")
def every_stage(start_ranks, tmp_path_factory):
    return start_ranks(WORKER, tmp_path_factory.mktemp("variants"), "0,1,2,3", "fp32")


def losses(points: dict) -> list[float]:
    return [points[str(step)]["train/loss"] for step in sorted(int(s) for s in points)]


def test_a_checkpoint_numbers_moments_in_the_groups_of_its_decay(recipe_runs):
    assert recipe_runs["variants"]["moments"] is True


def test_validation_logs_the_composed_g_also_where_zero_3_shards_it(recipe_runs):
    stage_1, stage_3 = recipe_runs["variants"]["low_rank"]
    assert losses(stage_3) == pytest.approx(losses(stage_1), abs=1e-5)
    for step in ("3", "6"):
        logged = {key: value for key, value in stage_1[step].items() if key.startswith("invariance/")}
        assert sorted(logged) == sorted(OF_G)
        assert {key: stage_3[step][key] for key in OF_G} == pytest.approx(logged, abs=1e-5)
        assert all(logged[key] > 0.9 for key in OF_G[:2])  # still near the identity
    assert not any("layer-" in key for key in stage_1["2"])  # with validations alone


def test_a_learned_g_is_described_and_a_fixed_one_is_not(recipe_runs):
    learned, fixed = recipe_runs["straight"]["6"], recipe_runs["sdpa"]["6"]
    assert all(0 < learned[key] < 1 for key in OF_G[:2]) and all(1 <= learned[key] <= 8 for key in OF_G[2:])
    assert "val/loss_cached" in fixed and not any(key.startswith("invariance/r") for key in fixed)


@pytest.mark.slow
@pytest.mark.parametrize("part", ["norms", "glus", "units"])
@pytest.mark.parametrize("stage", STAGES)
def test_a_run_with_the_decay_on_a_part_resumes_bit_equal(every_stage, part, stage):
    runs = every_stage["decay"][f"{part}-{stage}"]
    assert len(losses(runs["straight"])) == STEPS
    assert losses(runs["resumed"]) == losses(runs["converted"]) == losses(runs["straight"])[3:]


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
def test_parts_are_other_runs_and_equal_ones_at_every_stage(every_stage, stage):
    of = {part: losses(every_stage["decay"][f"{part}-{stage}"]["straight"]) for part in ("norms", "glus", "units")}
    assert len({tuple(seen) for seen in of.values()}) == 3
    for part, seen in of.items():
        assert seen[:4] == pytest.approx(losses(every_stage["decay"][f"{part}-0"]["straight"])[:4], abs=5e-3)


@pytest.mark.slow
@pytest.mark.parametrize("part", ["norms", "glus"])
@pytest.mark.parametrize("stage", STAGES)
def test_another_run_takes_its_checkpoint_with_other_groups(every_stage, part, stage):
    """The first step after it depends on the weights alone, which are the same; moments go by name (test_reshard.py)."""
    runs = every_stage["decay"][f"{part}-{stage}"]
    assert losses(runs["into_units"])[0] == losses(runs["straight"])[3]


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
def test_a_freeze_drops_the_group_with_the_metric_learner(every_stage, stage):
    frozen, resumed = every_stage["frozen"][str(stage)]
    assert losses(resumed) == losses(frozen)[4:] and all(map(math.isfinite, losses(frozen)))
    assert OF_G[0] in frozen["6"]  # G is a parameter from step 3 on


@pytest.mark.slow
@pytest.mark.parametrize("constraint", ["low_rank", "rotary", "nonrotary"])
@pytest.mark.parametrize("stage", STAGES)
def test_a_constrained_g_trains_alike_at_every_stage_and_resumes_bit_equal(every_stage, constraint, stage):
    runs, first = (every_stage["constant"][f"{constraint}-{s}"] for s in (stage, 0))
    assert losses(runs["resumed"]) == losses(runs["straight"])[3:]
    assert losses(runs["straight"]) == pytest.approx(losses(first["straight"]), abs=1e-5)
    share = [runs["straight"]["6"][key] for key in OF_G[:2]]
    assert all(value == pytest.approx(1, abs=1e-6) for value in share) is (constraint == "rotary")


def test_a_constraint_of_a_learned_g_is_refused_by_its_key():
    tree = {
        **{"name": "t", "run_dir": "t", "data": {"sources": [{"url": "x.txt"}]}},
        "model": {"vocab_size": 300, "num_layers": 1, "num_heads": 1, "head_dim": 4, "context_length": 8},
    }
    tree["model"]["g_constraint"] = "rotary"
    with pytest.raises(ConfigError, match="g_constraint: only read with g_source 'constant'"):
        parse_config(tree, where="test")
