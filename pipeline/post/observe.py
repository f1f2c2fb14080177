"""Run a model over prompts and keep what its deductive outputs did: the model side of `measures`.

Decision: a tensor that holds NaN or infinity is named (tensor, layer, head, kind of prompt) and kept out of the
accumulators. Its measures then do not exist, and what does not exist cannot pass a threshold.

Shapes: N prompts, B of them in a batch, S tokens, L layers, H heads, K head dim, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from pipeline.post.measures import Scalars, Spread, log_abs_det, row_variance_ratio
from pipeline.post.prompts import PromptKind
from pldr_model.model import PLDRModel

TENSORS = ("A", "A_LM", "A_P", "G_LM")
BATCH_LOGITS = 1 << 25  # entries of B*S*V a batch may have: 134 MB in fp32


@dataclass
class Observation:
    """What a model's deductive outputs did over all prompts. Constant-G models have G_LM only."""

    spreads: dict[str, dict[str, Spread]] = field(default_factory=dict)  # tensor -> kind -> spread
    log_abs_det: Scalars = field(default_factory=Scalars)  # of G_LM
    row_variance: Scalars = field(default_factory=Scalars)  # of A
    not_finite: list[str] = field(default_factory=list)  # "A_P, layer 1, head 0, prompts text"

    def pooled(self, tensor: str) -> Spread | None:
        """One spread over all kinds; None when the tensor was not finite somewhere or never seen."""
        kinds = self.spreads.get(tensor)
        if not kinds or any(name.startswith(f"{tensor},") for name in self.not_finite):
            return None
        whole = Spread()
        for spread in kinds.values():
            whole.merge(spread)
        return whole


@torch.inference_mode()
def observe(model: PLDRModel, kinds: list[PromptKind]) -> Observation:
    """Every deductive output of every prompt, streamed into accumulators."""
    seen = Observation()
    for kind in kinds:
        for ids_BS in batches(kind.ids_NS, model):
            for name, x_BLHKK in deduce(model, ids_BS).items():
                bad_LH = ~x_BLHKK.isfinite().all(dim=0).all(dim=-1).all(dim=-1)
                for layer, head in bad_LH.nonzero().tolist():
                    label = f"{name}, layer {layer}, head {head}, prompts {kind.name}"
                    if label not in seen.not_finite:
                        seen.not_finite.append(label)
                if bad_LH.any():
                    continue
                seen.spreads.setdefault(name, {}).setdefault(kind.name, Spread()).update(x_BLHKK)
                if name == "G_LM":
                    seen.log_abs_det.update(log_abs_det(x_BLHKK))
                if name == "A":
                    seen.row_variance.update(row_variance_ratio(x_BLHKK))
    return seen


def deduce(model: PLDRModel, ids_BS: Tensor) -> dict[str, Tensor]:
    """The deductive outputs of these prompts, [B,L,H,K,K] each, with the model's live G. Constant G: `G_LM` only."""
    if model.config.g_source != "learned":
        return {"G_LM": model.compute_g(ids_BS, padded=False).transpose(0, 1)}
    _, layers = model(ids_BS, padded=False, return_outputs=True)
    return {name: torch.stack([getattr(layer, name) for layer in layers], dim=1) for name in TENSORS}


def batches(ids_NS: Tensor, model: PLDRModel) -> Iterator[Tensor]:
    """Batches on the model's device, small enough for their logits."""
    size = max(1, BATCH_LOGITS // (ids_NS.shape[1] * model.config.vocab_size))
    device = model.embedding.weight.device
    for chunk_BS in torch.split(ids_NS, size):
        yield chunk_BS.to(device)
