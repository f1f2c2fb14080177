"""Packing weights as bf16, int8 and int4, and unpacking them."""

from __future__ import annotations

from typing import get_args

import pytest
import torch

from pipeline.bundle.formats import StoredWeights, pack, packed_shapes, unpack
from pipeline.config.post import WeightFormat
from pldr_model.decode.linear import GROUP, Matrix


def test_int8_is_half_a_step_off_at_most_and_a_row_of_zeros_stays_zero() -> None:
    torch.manual_seed(0)
    weights = {"w": torch.randn(5, 7) * torch.tensor([1e-4, 1.0, 0.0, 30.0, 1e3])[:, None], "bias": torch.randn(5)}
    packed = pack(weights, "int8")
    assert packed["w"].dtype == torch.int8 and packed["w.scale"].dtype == torch.float32
    assert (packed["w"].abs().amax(dim=1) == torch.tensor([127, 127, 0, 127, 127])).all()  # every row uses its range
    back = unpack(packed, {"w": (5, 7), "bias": (5,)}, "int8")
    assert back.keys() == weights.keys() and torch.equal(back["bias"], weights["bias"])
    assert ((back["w"] - weights["w"]).abs() <= 0.5001 * packed["w.scale"][:, None]).all()
    assert torch.equal(back["w"][2], torch.zeros(7))


def test_bf16_rounds_matrices_only() -> None:
    weights = {"w": torch.randn(3, 4), "bias": torch.randn(3)}
    packed = pack(weights, "bf16")
    assert packed["w"].dtype == torch.bfloat16 and packed["bias"].dtype == torch.float32
    assert torch.equal(unpack(packed, {"w": (3, 4), "bias": (3,)}, "bf16")["w"], weights["w"].bfloat16().float())
    assert pack(weights, "fp32").keys() == weights.keys() and torch.equal(pack(weights, "fp32")["w"], weights["w"])


def test_int4_has_a_scale_for_each_group_and_keeps_embedding_and_output_in_int8() -> None:
    torch.manual_seed(0)
    weights = {
        "layers.0.w.weight": torch.randn(6, 72),
        "embedding.weight": torch.randn(9, 8),
        "output.bias": torch.randn(9),
    }
    weights["layers.0.w.weight"][2] *= 1e3
    weights["layers.0.w.weight"][3] = 0
    packed = pack(weights, "int4")
    assert packed["layers.0.w.weight"].dtype == torch.uint8 and packed["layers.0.w.weight.scale"].shape == (6, 3)
    assert packed["layers.0.w.weight.scale"].dtype == torch.bfloat16 and packed["embedding.weight"].dtype == torch.int8
    back = unpack(packed, {name: tuple(tensor.shape) for name, tensor in weights.items()}, "int4")
    assert torch.equal(
        back["embedding.weight"], unpack(pack(weights, "int8"), _shapes(weights), "int8")["embedding.weight"]
    )
    weight, found = weights["layers.0.w.weight"], back["layers.0.w.weight"]
    assert torch.equal(found[3], torch.zeros(72))
    groups = [(w, f) for w, f in zip(weight.split(GROUP, 1), found.split(GROUP, 1), strict=True)]
    plain = 0.0
    for w, f in groups:  # at least as close as with the largest weight at 7 steps
        scale = (w.abs().amax(1, keepdim=True) / 7).bfloat16().float()
        rounded = torch.where(scale > 0, (w / scale).round().clamp(-8, 7) * scale, 0.0)
        assert ((f - w).square().sum(1) <= (rounded - w).square().sum(1)).all()
        plain += float((rounded - w)[[0, 1, 4, 5]].square().sum())
    assert float((found - weight)[[0, 1, 4, 5]].square().sum()) < 0.85 * plain


def _shapes(weights: dict[str, torch.Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in weights.items()}


@pytest.mark.parametrize("weight_format", get_args(WeightFormat))
def test_names_shapes_and_dtypes_are_those_that_readers_expect(weight_format: WeightFormat) -> None:
    names = {torch.float32: "F32", torch.bfloat16: "BF16", torch.int8: "I8", torch.uint8: "U8"}
    weights = {
        "layers.0.w.weight": torch.randn(5, 40),
        "output.weight": torch.randn(7, 5),
        "output.bias": torch.randn(7),
    }
    packed = pack(weights, weight_format)
    shapes, dtypes = packed_shapes(_shapes(weights), weight_format)
    assert shapes == _shapes(packed)
    assert {name: dtypes.get(name, "F32") for name in shapes} == {name: names[t.dtype] for name, t in packed.items()}


def test_a_matrix_is_handed_over_once() -> None:
    """So that a decoder with a storage of its own never holds two of all."""
    weights = {"output.weight": torch.randn(7, 5), "output.bias": torch.randn(7)}
    packed = pack(weights, "int8")
    stored = StoredWeights(packed, _shapes(weights), "int8")
    assert "output.weight" in stored and len(stored) == 2
    matrix = stored["output.weight"]
    assert isinstance(matrix, Matrix) and matrix.bias is packed["output.bias"]
    assert set(packed) == {"output.bias"} and list(stored) == ["output.bias"]
