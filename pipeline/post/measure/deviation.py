"""How far the deductive tensors move over prompts, in the numbers of a certificate.

Decision: of G_LM the largest deviation over prompts is judged, and the RMS over prompts stands beside it: an input that moves G
is one too many, and among a hundred that do not, a mean hides it. The other tensors are not judged, and have the RMS only.

Shapes: L layers, H heads, K head dim (rows and columns of the tensors).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from pipeline.distributed import merged, share
from pipeline.post.measure.observe import TENSORS, Observation, batches, tensors_of
from pipeline.post.measure.passes import LivePass, live_pass
from pipeline.post.measure.prompts import PromptKind
from pipeline.post.measure.statistics import Spread, relative_deviation
from pipeline.post.measure.worst import Worst, deviation_of_each
from pldr_model.model import PLDRModel

LOOK_CLOSER = 1e-5  # of a head in the model's own precision; no larger, so that a loose threshold measures the same
HOPELESS = 1e-3  # more is not certified, whatever fp64 says (`max_relative_deviation_g_fp32`)


class PromptDeviations:
    """Watches live passes: the largest relative deviation of G_LM from the reference over prompts, per kind and head. Streamed.

    keep: of every kind the indices of so many worst prompts are known. above: prompts that deviate more are counted.
    """

    def __init__(self, reference_LHKK: Tensor, kinds: Sequence[PromptKind], *, keep: int, above: float) -> None:
        self.reference_LHKK = reference_LHKK
        self.by_kind = {kind.name: Worst(reference_LHKK, keep=keep, above=above) for kind in kinds}

    def __call__(self, live: LivePass) -> None:
        """Add one batch."""
        self.by_kind[live.kind.name].update(live.tensors["G_LM"], start=live.start)

    def merge_ranks(self) -> None:
        """Add what the other ranks have seen. Collective."""
        self.by_kind = {kind: merged(worst) for kind, worst in self.by_kind.items()}

    def worst_and_first(self, kind: PromptKind, count: int) -> list[int]:
        """The indices, in order, of `count` prompts of a kind: one half the worst, the rest the first of the others. Beyond
        `count`, the worst prompt of every head whose deviation may be rounding or not."""
        found = self.by_kind[kind.name]
        indices = [] if found.prompts.beside is None else found.prompts.beside[: count // 2].tolist()
        chosen = list(dict.fromkeys([*indices, *range(len(kind.ids_NS))]))[:count]
        return sorted({*chosen, *found.prompts_of_heads(min(found.above, LOOK_CLOSER), HOPELESS)})


def deviations(seen: Observation, found: PromptDeviations) -> dict[str, Any]:
    """The relative deviation of each tensor over inputs: `max` over kinds, layers and heads, where it is, and all of it.

    G_LM is compared with the reference, relative to the reference's RMS; the other tensors with their mean over all prompts,
    relative to their RMS. A tensor that was not finite is missing.
    """
    out: dict[str, Any] = {}
    for tensor in TENSORS:
        pooled = seen.pooled(tensor)
        if pooled is None:
            continue
        judged = tensor == "G_LM"
        reference = found.reference_LHKK.detach().cpu().double() if judged else pooled.mean_LHKK
        scale_LH = reference.square().mean(dim=(-2, -1)).sqrt() if judged else pooled.rms()
        rms_by_kind = {
            kind: relative_deviation(spread, reference, scale_LH=scale_LH)
            for kind, spread in seen.spreads[tensor].items()
            if spread.count
        }
        by_kind = {kind: found.by_kind[kind].max_LH for kind in rms_by_kind} if judged else rms_by_kind
        out[tensor] = {
            **worst_of(by_kind),
            "max_abs_delta": float(pooled.max_from(reference).max()),
            "max_abs_delta_per_head": pooled.max_from(reference).tolist(),
            "rms": scale_LH.tolist(),
            "rms_deviation_by_kind": {kind: float(value.max()) for kind, value in rms_by_kind.items()},
            "rms_deviation_per_head": torch.stack(list(rms_by_kind.values())).amax(dim=0).tolist(),
        }
    return out


def off_mean(seen: Observation, g_LHKK: Tensor) -> float | None:
    """How far a G_LM is from the mean of the live one over full-length text, relative to its size: the worst head's. None where
    G_LM was not finite."""
    mean = seen.spreads["G_LM"]["text"]
    if seen.pooled("G_LM") is None or not mean.count:
        return None
    return float(deviation_of_each(mean.mean_LHKK.unsqueeze(0), g_LHKK.detach().cpu()).max())


def worst_of(by_kind: Mapping[str, Tensor]) -> dict[str, Any]:
    """`max` of values [L,H] by kind, where it is (`worst`), `by_kind`, and `per_head`, the worst kind's."""
    per_head_LH = torch.stack(list(by_kind.values())).amax(dim=0)
    kind, where = max(by_kind.items(), key=lambda item: float(item[1].max()))
    layer, head = divmod(int(where.argmax()), where.shape[1])
    return {
        "max": float(per_head_LH.max()),
        "worst": {"kind": kind, "layer": layer, "head": head},
        "by_kind": {kind: float(value.max()) for kind, value in by_kind.items()},
        "per_head": per_head_LH.tolist(),
    }


@torch.inference_mode()
def means(model: PLDRModel, kind: PromptKind) -> dict[str, Tensor]:
    """The mean of every deductive tensor over these prompts, [L,H,K,K] in fp64 on the CPU. Collective."""
    spreads: dict[str, Spread] = {}
    for ids_BS in batches(share(kind.ids_NS), model):
        for name, x_BLHKK in live_pass(model, kind, 0, ids_BS).tensors.items():
            spreads.setdefault(name, Spread()).update(x_BLHKK)
    every = {name: merged(spreads.get(name, Spread())) for name in tensors_of(model.config)}
    return {name: spread.mean_LHKK for name, spread in every.items()}
