"""Smaller weights: what is stored, what it costs, and that the cost is measured and judged."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from pipeline.bundle.formats import Packed, pack, packed_shapes, unpack
from pipeline.bundle.read import verify_bundle
from pipeline.errors import UserError
from pipeline.inference.runtime import Bundle
from pipeline.io.storage import MANIFEST, manifest_of, render_json, sha256_json
from pipeline.io.tensors import read_header, serialize
from pipeline.post.extract import extract_g
from pipeline.post.package.measured_formats import pack_measured
from pldr_model.model import PLDRModel

Make = Callable[..., Path]


def measured(model: PLDRModel, text: torch.Tensor, weight_format: Any, *, allowed: float = 0.1) -> Packed:
    g_lm = extract_g(model, text[:, :-1], "mean").g_lm
    return pack_measured(model, g_lm, text, weight_format, max_loss_difference=allowed, max_prompts=16)


def edit_and_reseal(path: Path, **changes: Any) -> None:
    path.write_bytes(render_json({**json.loads(path.read_bytes()), **changes}))
    manifest = json.loads((path.parent / MANIFEST).read_bytes())
    manifest.pop("bundle_sha256")
    manifest["files"] = manifest_of(path.parent)
    (path.parent / MANIFEST).write_bytes(render_json({**manifest, "bundle_sha256": sha256_json(manifest)}))


def test_int8_is_half_a_step_off_at_most_and_a_row_of_zeros_stays_zero() -> None:
    torch.manual_seed(0)
    weights = {"w": torch.randn(5, 7) * torch.tensor([1e-4, 1.0, 0.0, 30.0, 1e3])[:, None], "bias": torch.randn(5)}
    packed = pack(weights, "int8")
    assert packed["w"].dtype == torch.int8 and packed["w.scale"].dtype == torch.float32
    assert (packed["w"].abs().amax(dim=1) == torch.tensor([127, 127, 0, 127, 127])).all()  # every row uses its range
    back = unpack(packed)
    assert back.keys() == weights.keys() and torch.equal(back["bias"], weights["bias"])
    assert ((back["w"] - weights["w"]).abs() <= 0.5001 * packed["w.scale"][:, None]).all()
    assert torch.equal(back["w"][2], torch.zeros(7))
    shapes, dtypes = packed_shapes({"w": (5, 7), "bias": (5,)}, "int8")
    assert shapes == {name: tuple(tensor.shape) for name, tensor in packed.items()} and dtypes == {"w": "I8"}


def test_bf16_rounds_matrices_only() -> None:
    weights = {"w": torch.randn(3, 4), "bias": torch.randn(3)}
    packed = pack(weights, "bf16")
    assert packed["w"].dtype == torch.bfloat16 and packed["bias"].dtype == torch.float32
    assert torch.equal(unpack(packed)["w"], weights["w"].bfloat16().float())
    assert pack(weights, "fp32").keys() == weights.keys() and torch.equal(pack(weights, "fp32")["w"], weights["w"])


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


def test_the_section_has_to_be_about_these_weights(make_bundle: Make, invariant: PLDRModel, text: torch.Tensor) -> None:
    bundle = make_bundle(packed=measured(invariant, text, "int8"))
    certificate = json.loads((bundle / "certificate.json").read_text())
    section = certificate["weight_format"]
    for changed, message in (
        (None, "it measured no int8 weights"),
        ({**section, "sha256": "0" * 64}, "it measured no int8 weights"),
        ({**section, "format": "bf16"}, "it measured no int8 weights"),
        ({**section, "loss_difference": 3.0}, "is not passed=True"),
        ({**section, "loss_difference": "x"}, "loss_difference: Input should be a valid number"),
    ):
        edit_and_reseal(bundle / "certificate.json", weight_format=changed)
        with pytest.raises(UserError, match=message):
            verify_bundle(bundle)
    edit_and_reseal(bundle / "certificate.json", weight_format=section)
    for weight_format, message in (
        ("int4", "not one of fp32, bf16, int8"),
        ("fp32", "another model.safetensors|smaller"),
    ):
        edit_and_reseal(bundle / "config.json", weight_format=weight_format)
        with pytest.raises(UserError, match=message):
            verify_bundle(bundle)


def test_scales_that_are_not_finite_are_refused(make_bundle: Make, invariant: PLDRModel, text: torch.Tensor) -> None:
    packed = measured(invariant, text, "int8")
    bundle = make_bundle(packed=packed)
    tensors = {name: t.clone() for name, t in packed.tensors.items()}
    tensors["output.weight.scale"][3] = float("inf")
    (bundle / "model.safetensors").write_bytes(serialize(tensors))
    sha256 = manifest_of(bundle)["model.safetensors"]["sha256"]
    edit_and_reseal(bundle / "certificate.json", weight_format={**packed.section, "sha256": sha256})
    with pytest.raises(UserError, match=r"output\.weight\.scale holds NaN or infinity"):
        verify_bundle(bundle)
