"""What training says of document masks, losses by source and phases when it starts."""

from types import SimpleNamespace

import pytest

from pipeline.config.load import parse_config
from pipeline.config.phases import Begin, planned_phases
from pipeline.errors import ConfigError
from pipeline.stages.announced import about_documents, about_phases


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
    lines = about_documents(parse_config(tree, where="test"), SimpleNamespace(sources=stored))
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
