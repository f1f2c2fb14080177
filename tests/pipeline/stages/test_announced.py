"""What training says of document masks, losses by source and phases when it starts."""

from types import SimpleNamespace

import pytest

from pipeline.config.load import load_config, parse_config
from pipeline.config.phases import Begin, planned_phases
from pipeline.config.plan import plan, plan_lines
from pipeline.errors import ConfigError
from pipeline.stages.announced import about_phases, about_recipe
from pipeline.stages.preflight import preflight


@pytest.mark.parametrize(
    ("masks", "source", "stored", "said"),
    [
        (True, "learned", ("a", "b"), ["a learned G_LM sums over all documents of a sequence"]),
        (True, "constant", ("a", "b"), []),
        (False, "learned", ("a", "b"), []),
        (
            False,
            "learned",
            (),
            ["val/loss/SOURCE is not logged: these tokens are of a single source, or were made without it"],
        ),
    ],
)
def test_what_masks_and_sources_do_not_do_is_said(masks, source, stored, said):
    sizes = {"vocab_size": 300, "num_layers": 1, "num_heads": 1, "head_dim": 4, "context_length": 8}
    tree = {
        "name": "t",
        "run_dir": "runs/t",
        "data": {"sources": ["x.txt"]},
        "tokens": {"boundaries": True, "sources": True},
        "model": {**sizes, "g_source": source},
        "train": {"document_masks": masks},
    }
    lines = about_recipe(parse_config(tree, where="test"), SimpleNamespace(sources=stored))
    assert len(lines) == len(said) and all(text in line for text, line in zip(said, lines, strict=True))


def with_phases(steps: int, web: float, **train):
    data = {"sources": [{"url": "x.txt", "name": "web"}, {"url": "y.txt", "name": "books"}], "separate_sources": True}
    phases = [{"until": 0.5, "weights": {"web": web}}, {"until": 1, "weights": {"books": 1}}]
    recipe = {"steps": steps, "warmup_steps": 1, **train}
    model = {"vocab_size": 300, "num_layers": 1, "num_heads": 1, "head_dim": 4, "context_length": 8}
    tree = {"name": "t", "run_dir": "runs/t", "data": {**data, "phases": phases}, "model": model, "train": recipe}
    return parse_config(tree, where="test")


def test_that_phases_are_counted_anew_is_said_where_a_checkpoint_has_no_counts():
    state = {"config": with_phases(40, 3.0).as_dict()}
    assert about_phases(with_phases(40, 3.0, log_every=7), state) == []
    for other in (with_phases(25, 3.0), with_phases(40, 2.0)):
        assert "may be drawn again" in about_phases(other, state)[0]


def test_where_other_phases_begin_and_what_was_drawn_before_is_said():
    config = with_phases(40, 3.0)
    phases = [phase.recorded() for phase in planned_phases(config, Begin())]
    mixture = {"drawn": {"web": 1200, "books": 80}, "begin": vars(Begin()), "phases": phases}
    state = {"config": config.as_dict(), "step": 32, "sequences_consumed": 1280, "mixture": mixture}
    assert about_phases(with_phases(40, 3.0, log_every=7), state) == []
    [line] = about_phases(with_phases(60, 3.0), state)
    assert line == (
        "phases      those of this run decide from step 32 on, in phase 2 of 2 (sequence 1,280 of 2,176); drawn before: "
        "web 1,200, books 80"
    )
    none = config.model_copy(update={"data": config.data.model_copy(update={"phases": None})})
    assert "this run has none" in about_phases(none, state)[0]
    assert about_phases(none, {"config": none.as_dict()}) == []
    assert "does not say how many" in about_phases(config, {"config": none.as_dict()})[0]


def test_weights_too_small_for_exact_shares_are_refused():
    with pytest.raises(ConfigError, match="a weight below 1e-6: write parts"):
        with_phases(40, 1e-12)


@pytest.mark.parametrize(
    ("precision", "stage", "optimizer", "said"),
    [
        ("bf16", 0, "adamw", "use train.zero_stage=1"),
        ("bf16", 0, "muon", "Muon has no other stage"),
        ("bf16", 1, "adamw", None),
        ("fp32", 0, "muon", None),
    ],
)
def test_what_bf16_does_at_stage_0_is_said(precision, stage, optimizer, said):
    config = with_phases(40, 3.0, precision=precision, zero_stage=stage, optimizer=optimizer)
    lines = about_recipe(config, SimpleNamespace(sources=()))
    assert [line.rpartition("; ")[2] for line in lines] == ([] if said is None else [said])


@pytest.mark.parametrize("micro_batch", [2, 3, 4])
@pytest.mark.parametrize("g_from", ["own", "batch", "neighbor"])
def test_where_g_comes_back_to_its_sequence_is_said_by_train_plan_and_check(g_from, micro_batch, make_run, tmp_path):
    """In a model of two layers (tests/pldr_model/test_g_from.py sees the leak with 2 sequences, and none with 3)."""
    recipe = {"global_batch": 12, "micro_batch": micro_batch, "ranks": 1, "g_from": g_from}
    config = load_config(make_run(tmp_path, **recipe))
    assert config.model.num_layers == 2
    lines = [
        *about_recipe(config, SimpleNamespace(sources=())),
        *(line for line in plan_lines(plan(config)) if "warning" in line),
        *(f"warning             {found.text}" for found in preflight(config) if found.about == "g_from"),
    ]
    if (g_from, micro_batch) != ("neighbor", 2):
        assert lines == []
        return
    assert [line.partition("train.g_from neighbor: ")[0].strip() for line in lines] == ["warning"] * 3
    assert all("G goes around 2 sequences in 2 layers" in line for line in lines)
    assert all("set train.micro_batch above model.num_layers, 3 or more" in line for line in lines)
