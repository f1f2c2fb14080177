"""Where the phases of a run begin that goes on from a checkpoint."""

import json

import pytest

from pipeline.config.load import parse_config
from pipeline.config.phases import Begin, begin_of, planned_phases

HALVES = ((0.5, {"web": 3, "books": 1}), (1, {"books": 1}))
DRAWN = {"web": 90, "books": 38}


def run(phases=HALVES, **train):
    data = {"sources": [{"url": "x.txt", "name": "web"}, {"url": "y.txt", "name": "books"}], "separate_sources": True}
    if phases is not None:
        data["phases"] = [{"until": until, "weights": weights} for until, weights in phases]
    model = {"vocab_size": 300, "num_layers": 1, "num_heads": 1, "head_dim": 4, "context_length": 8}
    recipe = {"steps": 40, "warmup_steps": 1, "global_batch": 8, "micro_batch": 4, **train}
    return parse_config({"name": "t", "run_dir": "runs/t", "data": data, "model": model, "train": recipe}, where="test")


def saved(config, begin):
    """state.json of a checkpoint at step 16, as it is read back."""
    phases = [phase.recorded() for phase in planned_phases(config, begin)]
    mixture = {"drawn": DRAWN, "begin": vars(begin), "phases": phases}
    return json.loads(json.dumps({"step": 16, "sequences_consumed": 128, "mixture": mixture}))


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"log_every": 7},
        {"phases": ((0.5, {"web": 6, "books": 2}), (1, {"books": 0.1}))},  # the same shares
        {"phases": ((0.25, {"web": 3, "books": 1}), (1, {"books": 1})), "steps": 80},  # the first one ends where it did
    ],
)
def test_the_same_phases_go_on_as_they_began(change):
    for begin in (Begin(), Begin(8, 64, {"web": 40, "books": 24})):
        state = saved(run(), begin)
        if begin == Begin() or "steps" not in change:
            assert begin_of(run(**change), state) == begin


@pytest.mark.parametrize(
    "change",
    [
        {"steps": 60},
        {"global_batch": 16},
        {"batch_warmup": [{"batch": 4, "steps": 20}]},
        {"phases": ((0.4, HALVES[0][1]), HALVES[1])},
        {"phases": (HALVES[0], (1, {"web": 1}))},
        {"phases": HALVES[1:]},
    ],
)
@pytest.mark.parametrize("begin", [Begin(), Begin(8, 64, {"web": 40, "books": 24})])
def test_others_begin_at_the_checkpoint_with_its_counts(change, begin):
    assert begin_of(run(**change), saved(run(), begin)) == Begin(16, 128, DRAWN)


def test_how_long_a_single_phase_is_planned_to_be_decides_nothing():
    assert begin_of(run(HALVES[1:], steps=60), saved(run(HALVES[1:]), Begin())) == Begin()


def test_a_checkpoint_without_counts_is_continued_as_before():
    for state in ({}, {"step": 16, "sequences_consumed": 128}):
        assert begin_of(run(steps=60), state) == Begin()


def test_until_is_a_share_of_all_that_training_draws_before_and_after():
    """16 steps of 8 sequences, then 24 of 16: 512 in all."""
    ends = [phase.end for phase in planned_phases(run(global_batch=16), Begin(16, 128, DRAWN))]
    assert ends == [256, 512]
    assert [phase.end for phase in planned_phases(run(), Begin())] == [160, 320]
