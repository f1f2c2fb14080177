"""Packing weights as bf16 and int8, and unpacking them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from pipeline.bundle.formats import pack, packed_shapes, unpack

Make = Callable[..., Path]


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
