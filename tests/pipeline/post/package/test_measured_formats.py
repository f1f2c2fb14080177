"""Smaller weights: what they cost is measured and judged."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from pipeline.bundle.read import verify_bundle
from pipeline.errors import UserError
from pipeline.inference.runtime import Bundle
from pipeline.io.tensors import read_header
from pldr_model.model import PLDRModel
from tests.helpers.bundles import measured

Make = Callable[..., Path]


@pytest.mark.parametrize(
    ("weight_format", "dtype", "share"), [("bf16", "BF16", 0.6), ("int8", "I8", 0.45), ("int4", "U8", 0.4)]
)
def test_a_bundle_in_a_smaller_format_is_certified_with_its_measured_cost(
    make_bundle: Make, invariant: PLDRModel, text: torch.Tensor, weight_format: str, dtype: str, share: float
) -> None:
    packed = measured(invariant, text, weight_format)
    bundle = make_bundle(packed=packed)
    result = verify_bundle(bundle)
    assert result["certified"] is True and result["weight_format"] == weight_format
    assert read_header(bundle / "model.safetensors")["layers.0.attention.qkv.weight"][0] == dtype
    assert read_header(bundle / "g_lm.safetensors")["g_lm"][0] == "F32"
    fp32 = make_bundle("fp32")
    size, full = ((folder / "model.safetensors").stat().st_size for folder in (bundle, fp32))
    assert size < share * full

    section = json.loads((bundle / "certificate.json").read_text())["weight_format"]
    losses = []
    for folder in (bundle, fp32):  # what a user of each bundle would measure
        with torch.inference_mode():
            logits = Bundle.load(folder).model(text[:16, :-1])
        losses.append(F.cross_entropy(logits.double().flatten(0, 1), text[:16, 1:].flatten()).item())
    assert section["loss"] == pytest.approx(losses[0], rel=1e-5)
    assert section["loss_fp32"] == pytest.approx(losses[1], rel=1e-5)
    assert section["loss_difference"] == pytest.approx(losses[0] - losses[1], abs=1e-5)
    assert section["kl"] > 0 and 0.9 < section["top1_agreement"] <= 1 and section["passed"] is True
    assert f"Stored as {weight_format} weights" in (bundle / "README.md").read_text()
    again = make_bundle("again", packed=measured(invariant, text, weight_format))
    assert all((bundle / p.name).read_bytes() == p.read_bytes() for p in again.iterdir())


def test_a_format_that_costs_too_much_is_not_certified(
    make_bundle: Make, invariant: PLDRModel, text: torch.Tensor
) -> None:
    packed = measured(invariant, text, "int8", allowed=0.0)
    assert packed.section["passed"] is False
    with pytest.raises(UserError, match=r"int8 weights .* too much; use another post.weight_format") as caught:
        make_bundle(packed=packed)
    assert caught.value.exit_code == 3 and "\n" not in str(caught.value)
    bundle = make_bundle(packed=packed, uncertified=True)
    assert verify_bundle(bundle)["certified"] is False
