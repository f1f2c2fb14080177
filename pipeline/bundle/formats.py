"""What a bundle's weights are stored as: fp32, bf16, or int8 with a scale for each output channel.

Decisions. Only matrices are packed: biases, norms and G_LM are under a hundredth of the bytes and stay fp32. int8 is symmetric
and weight-only: row i of a matrix [out, in] is stored as round(127 w / max|w|) with the fp32 scale max|w| / 127 of that row
(a row of the embedding is a token's vector), ties to even, so that equal weights give equal bytes. Readers unpack to fp32: a
smaller file, not a faster model. What packing costs is measured on held-out text with the cached G_LM, against the fp32
weights that the certificate is about, and bounded by `post.max_format_loss`.

Shapes: N sequences or tokens, R of them in a slice, T = S+1 tokens of a sequence, B batch, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.config.post import WeightFormat
from pipeline.errors import UserError
from pipeline.io.tensors import sha256_tensors
from pipeline.post.certificate.build import bundle_tensors
from pipeline.post.measure.observe import batches
from pipeline.post.measure.prompts import PromptKind, held_out_text, sha256_kinds
from pldr_model.model import PLDRModel, to_constant_g

SECTION = "weight_format"  # of the certificate; absent for fp32
BYTES = {"fp32": 4, "bf16": 2, "int8": 1}  # of a matrix's entry
FORMATS = get_args(WeightFormat)
SCALE = ".scale"
DTYPE = {"fp32": "F32", "bf16": "BF16", "int8": "I8"}


class Packed(NamedTuple):
    """Weights as they are stored, and the certificate's section on what that costs."""

    tensors: dict[str, Tensor]
    section: dict[str, Any]


def pack(weights: Mapping[str, Tensor], weight_format: WeightFormat) -> dict[str, Tensor]:
    """fp32 weights as they are stored: bf16 or int8 matrices, the latter with `NAME.scale` [out]."""
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
    """What a model computes with: fp32."""
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


def pack_measured(
    model: PLDRModel,
    g_LHKK: Tensor,
    sequences_NT: Tensor,
    weight_format: WeightFormat,
    *,
    max_loss_difference: float,
    max_prompts: int,
) -> Packed:
    """The model's bundle weights in a smaller format, and what that costs on held-out text.

    sequences_NT: held-out sequences [N, S+1], the first `max_prompts` without padding are used. max_loss_difference: nats;
    `section["passed"]` says whether the measured one is finite and within. Raises UserError for no usable prompts.
    """
    assert weight_format != "fp32", "fp32 is what the certificate is about: nothing is packed"
    original = bundle_tensors(model)
    packed = pack(original, weight_format)
    fp32, small = (to_constant_g(model, g_LHKK).eval() for _ in range(2))
    small.load_state_dict({**small.state_dict(), **unpack(packed)})
    text_NT, _ = held_out_text(sequences_NT, model.config, limit=max_prompts)
    # Rounded before it is judged, so that a reader comes to the same verdict.
    measured = {k: float(f"{v:.6g}") if math.isfinite(v) else None for k, v in _compare(fp32, small, text_NT).items()}
    difference = measured["loss_difference"]
    section = {
        "format": weight_format,
        "sha256": sha256_tensors(packed),
        "bytes": sum(t.numel() * t.element_size() for t in packed.values()),
        "bytes_fp32": sum(t.numel() * 4 for t in original.values()),
        "prompts": len(text_NT),
        "prompts_sha256": sha256_kinds([PromptKind("weight_format", text_NT)]),
        **measured,
        "max_loss_difference": max_loss_difference,
        "passed": difference is not None and abs(difference) <= max_loss_difference,
    }
    return Packed(packed, section)


@torch.inference_mode()
def _compare(fp32: PLDRModel, small: PLDRModel, text_NT: Tensor) -> dict[str, float]:
    """Losses in nats per token, their difference, KL(fp32 || small) in nats per token, and top-1 agreement."""
    sums = dict.fromkeys(("loss_fp32", "loss", "kl", "same"), 0.0)
    rows = max(1, (1 << 22) // fp32.config.vocab_size)  # of a slice, so that a large vocabulary fits in fp64
    for ids_BT in batches(text_NT, fp32):
        targets_N = ids_BT[:, 1:].flatten()
        logits = [model(ids_BT[:, :-1], padded=False).flatten(0, 1) for model in (fp32, small)]
        for start in range(0, len(targets_N), rows):
            log_p_RV, log_q_RV = (x_NV[start : start + rows].double().log_softmax(-1) for x_NV in logits)
            targets_R = targets_N[start : start + rows]
            sums["loss_fp32"] += F.nll_loss(log_p_RV, targets_R, reduction="sum").item()
            sums["loss"] += F.nll_loss(log_q_RV, targets_R, reduction="sum").item()
            sums["kl"] += (log_p_RV.exp() * (log_p_RV - log_q_RV)).sum().item()
            sums["same"] += (log_p_RV.argmax(-1) == log_q_RV.argmax(-1)).sum().item()
    tokens = text_NT[:, 1:].numel()
    loss_fp32, loss, kl, same = (value / tokens for value in sums.values())
    return {"loss_fp32": loss_fp32, "loss": loss, "loss_difference": loss - loss_fp32, "kl": kl, "top1_agreement": same}


def check_section(section: Any, *, weight_format: str, sha256: str, where: str) -> bool:
    """Whether the certificate's section allows these packed weights to be called certified.

    section: as schema.py checked it; None where there is none. sha256: that of the bundle's model.safetensors. Raises
    UserError when the section is missing, about another file or format, or `passed` does not follow from its numbers.
    """
    if not isinstance(section, dict) or section.get("format") != weight_format or section.get("sha256") != sha256:
        raise UserError(
            f"{where}: it measured no {weight_format} weights like model.safetensors; make the bundle again"
        )
    difference, allowed = section["loss_difference"], section["max_loss_difference"]
    within = difference is not None and bool(abs(difference) <= allowed)
    if section["passed"] != within:
        raise UserError(
            f"{where}: a loss difference of {difference} against {allowed} is not passed={section['passed']}"
        )
    return bool(within)


def describe_format(section: Mapping[str, Any]) -> str:
    """One line for a person: what the format costs."""
    return (
        f"{section['format']} weights ({section['bytes'] / section['bytes_fp32']:.2f} of the bytes of fp32): held-out loss "
        f"{_number(section['loss'])} against {_number(section['loss_fp32'])} nats in fp32 "
        f"(difference {_number(section['loss_difference'])}, allowed {section['max_loss_difference']:g}), "
        f"KL {_number(section['kl'])}, top-1 agreement {_number(section['top1_agreement'])}, over {section['prompts']} prompts"
    )


def _number(value: float | None) -> str:
    return "not finite" if value is None else f"{value:.5g}"
