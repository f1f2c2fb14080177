"""The notes of the model card: variant, freeze and budget of the training."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest

from pipeline.config.post import PostConfig
from pipeline.config.run import RunConfig
from pipeline.config.schedule import invariance_budget
from pipeline.stages.trained import notes


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"g_source": "constant"}, "there is no metric learner"),
        ({"g_start": "identity"}, "Started near plain attention"),
        ({"num_denseA": 0}, "The metric learner has no GLUs (model.num_denseA 0)"),
        (
            {"g_source": "constant", "g_constraint": "low_rank", "g_rank": 3},
            "constrained in training (model.g_constraint low_rank): I + U V^T of rank 3.",
        ),
        ({"g_source": "constant", "g_constraint": "rotary"}, "rotary): commuting with RoPE, which is plain attention"),
    ],
)
def test_the_notes_name_the_variant(tiny: SimpleNamespace, changes: dict[str, str], expected: str) -> None:
    config = RunConfig(
        name="x",
        run_dir="x",
        data={"sources": [{"url": "x.jsonl"}]},
        model=replace(tiny.config, **changes),
        post=PostConfig(),
    )
    assert any(expected in line for line in notes(config, {}))


def test_the_notes_name_the_freeze_and_the_budget_that_was_spent(tiny: SimpleNamespace) -> None:
    data = {"sources": [{"url": "x.jsonl"}]}
    train = {"steps": 100, "warmup_steps": 0, "freeze_g": {"at_step": 40, "become": "parameter"}}
    config = RunConfig(name="x", run_dir="x", data=data, model=tiny.config, train=train)
    text = "\n".join(notes(config, {"step": 90, "invariance_budget": 1.25, "frozen": 41}))
    assert "Trained 90 steps" in text and "weight decay): 1.25." in text
    assert (
        "frozen to its mean over training sequences after step 41 (train.freeze_g) and trained on as a parameter"
        in text
    )
    old = "\n".join(notes(config, {}))  # weights consolidated before checkpoints recorded it
    assert f"weight decay): {invariance_budget(config.train, 40):.2f}." in old and "frozen" not in old
    constant = RunConfig(name="x", run_dir="x", data=data, model=replace(tiny.config, g_source="constant"))
    assert "budget" not in "\n".join(notes(constant, {"invariance_budget": 1.25}))


def test_the_notes_name_whose_g_a_sequence_was_trained_with(tiny: SimpleNamespace) -> None:
    data = {"sources": [{"url": "x.jsonl"}]}

    def text(source: dict, **train: object) -> str:
        return "\n".join(notes(RunConfig(name="x", run_dir="x", data=data, model=tiny.config, train=train), source))

    assert "own G" not in text({})
    assert "the G of the next sequence of the micro batch for each (train.g_from neighbor)" in text(
        {}, g_from="neighbor"
    )
    assert "own G" not in text({}, share_g_below=1e-4)  # never reached
    assert "After step 30, with an order parameter of G below 0.0001, trained with the G of one" in text(
        {"shared": 30}, share_g_below=1e-4
    )


@pytest.mark.parametrize(("part", "what"), [("units", "the metric learner had"), ("norms", "the LayerNorms of")])
def test_the_notes_name_what_the_metric_decay_was_on(tiny: SimpleNamespace, part: str, what: str) -> None:
    train = {"metric_weight_decay": 6.0, "metric_decay_on": part}
    config = RunConfig(name="x", run_dir="x", data={"sources": [{"url": "x"}]}, model=tiny.config, train=train)
    assert any(line.startswith(f"ACCELERATED RECIPE: {what}") for line in notes(config, {}))
