"""What a smaller weight format costs on held-out text.

Measured with the cached G_LM, against the fp32 weights that the certificate is about, and bounded by `post.max_format_loss`.
The packed weights are computed with as a reader of the bundle does, by the decoder and its kernels: what those round (of int4
the activations, to bf16) is part of the cost.

Shapes: N sequences or tokens, R tokens of a slice, T = S+1 tokens of a sequence, B batch, V vocabulary.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.bundle.format import bundle_tensors
from pipeline.bundle.formats import Packed, StoredWeights, pack
from pipeline.config.post import WeightFormat
from pipeline.io.tensors import sha256_tensors
from pipeline.post.measure.observe import batches, slice_rows
from pipeline.post.measure.prompts import PromptKind, held_out_text, sha256_kinds
from pldr_model.decode.decoder import Decoder
from pldr_model.model import PLDRModel, to_constant_g


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
    `section["passed"]`: whether the measured difference is finite and within it. Raises UserError for no usable prompts.
    """
    assert weight_format != "fp32", "fp32 weights are what the certificate is about; there is nothing to pack"
    original = bundle_tensors(model)
    packed = pack(original, weight_format)
    fp32 = to_constant_g(model, g_LHKK).eval()
    shapes = {name: tuple(tensor.shape) for name, tensor in original.items()}
    small = Decoder(fp32.config, StoredWeights(dict(packed), shapes, weight_format), g_LHKK)
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
def _compare(fp32: PLDRModel, small: Decoder, text_NT: Tensor) -> dict[str, float]:
    """Losses in nats per token, their difference, KL(fp32 || small) in nats per token, and top-1 agreement."""
    sums = dict.fromkeys(("loss_fp32", "loss", "kl", "same"), 0.0)
    rows = slice_rows(fp32.config.vocab_size)
    for ids_BT in batches(text_NT, fp32):
        targets_N = ids_BT[:, 1:].flatten()
        cache = small.new_cache(batch_size=len(ids_BT), capacity=ids_BT.shape[1] - 1)
        hidden = fp32.hidden(ids_BT[:, :-1], padded=False), small.read(ids_BT[:, :-1], cache)
        for start in range(0, len(targets_N), rows):
            part, small_part = (hidden_BSD.flatten(0, 1)[start : start + rows] for hidden_BSD in hidden)
            logits = fp32.output(part), small.logits(small_part)
            log_p_RV, log_q_RV = (x_RV.double().log_softmax(-1) for x_RV in logits)
            targets_R = targets_N[start : start + rows]
            sums["loss_fp32"] += F.nll_loss(log_p_RV, targets_R, reduction="sum").item()
            sums["loss"] += F.nll_loss(log_q_RV, targets_R, reduction="sum").item()
            sums["kl"] += (log_p_RV.exp() * (log_p_RV - log_q_RV)).sum().item()
            sums["same"] += (log_p_RV.argmax(-1) == log_q_RV.argmax(-1)).sum().item()
    tokens = text_NT[:, 1:].numel()
    loss_fp32, loss, kl, same = (value / tokens for value in sums.values())
    return {"loss_fp32": loss_fp32, "loss": loss, "loss_difference": loss - loss_fp32, "kl": kl, "top1_agreement": same}
