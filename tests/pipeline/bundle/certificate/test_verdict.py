"""Checks and tier: judged as they are written, each failing by itself, named when looser than usual."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from pipeline.bundle.certificate.checks import make_checks
from pipeline.config.post import PostConfig
from pipeline.errors import UserError
from pipeline.post.certificate.build import summary_lines
from pipeline.post.certificate.labels import plain_verdict
from pipeline.post.package.card import model_card
from pldr_model.config import ModelConfig
from tests.helpers.evidence import MODEL, evidence, judged_by_hand, varying
from tests.helpers.models import failed

OPEN = {  # a proof that did not close
    **{
        "measures.proof.closed": False,
        "measures.proof.bound": None,
        "measures.proof.per_head": [[None, 0.1], [0.2, 0.1]],
    },
    "measures.proof.reason": "layer 0: 2 of 8 residual units still give every row",
}


def loosened(post: PostConfig, **changes: float) -> PostConfig:
    """Another configuration, checked as one of a file is."""
    return PostConfig(**{**post.model_dump(), **changes})


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, set()),
        ({"prompts.distinct": 99}, {"held_out_prompts"}),
        ({"measures.coverage.seen": 46}, {"ids_covered"}),
        ({"measures.not_finite": ["logits of id 17 ('▁x')"]}, {"not_finite"}),
        (varying(2e-5), {"relative_deviation_g"}),
        (varying(2e-5, fp64=1e-6), set()),  # a head whose terms cancel deviates in fp32 only
        (varying(2e-4, fp64=1e-6), {"relative_deviation_g_fp32"}),
        ({"measures.cached_g_deviation": 2e-5}, {"cached_g_deviation"}),
        ({"measures.query_deviation.max": 2e-3}, {"query_deviation_g"}),
        ({"measures.worst_row.max": 2e-4}, {"worst_row_deviation"}),
        ({"measures.worst_row.max": None}, {"worst_row_deviation"}),
        ({"measures.losses.zero": 5.04}, {"attention_effect_zero"}),
        ({"measures.losses.identity": 5.04}, {"attention_effect_identity"}),
        ({"measures.losses.plain": 5.0}, set()),  # recorded: a model may be plain attention
        ({"measures.losses.other": 5.002}, {"leak_gap"}),
        ({"measures.leak.worst_rms": 2e-4}, {"leak_effect"}),
        ({"measures.losses.random_tokens": 5.002}, {"random_tokens_gap"}),
        ({"measures.agreement.cached.kl": 2e-4}, {"kl"}),
        ({"measures.agreement.short.kl": 2e-4}, {"kl_short"}),
        ({"measures.agreement.cached.top1": 0.99}, {"top1_agreement"}),
        ({"measures.agreement.short.top1": 0.99}, {"top1_agreement_short"}),
        ({"measures.agreement": {}}, {"kl", "kl_short", "top1_agreement", "top1_agreement_short"}),
        ({"measures.greedy.per_decision": 0.99}, {"greedy_agreement"}),
        ({"controls.untrained.relative_deviation_g": 1e-7}, {"negative_control"}),
    ],
)
def test_each_check_fails_by_itself(changes: dict[str, Any], expected: set[str]) -> None:
    certificate = judged_by_hand(changes=changes)
    assert failed(certificate) == expected
    assert certificate["verdict"] == ("failed" if expected else "certified")
    for name in expected:
        assert any(line.startswith(f"  FAIL  {name} ") for line in summary_lines(certificate))
        assert name in certificate["statement"]


def test_every_failure_names_a_fix() -> None:
    changes = {"prompts.distinct": 9, "measures.coverage.seen": 1, "measures.worst_row.max": 1.0, **varying(0.3)}
    changes |= {"measures.query_deviation.max": 1.0, "measures.losses": dict.fromkeys(evidence()["measures"]["losses"])}
    certificate = judged_by_hand(changes=changes)
    assert len(certificate["failed"]) > 10 and all(failure["fix"] for failure in certificate["failed"])


@pytest.mark.parametrize(
    ("deviation", "changes", "tier"),
    [
        (0.3, {}, "variant"),
        (2e-5, {}, "approximate"),
        (2e-6, OPEN, "invariant"),
        (5e-7, OPEN, "at round-off"),
        (5e-7, {}, "proven"),
        (5e-7, {"measures.proof.closed": False}, "at round-off"),
        (5e-7, {"measures.proof.bound": 2e-4}, "at round-off"),  # a bound, but not below max_worst_row_deviation
        (5e-7, {"measures.proof.bound": None}, "at round-off"),
        (5e-7, {"measures.not_finite": ["weight x"]}, "at round-off"),
        (2e-5, {"measures.proof.bound": 5e-5}, "approximate"),  # a bound does not hide what was measured
        (5e-7, {"model.g_source": "constant"}, "constant by construction"),
    ],
)
def test_the_tier_is_by_fp64_and_by_the_proof(deviation: float, changes: dict[str, Any], tier: str) -> None:
    certificate = judged_by_hand(changes={**varying(0.5, fp64=deviation), **changes})
    assert certificate["tier"] == tier
    found = certificate["precision"]["fp32"]["tier"]
    assert found == ("variant" if tier != "constant by construction" else tier)


def test_what_explains_the_rest_is_named_first() -> None:
    many = [*(f"logits of 16 prompts {kind}" for kind in "abcd"), "A_P, layer 1, head 0, prompts text", "weight w"]
    fix = judged_by_hand(changes={"measures.not_finite": [*many, "logits of id 17 ('▁x')"]})["failed"][0]["fix"]
    assert fix.startswith("NaN or infinity in logits of id 17 ('▁x'); weight w; A_P, layer 1, head 0, prompts text: ")


def test_what_is_constant_by_construction_needs_no_search() -> None:
    changes = {
        "model.g_source": "constant",
        "controls.untrained": None,
        "measures.effects.per_layer.identity": [0.0, 0.0],
    }
    changes |= {f"measures.{name}": {} for name in ("worst_row", "proof", "query_deviation")}
    certificate = judged_by_hand(changes=changes)
    assert certificate["verdict"] == "certified" and certificate["tier"] == "constant by construction"
    skipped = [check["measure"] for check in certificate["checks"] if check["skipped"]]
    assert skipped == ["query_deviation_g", "worst_row_deviation", "attention_effect_identity", "negative_control"]
    assert "  skip  query_deviation_g, worst_row_deviation: G_LM is constant" in "\n".join(summary_lines(certificate))


def test_a_threshold_that_the_untrained_model_passes_certifies_nothing() -> None:
    measures, controls = evidence()["measures"], {"untrained": {"relative_deviation_g": 1e-7}}
    checks = make_checks(measures, controls, PostConfig(), variant="learned", num_prompts=128, budget=None)
    assert [check.measure for check in checks if not check.passed] == ["negative_control"]
    assert "untrained model passes" in checks[-1].fix


def test_a_value_at_its_threshold_is_judged_as_it_is_written() -> None:
    """On either side of the threshold by less than the digits that are written: never a contradiction, nor a traceback."""
    for value, threshold, bound in ((1.0000000001e-5, 1e-5, "<="), (0.9989999999999, 0.999, ">=")):
        losses = {"cached": value, "block": 0.0} if bound == "<=" else {}
        measures = {"relative_deviation_g": None, "not_finite": [], "losses": losses, "leak": {}}
        measures |= {"agreement": {"cached": {"top1": value}}, "greedy": {}}
        post = PostConfig(max_leak_gap=threshold) if bound == "<=" else PostConfig(min_top1_agreement=threshold)
        checks = make_checks(measures, {}, post, variant="learned", num_prompts=100, budget=None)
        check = next(c for c in checks if c.measure == ("cache_gap" if bound == "<=" else "top1_agreement"))
        assert check.passed and check.value == check.threshold == threshold


def test_a_measured_value_at_its_threshold_is_no_contradiction(tiny: SimpleNamespace) -> None:
    model = tiny.make_model(gain=1e-6)
    text = tiny.sample_text(model)
    value = tiny.certify(model, text)["measures"]["relative_deviation_g"]
    for factor in (1 - 1e-10, 1.0, 1 + 1e-10):
        certificate = tiny.certify(model, text, post=loosened(tiny.post, max_relative_deviation_g=value * factor))
        assert "relative_deviation_g" not in failed(certificate)  # equal as written
    assert "relative_deviation_g" in failed(
        tiny.certify(model, text, post=loosened(tiny.post, max_relative_deviation_g=value * (1 - 1e-7)))
    )


def test_a_leak_fails_by_itself_even_when_the_deviation_is_allowed(tiny: SimpleNamespace) -> None:
    model = tiny.make_model(gain=1e-4)
    loose = {"max_relative_deviation_g": 1e-2, "max_relative_deviation_g_fp32": 1e-3, "max_query_deviation": 1e-3}
    loose |= {"max_worst_row_deviation": 1e-3, "max_leak_gap": 0.1, "max_kl": 0.1, "min_top1_agreement": 0.9}
    certificate = tiny.certify(model, tiny.sample_text(model), post=loosened(tiny.post, **loose))
    assert "leak_effect" in failed(certificate) and "leak_gap" not in failed(certificate)
    assert certificate["tier"] == "approximate"
    leak = certificate["measures"]["leak"]
    assert (
        leak["worst_rms"] > 1e-3 and leak["last_token"]["live_rms"] > 1e-4 and leak["last_token"]["cached_max"] == 0.0
    )


def test_the_writer_refuses_thresholds_that_would_certify_anything(
    tiny: SimpleNamespace, invariant: Any, text: Any
) -> None:
    for changes in ({"max_kl": 1e9}, {"min_attention_effect": 0.0}):
        with pytest.raises(UserError, match="not a valid certificate") as caught:
            tiny.certify(invariant, text, post=tiny.post.model_copy(update=changes))
        assert "\n" not in str(caught.value)


def test_thresholds_looser_than_the_defaults_are_named_with_them() -> None:
    post = loosened(PostConfig(), max_relative_deviation_g=1e-3, max_leak_effect=1e-3, max_worst_row_deviation=5e-4)
    post = loosened(post, max_query_deviation=5e-4, fp64_prompts=2, effect_prompts=4, max_kl=1e-6)
    certificate = judged_by_hand(post)
    assert certificate["verdict"] == "certified", summary_lines(certificate)
    loose = (
        "max_relative_deviation_g 0.001 (default 1e-05), max_query_deviation 0.0005 (default 0.0001), "
        "max_worst_row_deviation 0.0005 (default 0.0001), max_leak_effect 0.001 (default 0.0001), "
        "fp64_prompts 2 (default 16), effect_prompts 4 (default 16)"
    )
    assert certificate["statement"].endswith(f". Thresholds looser than the defaults: {loose}")
    why = plain_verdict(certificate)["why"]
    assert loose in why and "the outputs stay the same" not in why
    config = ModelConfig(**MODEL.to_dict())
    assert loose in model_card(certificate, config, certified=True, lineage={}, notes=())
    strict = judged_by_hand(loosened(PostConfig(), max_kl=1e-6))
    assert "looser" not in strict["statement"]
    assert "the outputs stay the same" in plain_verdict(strict)["why"]
    strict["measures"]["greedy"]["identical"] = 0.75  # which a rate per decision of 0.999 allows
    why = plain_verdict(strict)["why"]
    assert "25% of 16 greedy texts differ from some token on" in why and "the outputs stay" not in why


def test_the_summary_fits_a_terminal() -> None:
    lines = summary_lines(judged_by_hand())
    assert lines[0].startswith("certificate: CERTIFIED - G_LM may be cached: for every input of any length")
    assert len(lines) <= 15 and all(len(line) <= 300 for line in lines)
    shown = "\n".join(lines)
    for check in judged_by_hand()["checks"]:
        assert f"{check['measure']} " in shown
