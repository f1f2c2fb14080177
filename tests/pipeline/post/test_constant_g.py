"""A trained constant G: certificate, page, bundle and model card state that it is invariant by construction."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from pipeline.bundle.read import verify_bundle
from pipeline.inference.runtime import Bundle
from pipeline.post.certificate.page import Evidence, certificate_page
from pipeline.post.extract import extract_g
from pipeline.post.package.card import CERTIFIED_LINE, CONSTANT_LINE
from pldr_model.model import PLDRModel

Make = Callable[..., Path]


@pytest.fixture(scope="module")
def constant(tiny: SimpleNamespace) -> PLDRModel:
    torch.manual_seed(0)
    model = PLDRModel(replace(tiny.config, g_source="constant")).eval()
    with torch.no_grad():
        for layer in model.layers:
            layer.attention.output.weight.mul_(3)
            layer.attention.plga.G_LM.normal_(std=3.0)
        model.output.weight.mul_(3)
        model.output.bias[model.config.pad_id] = -30.0
    return model


def test_it_is_certified_as_constant_by_construction_and_never_as_measured(
    make_bundle: Make, tiny: SimpleNamespace, constant: PLDRModel
) -> None:
    text = tiny.sample_text(constant)
    assert torch.equal(extract_g(constant, text[:, :-1], "mean").g_lm, constant.constant_g().detach())
    certificate = tiny.certify(constant, text)
    assert (certificate["verdict"], certificate["tier"]) == ("certified", "constant by construction")
    assert certificate["constant_by_construction"] is True
    skipped = {check["measure"] for check in certificate["checks"] if check["skipped"]}
    assert {"attention_effect_identity", "negative_control"} <= skipped

    g_lm = constant.constant_g().detach()
    page = certificate_page(certificate, Evidence(name="a run", g_lm=g_lm, spread=torch.zeros_like(g_lm)))
    assert "constant by construction: there is no untrained model" in page

    bundle = make_bundle(model=constant, certificate=certificate)
    assert verify_bundle(bundle)["tier"] == "constant by construction"
    assert json.loads((bundle / "config.json").read_text())["variant"] == "constant"
    card = (bundle / "README.md").read_text()
    assert card.startswith(CONSTANT_LINE + "\n") and CERTIFIED_LINE not in card
    assert "invariant by construction. This was not measured" in card and "the metric learner is removed" not in card
    loaded = Bundle.load(bundle)
    assert torch.equal(loaded.model.g_lm, constant.constant_g())
    with torch.inference_mode():
        assert (loaded.model(text[:, :-1]) - constant(text[:, :-1])).abs().max() < 1e-4


def test_dead_attention_is_not_certified_however_constant_its_g_is(tiny: SimpleNamespace, constant: PLDRModel) -> None:
    dead = PLDRModel(constant.config).eval()
    dead.load_state_dict(constant.state_dict())
    with torch.no_grad():
        for layer in dead.layers:
            layer.attention.output.weight.zero_()
    certificate = tiny.certify(dead, tiny.sample_text(dead))
    assert certificate["verdict"] == "failed"
    assert "attention_effect_zero" in {failure["measure"] for failure in certificate["failed"]}
