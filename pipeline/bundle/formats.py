"""How a bundle's weights are stored: fp32, bf16, int8 with a scale for each output channel, or int4 with one for 32 numbers.

Decisions. Only matrices are packed: biases, norms and G_LM are under a hundredth of the bytes and stay fp32. int8 is symmetric
and weight-only: row i of a matrix [out, in] is stored as round(127 w / max|w|) with the fp32 scale max|w| / 127 of that row
(a row of the embedding is a token's vector), ties to even, so that equal weights give equal bytes. int4 (int4.py) is for the
layers' matrices; embedding and output layer, where it costs most, stay int8. Packed weights are computed with as they are
(pldr_model/decode/kernels.py). pipeline/post/package/measured_formats.py measures what that costs; the certificate carries that
as its section `weight_format`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple, get_args

import torch
from torch import Tensor

from pipeline.bundle.int4 import quantize
from pipeline.config.post import WeightFormat
from pipeline.errors import UserError
from pldr_model.decode.linear import GROUP, Matrix

SECTION = "weight_format"  # of the certificate; absent for fp32
BYTES = {"fp32": 4.0, "bf16": 2.0, "int8": 1.0, "int4": 0.5}  # of a matrix's entry, at least
FORMATS = get_args(WeightFormat)
SCALE = ".scale"


class Packed(NamedTuple):
    """Weights as stored, and the certificate's section on what the format costs."""

    tensors: dict[str, Tensor]
    section: dict[str, Any]


def format_of(name: str, ndim: int, weight_format: WeightFormat) -> WeightFormat:
    """How the tensor of this name is stored in a bundle of this format."""
    if ndim != 2:
        return "fp32"
    return "int8" if weight_format == "int4" and not name.startswith("layers.") else weight_format


def pack(weights: Mapping[str, Tensor], weight_format: WeightFormat) -> dict[str, Tensor]:
    """fp32 weights in the format to store; of int8 and int4 matrices there is `NAME.scale` as well."""
    packed: dict[str, Tensor] = {}
    for name, tensor in weights.items():
        match format_of(name, tensor.ndim, weight_format):
            case "fp32":
                packed[name] = tensor.float()
            case "bf16":
                packed[name] = tensor.bfloat16()
            case "int8":
                scale = tensor.float().abs().amax(dim=1) / 127
                steps = (tensor.float() / scale[:, None]).round().clamp(-127, 127)
                packed[name] = torch.where(scale[:, None] > 0, steps, 0.0).to(torch.int8)  # a row of zeros has no scale
                packed[name + SCALE] = scale
            case "int4":
                packed[name], packed[name + SCALE] = quantize(tensor)
    return packed


def packed_shapes(
    shapes: Mapping[str, tuple[int, ...]], weight_format: WeightFormat
) -> tuple[dict[str, tuple[int, ...]], dict[str, str]]:
    """Shapes and dtypes (as safetensors names them) of the tensors that `pack` makes of weights of these shapes."""
    packed, dtypes = dict(shapes), {}
    for name, shape in shapes.items():
        match format_of(name, len(shape), weight_format):
            case "bf16":
                dtypes[name] = "BF16"
            case "int8":
                packed[name + SCALE], dtypes[name] = shape[:1], "I8"
            case "int4":
                groups = -(-shape[1] // GROUP)
                packed[name], dtypes[name] = (shape[0], groups * GROUP // 2), "U8"
                packed[name + SCALE], dtypes[name + SCALE] = (shape[0], groups), "BF16"
    return packed, dtypes


class StoredWeights(Mapping[str, Matrix | Tensor]):
    """Packed weights as a decoder takes them. Each matrix is handed over once: by then it is out of `packed`, so that a decoder
    that keeps it in another storage never holds two of all.

    shapes: of the fp32 weights.
    """

    def __init__(
        self, packed: dict[str, Tensor], shapes: Mapping[str, tuple[int, ...]], weight_format: WeightFormat
    ) -> None:
        self._packed, self._shapes, self._weight_format = packed, shapes, weight_format

    def __getitem__(self, name: str) -> Matrix | Tensor:
        stored = format_of(name, len(self._shapes[name]), self._weight_format)
        if stored == "fp32":
            return self._packed[name]
        values, bias = self._packed.pop(name), self._packed.get(name.removesuffix("weight") + "bias")
        if stored == "bf16":
            return Matrix.bf16(values, bias)
        scale = self._packed.pop(name + SCALE)
        return (
            Matrix.int8(values, scale, bias)
            if stored == "int8"
            else Matrix.int4(values, scale, self._shapes[name][1], bias)
        )

    def __contains__(self, name: object) -> bool:
        return name in self._shapes and name in self._packed

    def __iter__(self) -> Iterator[str]:
        return (name for name in self._shapes if name in self._packed)

    def __len__(self) -> int:
        return sum(1 for _ in self)


def unpack(
    packed: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]], weight_format: WeightFormat
) -> dict[str, Tensor]:
    """Packed weights back to fp32. shapes: of the fp32 weights."""
    stored = StoredWeights(dict(packed), shapes, weight_format)
    weights = {name: stored[name] for name in shapes}
    return {name: weight.dense() if isinstance(weight, Matrix) else weight for name, weight in weights.items()}


def check_section(section: Any, *, weight_format: str, sha256: str, where: str) -> bool:
    """Whether, by the certificate's section, these packed weights may be called certified.

    section: as certificate/schema.py checked it, or None, as it must be beside fp32 weights. sha256: that of the bundle's
    model.safetensors. Raises UserError when the section is missing, about another file or format, or `passed` does not follow
    from its numbers.
    """
    if weight_format == "fp32":
        if section is not None:
            raise UserError(
                f"{where}: it judges {section['format']} weights, and these are fp32; make the bundle again"
            )
        return True
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
