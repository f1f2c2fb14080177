"""Thresholds: judged as they are written, never so loose that passing them means nothing, and named when looser than usual."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from pipeline.bundle.certificate.checks import make_checks
from pipeline.config.post import PostConfig
from pipeline.errors import UserError
from pipeline.post.certificate.build import summary_lines
from pipeline.post.certificate.labels import plain_verdict
from pipeline.post.package.card import model_card
from pldr_model.model import PLDRModel
from tests.helpers.models import failed


def loosened(post: PostConfig, **changes: float) -> PostConfig:
    """Another configuration, checked as one of a file is."""
    return PostConfig(**{**post.model_dump(), **changes})


def test_a_leak_fails_by_itself_even_when_the_deviation_is_allowed(tiny: SimpleNamespace) -> None:
    model = tiny.make_model(gain=1e-4)
    post = loosened(tiny.post, max_relative_deviation_g=1e-2, max_leak_gap=0.1, max_kl=0.1, min_top1_agreement=0.9)
    certificate = tiny.certify(model, tiny.sample_text(model), post=post)
    assert failed(certificate) == {"leak_effect"} and certificate["tier"] == "approximate"
    leak = certificate["measures"]["leak"]
    assert (
        leak["worst_rms"] > 1e-3 and leak["last_token"]["live_rms"] > 1e-4 and leak["last_token"]["cached_max"] == 0.0
    )


def test_a_threshold_that_the_untrained_model_passes_certifies_nothing(
    tiny: SimpleNamespace, certificate: dict[str, Any]
) -> None:
    measures, controls = certificate["measures"], {"untrained": {"relative_deviation_g": 1e-7}}
    checks = make_checks(measures, controls, tiny.post, variant="learned", num_prompts=16, budget=None)
    assert [check.measure for check in checks if not check.passed] == ["negative_control"]
    assert "untrained model passes" in checks[-1].fix


def test_a_value_at_its_threshold_is_judged_as_it_is_written(tiny: SimpleNamespace) -> None:
    """On either side of the threshold by less than the digits that are written: never a contradiction, nor a traceback."""
    model = tiny.make_model(gain=1e-6)
    text = tiny.sample_text(model)
    value = tiny.certify(model, text)["measures"]["relative_deviation_g"]
    for factor in (1 - 1e-10, 1.0, 1 + 1e-10):
        certificate = tiny.certify(model, text, post=loosened(tiny.post, max_relative_deviation_g=value * factor))
        assert "relative_deviation_g" not in failed(certificate)  # equal as written
    assert "relative_deviation_g" in failed(
        tiny.certify(model, text, post=loosened(tiny.post, max_relative_deviation_g=value * (1 - 1e-7)))
    )
    for value, threshold, bound in ((1.0000000001e-5, 1e-5, "<="), (0.9989999999999, 0.999, ">=")):
        losses = {"cached": value, "block": 0.0} if bound == "<=" else {}
        measures = {"relative_deviation_g": None, "not_finite": [], "losses": losses, "leak": {}}
        measures |= {"agreement": {"cached": {"top1": value}}, "greedy": {}}
        post = PostConfig(max_leak_gap=threshold) if bound == "<=" else PostConfig(min_top1_agreement=threshold)
        checks = make_checks(measures, {}, post, variant="learned", num_prompts=100, budget=None)
        check = next(c for c in checks if c.measure == ("cache_gap" if bound == "<=" else "top1_agreement"))
        assert check.passed and check.value == check.threshold == threshold


@pytest.mark.parametrize(
    "changes",
    [
        {"max_relative_deviation_g": 0.05},
        {"variant_above": 10.0},
        {"variant_above": 1e-3, "max_relative_deviation_g": 5e-3},
        {"min_attention_effect": 0.0},
        {"max_kl": 1e9},
        {"min_top1_agreement": 0.0},
        {"prompts": 8},
    ],
)
def test_thresholds_that_would_certify_anything_are_refused(
    tiny: SimpleNamespace, invariant: PLDRModel, text: torch.Tensor, changes: dict[str, float]
) -> None:
    with pytest.raises(ValidationError, match=next(iter(changes))):
        PostConfig(**{**tiny.post.model_dump(), **changes})
    with pytest.raises(UserError, match="not a valid certificate") as caught:
        tiny.certify(invariant, text, post=tiny.post.model_copy(update=changes))
    assert "\n" not in str(caught.value)


def test_thresholds_looser_than_the_defaults_are_named_with_them(tiny: SimpleNamespace) -> None:
    model = tiny.make_model(gain=1e-6)
    text = tiny.sample_text(model, count=100)
    usual = PostConfig(prompts=100, generate_tokens=256)
    post = loosened(usual, max_relative_deviation_g=1e-3, max_leak_effect=1e-3, fp64_prompts=2, max_kl=1e-6)
    certificate = tiny.certify(model, text, post=post)
    assert certificate["verdict"] == "certified", summary_lines(certificate)
    loose = (
        "max_relative_deviation_g 0.001 (default 1e-05), max_leak_effect 0.001 (default 0.0001), "
        "fp64_prompts 2 (default 16)"
    )
    assert certificate["statement"].endswith(f"attention is alive; thresholds looser than the defaults: {loose}")
    why = plain_verdict(certificate)["why"]
    assert loose in why and "the outputs stay the same" not in why
    assert loose in model_card(certificate, model.config, certified=True, lineage={}, notes=())
    strict = tiny.certify(tiny.make_model(), text, post=loosened(usual, max_kl=1e-6))
    assert strict["statement"].endswith("attention is alive")
    assert "the outputs stay the same" in plain_verdict(strict)["why"]
    strict["measures"]["greedy"]["identical"] = 0.75  # which a rate per decision of 0.999 allows
    why = plain_verdict(strict)["why"]
    assert "25% of 16 greedy texts differ from some token on" in why and "the outputs stay" not in why
