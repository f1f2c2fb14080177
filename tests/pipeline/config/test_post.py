"""The thresholds of `post`: none can be so loose that passing it means nothing, and the message names the key."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from pipeline.bundle.certificate.verdict import TODAY
from pipeline.config.load import parse_config
from pipeline.config.post import PostConfig
from pipeline.errors import ConfigError

# Every threshold, and the loosest value that it may have.
LOOSEST = {
    **{"variant_above": 1e-2, "approximate_above": 1e-5, "invariant_above": 1e-6, "max_relative_deviation_g": 1e-2},
    **{"max_relative_deviation_g_fp32": 1e-3, "max_query_deviation": 1e-3, "max_worst_row_deviation": 1e-3},
    **{"max_leak_gap": 0.1, "max_leak_effect": 0.1, "max_kl": 0.1, "min_prompts": 2, "min_attention_effect": 0.01},
    **{"min_top1_agreement": 0.9},
}
OF_A_BUNDLE = {"max_format_loss": 0.1}
TREE = {
    **{"name": "t", "run_dir": "runs/t", "data": {"sources": [{"url": "x.txt"}]}},
    "model": {"vocab_size": 300, "num_layers": 1, "num_heads": 1, "head_dim": 4, "context_length": 8},
}


def test_every_threshold_has_a_floor_or_a_cap() -> None:
    assert set(LOOSEST) == set(TODAY.thresholds)
    for name, value in {**LOOSEST, **OF_A_BUNDLE}.items():
        assert getattr(PostConfig(**{name: value}), name) == value
        default = PostConfig.model_fields[name].default
        worse = value - 1 if name == "min_prompts" else value * 0.99 if value < default else value * 1.01
        with pytest.raises(ValidationError, match=name):
            PostConfig(**{name: worse})


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *(("min_attention_effect", value) for value in (1e-12, 0.0, -1.0, float("nan"))),
        *(("max_format_loss", value) for value in (1e9, 0.11, -0.1, float("inf"))),
        *(("max_worst_row_deviation", value) for value in (0.0, 1.0)),
        ("max_query_deviation", 1.0),
        ("max_relative_deviation_g_fp32", 0.1),
        ("max_relative_deviation_g", 0.05),
        ("variant_above", 10.0),
        ("max_kl", 1e9),
        ("min_top1_agreement", 0.0),
        ("prompts", 8),
        *(("max_key_loss", value) for value in (1e9, 0.11, -0.1)),
        ("key_rank", {}),
        ("key_rank", {"energy": 1e-3, "max_loss": 1e-4}),
        ("key_rank", {"energy": 0.0}),
        ("key_rank", {"max_loss": 0.2}),
        ("key_rank", {"ranks": 0}),
        ("key_rank", {"ranks": 5}),
        ("key_rank", {"ranks": [[4], [4]]}),
        ("key_rank", {"ranks": True}),
        ("key_rank", {"ranks": 2, "multiple": 8}),
        *((key, 0) for key in ("fp64_prompts", "effect_prompts", "generate_tokens", "generate_prompts")),
        ("extra_prompts", {"Code": "x.txt"}),
        ("extra_prompts", {"a b": "x.txt"}),
        ("extra_prompts", {"a": 3}),
        ("prove", "perhaps"),
        ("order_parameter", 2),
    ],
)
def test_what_would_mean_nothing_is_refused_in_one_line_that_names_the_key(key: str, value: Any) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_config({**TREE, "post": {key: value}}, where="test.yaml")
    message = str(caught.value)
    assert ("\n" not in message and f"post.{key}" in message) or key in message


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (8, "post.key_rank: must be a section (got 8); its keys: energy, max_loss, ranks, multiple, groups"),
        ({"ranks": [8, 8]}, "post.key_rank.ranks: give one integer for all heads, or one for each, [layers][heads]"),
        ({"ranks": 8.5}, "post.key_rank.ranks: give one integer for all heads, or one for each, [layers][heads]"),
    ],
)
def test_ranks_of_a_wrong_form_are_told_the_right_one(given: Any, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_config({**TREE, "post": {"key_rank": given}}, where="test.yaml")
    assert message in str(caught.value) and "valid" not in str(caught.value)


def test_the_tiers_are_in_order() -> None:
    for changes in ({"variant_above": 1e-3, "max_relative_deviation_g": 5e-3}, {"approximate_above": 1e-7}):
        with pytest.raises(ValidationError, match=next(iter(changes))):
            PostConfig(**changes)


def test_settings_with_which_less_is_tried_are_known_as_such() -> None:
    """They are named in the statement when they are lower than usual."""
    assert TODAY.less == ("fp64_prompts", "generate_tokens", "generate_prompts", "effect_prompts")
