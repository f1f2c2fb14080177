"""How a bundle's weights are stored: fp32, bf16, or int8 with a scale for each output channel.

Decisions. Only matrices are packed: biases, norms and G_LM are under a hundredth of the bytes and stay fp32. int8 is symmetric
and weight-only: row i of a matrix [out, in] is stored as round(127 w / max|w|) with the fp32 scale max|w| / 127 of that row
(a row of the embedding is a token's vector), ties to even, so that equal weights give equal bytes. Readers unpack to fp32: a
smaller file, not a faster model. pipeline/post/package/measured_formats.py measures what packing costs; the certificate
carries that as its section `weight_format`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple, get_args

import torch
from torch import Tensor

from pipeline.config.post import WeightFormat
from pipeline.errors import UserError

SECTION = "weight_format"  # of the certificate; absent for fp32
BYTES = {"fp32": 4, "bf16": 2, "int8": 1}  # of a matrix's entry
FORMATS = get_args(WeightFormat)
SCALE = ".scale"
DTYPE = {"fp32": "F32", "bf16": "BF16", "int8": "I8"}


class Packed(NamedTuple):
    """Weights as stored, and the certificate's section on what the format costs."""

    tensors: dict[str, Tensor]
    section: dict[str, Any]


def pack(weights: Mapping[str, Tensor], weight_format: WeightFormat) -> dict[str, Tensor]:
    """fp32 weights in the format to store: bf16 or int8 matrices, the latter with `NAME.scale` [out]."""
    packed: dict[str, Tensor] = {}
    for name, tensor in weights.items():
        if tensor.ndim != 2 or weight_format == "fp32":
            packed[name] = tensor.float()
        elif weight_format == "bf16":
            packed[name] = tensor.bfloat16()
        else:
            scale = tensor.float().abs().amax(dim=1) / 127
            steps = (tensor.float() / scale[:, None]).round().clamp(-127, 127)
            packed[name] = torch.where(scale[:, None] > 0, steps, 0.0).to(torch.int8)  # a row of zeros has no scale
            packed[name + SCALE] = scale
    return packed


def unpack(packed: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Packed weights back to fp32, which a model computes with."""
    weights = {name: tensor.float() for name, tensor in packed.items() if not name.endswith(SCALE)}
    for name, scale in packed.items():
        if name.endswith(SCALE):
            weights[name.removesuffix(SCALE)] *= scale[:, None]
    return weights


def packed_shapes(
    shapes: Mapping[str, tuple[int, ...]], weight_format: WeightFormat
) -> tuple[dict[str, tuple[int, ...]], dict[str, str]]:
    """Shapes and dtypes (as safetensors names them) of the tensors that `pack` makes of weights of these shapes."""
    matrices = [name for name, shape in shapes.items() if len(shape) == 2]
    scales = {name + SCALE: shapes[name][:1] for name in matrices} if weight_format == "int8" else {}
    return {**shapes, **scales}, dict.fromkeys(matrices, DTYPE[weight_format])


def check_section(section: Any, *, weight_format: str, sha256: str, where: str) -> bool:
    """Whether, by the certificate's section, these packed weights may be called certified.

    section: as certificate/schema.py checked it, or None. sha256: that of the bundle's model.safetensors. Raises
    UserError when the section is missing, about another file or format, or `passed` does not follow from its numbers.
    """
    if not isinstance(section, dict) or section.get("format") != weight_format or section.get("sha256") != sha256:
        raise UserError(f"{where}: it holds no measurement of these {weight_format} weights; make the bundle again")
    difference, allowed = section["loss_difference"], section["max_loss_difference"]
    within = difference is not None and bool(abs(difference) <= allowed)
    if section["passed"] != within:
        raise UserError(
            f"{where}: a loss difference of {difference}, allowed {allowed}, contradicts passed={section['passed']}; "
            "make the bundle again"
        )
    return bool(within)


def describe_format(section: Mapping[str, Any]) -> str:
    """What the format costs, in one line."""
    return (
        f"{section['format']} weights ({section['bytes'] / section['bytes_fp32']:.2f} of the bytes of fp32): held-out loss "
        f"{_number(section['loss'])} against {_number(section['loss_fp32'])} nats in fp32 "
        f"(difference {_number(section['loss_difference'])}, allowed {section['max_loss_difference']:g}), "
        f"KL {_number(section['kl'])}, top-1 agreement {_number(section['top1_agreement'])}, over {section['prompts']} prompts"
    )


def _number(value: float | None) -> str:
    return "not finite" if value is None else f"{value:.5g}"
