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
from pipeline.inference.source import open_model
from pipeline.io.tensors import read_header
from pldr_model.model import PLDRModel
from tests.helpers.bundles import measured

Make = Callable[..., Path]


@pytest.mark.parametrize(("weight_format", "dtype", "share"), [("bf16", "BF16", 0.6), ("int8", "I8", 0.45)])
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
    losses = [loss_of(folder, text[:16]) for folder in (bundle, fp32)]
    assert section["loss"] == pytest.approx(losses[0], rel=1e-5)
    assert section["loss_fp32"] == pytest.approx(losses[1], rel=1e-5)
    assert section["loss_difference"] == pytest.approx(losses[0] - losses[1], abs=1e-5)
    assert section["kl"] > 0 and 0.9 < section["top1_agreement"] <= 1 and section["passed"] is True
    assert f"Stored as {weight_format} weights" in (bundle / "README.md").read_text()
    again = make_bundle("again", packed=measured(invariant, text, weight_format))
    assert all((bundle / p.name).read_bytes() == p.read_bytes() for p in again.iterdir())


def loss_of(bundle: Path, text_NT: torch.Tensor) -> float:
    """What a user of the bundle would measure."""
    decoder = open_model(bundle).decoder
    cache = decoder.new_cache(batch_size=len(text_NT), capacity=text_NT.shape[1])
    logits = decoder.logits(decoder.read(text_NT[:, :-1], cache))
    return F.cross_entropy(logits.double().flatten(0, 1), text_NT[:, 1:].flatten()).item()


def test_int4_is_measured_with_what_its_kernel_rounds(
    make_bundle: Make, invariant: PLDRModel, text: torch.Tensor
) -> None:
    """This model was not trained to be a good one: it loses too much, which is what the section is for."""
    packed = measured(invariant, text, "int4")
    assert packed.section["passed"] is (abs(packed.section["loss_difference"]) <= 0.1)
    bundle = make_bundle(packed=packed, uncertified=True)
    header = read_header(bundle / "model.safetensors")
    assert header["layers.0.attention.qkv.weight"][0] == "U8" and header["output.weight"][0] == "I8"
    assert packed.section["loss"] == pytest.approx(loss_of(bundle, text[:16]), rel=1e-5)
    with torch.inference_mode():
        unpacked = open_model(bundle).model(text[:16, :-1])  # in fp32: near, and not the same
    loss = F.cross_entropy(unpacked.double().flatten(0, 1), text[:16, 1:].flatten()).item()
    assert 1e-7 < abs(loss - packed.section["loss"]) < 1e-2


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
