"""A bundle of a model that was trained with scaled rotary positions carries them, and its certificate is of them."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pipeline.bundle.read import read_bundle, verify_bundle
from pipeline.inference.runtime import Bundle
from pldr_model.generation import generate
from pldr_model.model import PLDRModel
from pldr_model.rope_scaling import RopeScaling
from tests.helpers.bundles import edit, refused, reseal
from tests.helpers.models import CONFIG, certify, make_model, sample_text

Make = Callable[..., Path]
YARN = {"type": "yarn", "factor": 4.0, "original_context_length": 8}


@pytest.fixture
def scaled() -> PLDRModel:
    """The `invariant` model at other positions: with the same weights and the same G, which depends on no input."""
    return make_model(config=replace(CONFIG, rope_scaling=YARN))


@pytest.mark.slow
def test_a_certificate_names_the_scaling(scaled: PLDRModel) -> None:
    found = certify(scaled, sample_text(scaled))
    assert found["verdict"] == "certified" and found["model"]["rope_scaling"] == YARN


def test_a_bundle_carries_the_scaling(make_bundle: Make, scaled: PLDRModel, certificate: dict[str, Any]) -> None:
    of_scaled = {**certificate, "model": {**certificate["model"], "rope_scaling": YARN}}
    bundle = make_bundle(model=scaled, certificate=of_scaled)
    record = json.loads((bundle / "config.json").read_text())
    assert record["model"]["rope_scaling"] == YARN and verify_bundle(bundle)["certified"] is True
    parts = read_bundle(bundle)
    assert parts.config.rope_scaling == RopeScaling(**YARN)
    prompt = [[5, 9, 20]]
    expected = generate(scaled, prompt, g_lm=parts.g_lm, max_new_tokens=20)
    assert generate(Bundle.load(bundle).model, prompt, max_new_tokens=20) == expected

    # Without it, or with another one, it is a different model than the certified, however the manifest is resealed.
    for other in (None, {**YARN, "factor": 2.0}):
        model = {key: value for key, value in record["model"].items() if key != "rope_scaling"}
        edit(bundle / "config.json", model=model | ({} if other is None else {"rope_scaling": other}))
        reseal(bundle)
        assert "it certifies a model of different sizes than config.json" in refused(bundle)
    edit(bundle / "config.json", model={**record["model"], "rope_scaling": {"type": "ntk", "factor": 2}})
    reseal(bundle)
    assert "config.json: rope_scaling.type: 'ntk' is not one of linear, llama3, yarn" in refused(bundle)


def test_a_bundle_without_scaling_has_no_such_key(make_bundle: Make, certificate: dict[str, Any]) -> None:
    bundle = make_bundle()
    assert "rope_scaling" not in (bundle / "config.json").read_text() + (bundle / "certificate.json").read_text()
    assert read_bundle(bundle).config.rope_scaling is None
