"""The live pass over one batch of prompts, run once and shared by everything that is measured from it.

Background: a pass over a full context costs more than all that is computed from its results, so the deductive outputs go to
the statistics (observe.py) and the same pass's logits to whoever watches: losses, agreement and leak (downstream.py).

Shapes: B prompts, S tokens, V vocabulary, L layers, H heads, K head dim.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from pipeline.post.measure.prompts import PromptKind
from pldr_model.model import PLDRModel
from pldr_model.plga import DeductiveOutputs


class LivePass(NamedTuple):
    """A batch of prompts `start`, `start + 1`, … of their kind, run with the model's live G.

    tensors: the deductive outputs by name, [B,L,H,K,K] each; a model of a constant G has G_LM only. logits [B,S,V].
    """

    kind: PromptKind
    start: int
    ids_BS: Tensor
    tensors: Mapping[str, Tensor]
    logits_BSV: Tensor


Watcher = Callable[[LivePass], None]


def live_pass(model: PLDRModel, kind: PromptKind, start: int, ids_BS: Tensor) -> LivePass:
    """Run it. No cache, and no G but the model's own."""
    if model.config.g_source != "learned":
        tensors = {"G_LM": model.compute_g(ids_BS, padded=kind.padded).transpose(0, 1)}
        logits_BSV = model(ids_BS, padded=kind.padded)
        assert isinstance(logits_BSV, Tensor)
        return LivePass(kind, start, ids_BS, tensors, logits_BSV)
    logits_BSV, layers = model(ids_BS, padded=kind.padded, return_outputs=True)
    return LivePass(kind, start, ids_BS, by_name(layers), logits_BSV)


def by_name(layers: Sequence[DeductiveOutputs]) -> dict[str, Tensor]:
    """The layers' deductive outputs by name, [B,L,H,K,K] each."""
    names = DeductiveOutputs._fields
    return {name: torch.stack([getattr(layer, name) for layer in layers], dim=1) for name in names}
