"""Known answers: each way of being wrong fails with its own reason, and only what is right passes."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from pipeline.bundle.certificate.checks import Check, tier_of
from pipeline.bundle.format import bundle_tensors
from pipeline.config.post import PostConfig
from pipeline.errors import UserError
from pipeline.io.tensors import sha256_tensors
from pipeline.post.certificate.build import summary_lines
from pipeline.post.extract import extract_g
from pipeline.post.measure.prompts import make_kinds, sha256_kinds
from pipeline.post.validate import validate
from pldr_model.model import PLDRModel
from tests.helpers.models import failed


def test_an_invariant_model_is_certified(certificate: dict[str, Any], invariant: PLDRModel) -> None:
    assert certificate["verdict"] == "certified" and certificate["failed"] == []
    assert certificate["tier"] == "proven"
    assert certificate["precision"]["fp64"]["tier"] == "at round-off"
    assert certificate["controls"]["untrained"]["relative_deviation_g"] > 1e-2
    assert certificate["measures"]["losses"]["zero"] > certificate["measures"]["losses"]["cached"] + 0.05
    assert certificate["measures"]["row_variance_ratio_A"]["high"] == [[0.0, 0.0], [0.0, 0.0]]
    software = certificate["software"]
    assert software["threads"] == "1" and software["device"].startswith("cpu") and "cuda" in software
    assert certificate["files"]["model.safetensors"] == sha256_tensors(bundle_tensors(invariant))
    assert {check["measure"] for check in certificate["checks"]} >= {"relative_deviation_g", "leak_effect", "kl"}
    for tensor in ("A", "A_LM", "A_P", "G_LM"):
        measured = certificate["measures"]["deviations"]["fp64"][tensor]
        assert torch.tensor(measured["per_head"]).shape == (2, 2) and measured["max"] <= 1e-9
    assert set(certificate["prompts"]["kinds"]) >= {"text", "text_15", "text_7", "text_1", "random", "repeated"}


def test_a_certificate_is_plain_finite_json_and_the_same_every_time(
    tiny: SimpleNamespace, certificate: dict[str, Any], invariant: PLDRModel, text: torch.Tensor
) -> None:
    written = json.dumps(certificate, allow_nan=False, sort_keys=True)
    torch.manual_seed(99)  # whatever state the process is in
    again = tiny.certify(invariant, text, lineage=tiny.lineage, budget=9.5)
    assert json.dumps(again, allow_nan=False, sort_keys=True) == written
    assert "certificate: CERTIFIED" in summary_lines(certificate)[0]


def test_a_variant_model_fails_and_the_fix_names_the_budget(tiny: SimpleNamespace) -> None:
    model = tiny.make_model(gain=1.0)
    certificate = tiny.certify(model, tiny.sample_text(model), budget=0.16)
    assert certificate["verdict"] == "failed" and certificate["tier"] == "variant"
    assert {"relative_deviation_g", "leak_effect", "cache_gap", "kl", "top1_agreement"} <= failed(certificate)
    fix = next(f["fix"] for f in certificate["failed"] if f["measure"] == "relative_deviation_g")
    assert "0.16" in fix and "metric_weight_decay" in fix
    assert any(line.startswith("  FAIL  relative_deviation_g") for line in summary_lines(certificate))


def test_an_untrained_model_fails(tiny: SimpleNamespace) -> None:
    torch.manual_seed(1)
    model = PLDRModel(tiny.config).eval()
    certificate = tiny.certify(model, torch.randint(4, tiny.config.vocab_size, (8, 33)))
    assert "relative_deviation_g" in failed(certificate)
    assert certificate["measures"]["row_variance_ratio_A"]["mean"][0][0] > 0.5


def test_dead_attention_fails_although_everything_agrees(tiny: SimpleNamespace, invariant: PLDRModel) -> None:
    model = tiny.make_model()
    with torch.no_grad():
        for layer in model.layers:
            layer.attention.output.weight.zero_()
    certificate = tiny.certify(model, tiny.sample_text(model))
    assert failed(certificate) == {"attention_effect_zero", "attention_effect_identity"}
    assert "attention is dead" in certificate["failed"][0]["fix"]


@pytest.mark.parametrize(("layer", "head"), [(0, 1), (1, 0)])
def test_a_single_varying_head_is_found(tiny: SimpleNamespace, layer: int, head: int) -> None:
    model = tiny.make_model(gain=0.0)
    plga = model.layers[layer].attention.plga
    with torch.no_grad():
        plga.metric_learner[-1].norm.weight.fill_(0.05)
        plga.W[1 - head] = 0.0  # the other head of this layer does not look at A
    certificate = tiny.certify(model, tiny.sample_text(model))
    assert "relative_deviation_g" in failed(certificate)
    measured = certificate["measures"]["deviations"]["fp32"]["G_LM"]
    assert (measured["worst"]["layer"], measured["worst"]["head"]) == (layer, head)
    per_head = torch.tensor(measured["per_head"])
    per_head[layer, head] = 0.0
    assert per_head.max() < 1e-6  # it is the only one


def test_variation_on_unseen_kinds_of_prompts_is_found(tiny: SimpleNamespace) -> None:
    """A G that is constant on text and moves on prompts of another kind: the mean over text must not hide it."""
    model = tiny.make_model(gain=1e-4)
    certificate = tiny.certify(model, tiny.sample_text(model))
    by_kind = certificate["measures"]["deviations"]["fp32"]["G_LM"]["by_kind"]
    assert certificate["measures"]["relative_deviation_g"] >= max(by_kind.values())
    assert max(by_kind, key=by_kind.__getitem__) != "text"


def test_nan_in_a_tensor_fails_with_its_name(tiny: SimpleNamespace, text: torch.Tensor) -> None:
    model = tiny.make_model()
    g_lm = extract_g(model, text[:, :-1], "mean").g_lm
    with torch.no_grad():
        model.layers[1].attention.plga.P[0, 2, 3] = math.nan
    certificate = validate(model, g_lm, text, tiny.post)
    assert certificate["verdict"] == "failed" and certificate["tier"] == "unknown"
    assert "not_finite" in failed(certificate) and "relative_deviation_g" in failed(certificate)
    assert "A_P, layer 1, head 0" in certificate["failed"][0]["fix"]
    assert not any("A_LM" in line for line in certificate["measures"]["not_finite"])
    json.dumps(certificate, allow_nan=False)


def test_infinity_that_shows_in_no_deductive_tensor_fails_too(tiny: SimpleNamespace, text: torch.Tensor) -> None:
    model = tiny.make_model()
    g_lm = extract_g(model, text[:, :-1], "mean").g_lm
    with torch.no_grad():
        model.output.bias[5] = math.inf
    certificate = validate(model, g_lm, text, tiny.post)
    assert "weight output.bias" in certificate["failed"][0]["fix"]
    bad_g = g_lm.clone()
    bad_g[1, 1, 0, 0] = math.nan
    certificate = validate(tiny.make_model(), bad_g, text, tiny.post)
    assert "cached G_LM, layer 1, head 1" in certificate["failed"][0]["fix"]
    assert certificate["verdict"] == "failed"


def test_another_G_than_the_models_own_fails(tiny: SimpleNamespace, invariant: PLDRModel, text: torch.Tensor) -> None:
    g_lm = extract_g(invariant, text[:, :-1], "mean").g_lm
    wrong = {"relative_deviation_g_fp32", "worst_row_deviation", "cache_gap", "kl"}
    assert wrong <= failed(validate(invariant, g_lm * 1.01, text, tiny.post))
    assert "cached_g_deviation" in failed(validate(invariant, g_lm * (1 + 5e-5), text, tiny.post))


@pytest.mark.parametrize("source", ["identity", "random"])
def test_a_constant_G_is_constant_by_construction_and_says_so(tiny: SimpleNamespace, source: str) -> None:
    model = tiny.make_model(config=replace(tiny.config, g_source=source))
    certificate = tiny.certify(model, tiny.sample_text(model))
    assert certificate["verdict"] == "certified", summary_lines(certificate)
    assert certificate["tier"] == "constant by construction"
    assert certificate["measures"]["relative_deviation_g"] <= 1e-15
    skipped = {check["measure"] for check in certificate["checks"] if check["skipped"]}
    deduced = {"negative_control", "query_deviation_g", "worst_row_deviation"}
    assert skipped == deduced | ({"attention_effect_identity"} if source == "identity" else set())


@pytest.mark.parametrize("count", [0, 1])
def test_fewer_than_two_prompts_are_an_error(
    tiny: SimpleNamespace, invariant: PLDRModel, text: torch.Tensor, count: int
) -> None:
    g_lm = extract_g(invariant, text[:, :-1], "mean").g_lm
    with pytest.raises(UserError, match=f"{count} held-out prompts .* at least 2"):
        validate(invariant, g_lm, text[:count], tiny.post)
    padded = text.clone()
    padded[count:, -1] = tiny.config.pad_id
    with pytest.raises(UserError, match="at least 2"):
        validate(invariant, g_lm, padded, tiny.post)


def test_duplicates_among_the_prompts_count_once(
    tiny: SimpleNamespace, invariant: PLDRModel, text: torch.Tensor
) -> None:
    g_lm = extract_g(invariant, text[:, :-1], "mean").g_lm
    with pytest.raises(UserError, match="all 16 held-out prompts are the same text"):
        validate(invariant, g_lm, text[:1].repeat(16, 1), tiny.post)
    certificate = validate(invariant, g_lm, text[:4].repeat(4, 1), tiny.post)
    assert certificate["prompts"]["kinds"]["text"] == [16, 31] and certificate["prompts"]["distinct"] == 4
    assert failed(certificate) == {"held_out_prompts"} and certificate["checks"][0]["value"] == 4.0
    assert "judged by 4 held-out prompts only" in certificate["statement"]


def test_prompts_of_another_context_or_vocabulary_are_errors(
    tiny: SimpleNamespace, invariant: PLDRModel, text: torch.Tensor
) -> None:
    g_lm = extract_g(invariant, text[:, :-1], "mean").g_lm
    with pytest.raises(UserError, match="66 tokens, but the context is 32"):
        validate(invariant, g_lm, torch.cat((text, text, text[:, :2]), dim=1), tiny.post)
    with pytest.raises(UserError, match="outside the model's vocabulary of 48"):
        validate(invariant, g_lm, text + 40, tiny.post)


def test_sequences_with_padding_are_left_out_and_counted(
    tiny: SimpleNamespace, invariant: PLDRModel, text: torch.Tensor
) -> None:
    padded = text.clone()
    padded[0, -3:] = tiny.config.pad_id
    g_lm = extract_g(invariant, text[:, :-1], "mean").g_lm
    certificate = validate(invariant, g_lm, padded, tiny.post)
    assert certificate["prompts"]["left_out_padded"] == 1
    assert certificate["prompts"]["kinds"]["text"] == [16, 31]


def test_prompts_are_a_function_of_text_and_seed(tiny: SimpleNamespace, text: torch.Tensor) -> None:
    kinds = make_kinds(text, tiny.config, seed=3)
    assert sha256_kinds(kinds) == sha256_kinds(make_kinds(text, tiny.config, seed=3))
    assert sha256_kinds(kinds) != sha256_kinds(make_kinds(text, tiny.config, seed=4))
    real = {kind.name: int((kind.ids_NS != tiny.config.pad_id).sum(dim=1).unique()) for kind in kinds}
    assert real.pop("padded") == 15 and real == {k.name: k.ids_NS.shape[1] for k in kinds if not k.padded}
    assert len({(*kind.ids_NS.shape, kind.name) for kind in kinds}) == len(kinds)


def test_what_could_not_be_measured_never_passes() -> None:
    for value in (None, math.nan, math.inf, -math.inf):
        assert not Check("x", value, 1.0, "<=", "").passed
        assert not Check("x", value, 1.0, ">=", "").passed
    assert tier_of(None, PostConfig(), constant=False) == "unknown"
    assert [tier_of(d, PostConfig(), constant=False) for d in (0.2, 1e-3, 5e-6, 1e-8)] == [
        "variant",
        "approximate",
        "invariant",
        "at round-off",
    ]
