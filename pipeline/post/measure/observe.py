"""Run a model over prompts and accumulate statistics of its deductive outputs: the model side of `measures`.

Decision: a tensor that holds NaN or infinity is named (tensor, layer, head, kind of prompt) and kept out of the
accumulators. Its measures are then missing, and a missing measure cannot pass a threshold.

Shapes: N prompts, B of them in a batch, S tokens, L layers, H heads, K head dim, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from pipeline.distributed import bounds, gathered, merged, share
from pipeline.post.measure.passes import Watcher, by_name, live_pass
from pipeline.post.measure.prompts import PromptKind, equal_lengths
from pipeline.post.measure.statistics import Scalars, Spread, log_abs_det, numerical_rank, row_variance_ratio
from pldr_model.config import ModelConfig
from pldr_model.model import PLDRModel

TENSORS = ("A", "A_LM", "A_P", "G_LM")
BATCH_LOGITS = 1 << 22  # entries of B*S*V in a batch on a CPU: 17 MB, which its allocator reuses; larger are slower
SLICE_LOGITS = 1 << 22  # entries of R*V that are computed in fp64 at once
ON_GPU = 32  # times as many there
BATCH_ENTRIES = 1 << 23  # entries of B*L*H*K*K in a batch: 67 MB in fp64, for each tensor
RANKED_PROMPTS = 4  # of every kind: singular values cost a hundred times as much as the other measures


class Observation:
    """Statistics of a model's deductive outputs over all prompts. Its size does not depend on their number.

    spreads: tensor -> kind -> Spread; log_abs_det and rank: tensor -> Scalars; row_variance: of A; not_finite: "A_P, layer
    1, head 0, prompts text".
    """

    def __init__(self, config: ModelConfig, kinds: Sequence[str]) -> None:
        names, shape = tensors_of(config), (config.num_layers, config.num_heads)
        self.spreads = {name: {kind: Spread() for kind in kinds} for name in names}
        self.log_abs_det = {name: Scalars(*shape) for name in names}
        self.rank = {name: Scalars(*shape) for name in names}
        self.row_variance = Scalars(*shape)
        self.not_finite: list[str] = []

    def update(self, name: str, kind: str, x_BLHKK: Tensor, *, ranked: int) -> None:
        """Add a tensor of a batch of prompts of one kind; for the first `ranked` prompts its numerical rank as well."""
        bad_LH = ~x_BLHKK.isfinite().all(dim=0).all(dim=-1).all(dim=-1)
        for layer, head in bad_LH.nonzero().tolist():
            label = f"{name}, layer {layer}, head {head}, prompts {kind}"
            if label not in self.not_finite:
                self.not_finite.append(label)
        if bad_LH.any():
            return
        self.spreads[name][kind].update(x_BLHKK)
        self.log_abs_det[name].update(log_abs_det(x_BLHKK))
        if ranked > 0:
            self.rank[name].update(numerical_rank(x_BLHKK[:ranked].cpu()))
        if name == "A":
            self.row_variance.update(row_variance_ratio(x_BLHKK))

    def merge_ranks(self) -> None:
        """Add what the other ranks have seen. Collective."""
        for by_kind in self.spreads.values():
            by_kind.update({kind: merged(spread) for kind, spread in by_kind.items()})
        self.log_abs_det = {name: merged(scalars) for name, scalars in self.log_abs_det.items()}
        self.rank = {name: merged(scalars) for name, scalars in self.rank.items()}
        self.row_variance = merged(self.row_variance)
        self.not_finite = list(dict.fromkeys(label for labels in gathered(self.not_finite) for label in labels))

    def pooled(self, tensor: str) -> Spread | None:
        """One spread over all kinds; None when the tensor was not finite somewhere, or was never seen."""
        if any(label.startswith(f"{tensor},") for label in self.not_finite):
            return None
        total = Spread()
        for spread in self.spreads.get(tensor, {}).values():
            total.merge(spread)
        return total if total.count else None


@torch.inference_mode()
def observe(model: PLDRModel, kinds: Sequence[PromptKind], watchers: Sequence[Watcher] = ()) -> Observation:
    """Every deductive output of every prompt, streamed into accumulators. Collective where there are several ranks.

    watchers: see each live pass too, so that what they measure needs no pass of its own.
    """
    seen = Observation(model.config, [kind.name for kind in kinds])
    for kind in kinds:
        start = bounds(len(kind.ids_NS))[0]
        for ids_BS in batches(share(kind.ids_NS), model):
            live = live_pass(model, kind, start, ids_BS)
            for name, x_BLHKK in live.tensors.items():
                seen.update(name, kind.name, x_BLHKK, ranked=RANKED_PROMPTS - start)
            for watch in watchers:
                watch(live)
            start += len(ids_BS)
    seen.merge_ranks()
    return seen


def tensors_of(config: ModelConfig) -> tuple[str, ...]:
    """The deductive outputs that this model has."""
    return TENSORS if config.g_source == "learned" else ("G_LM",)


def deduce(model: PLDRModel, ids_BS: Tensor, *, padded: bool = False) -> dict[str, Tensor]:
    """The deductive outputs of these prompts, [B,L,H,K,K] each, with the model's live G. Constant G: `G_LM` only."""
    if model.config.g_source != "learned":
        return {"G_LM": model.compute_g(ids_BS, padded=padded).transpose(0, 1)}
    _, layers = model(ids_BS, padded=padded, return_outputs=True)
    return by_name(layers)


def batches(ids_NS: Tensor, model: PLDRModel) -> Iterator[Tensor]:
    """Batches on the model's device, each of prompts of one length, small enough for their logits and deductive outputs; in
    the order of the prompts. None where there are no prompts."""
    config = model.config
    logits, entries = ids_NS.shape[1] * config.vocab_size, config.num_layers * config.num_heads * config.head_dim**2
    device = model.embedding.weight.device
    most = BATCH_LOGITS * (1 if device.type == "cpu" else ON_GPU)
    size = max(1, min(most // logits, BATCH_ENTRIES // entries))
    for same_NS in equal_lengths(ids_NS):
        for start in range(0, len(same_NS), size):
            yield same_NS[start : start + size].to(device)


def slice_rows(vocab_size: int) -> int:
    """How many tokens' logits are computed in fp64 at once, so that a large vocabulary fits."""
    return max(1, SLICE_LOGITS // vocab_size)
