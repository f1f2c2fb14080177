"""What G_LM does for the model: held-out losses with another G in its place, in all layers or in one.

Background (docs/certificate.md):
- A model whose attention is dead agrees with itself perfectly under any G, so G = 0 and G = identity must cost something.
  Where: a layer may be dead while another is alive.
- The identity is a weak null: a G that commutes with the rotation of RoPE *is* plain attention, however far that G is from the
  identity (pldr_model/rotary_part.py). So G is also replaced by its part that commutes (`plain`).
- The G of another prompt has not seen this one's targets, so it cannot leak; where G is constant, that of random tokens is as
  good.

Decision: these are differences of losses on the same prompts. They vary far less from prompt to prompt than the losses do, so
few prompts resolve them (`post.effect_prompts`); the loss itself is then that of all prompts plus the difference (`estimated`).

Every function but `estimated` is collective where there are several ranks (pipeline/distributed.py).
Shapes: N sequences, T = S+1 tokens of a sequence, B batch, D width, V vocabulary, L layers, H heads, K head dim.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from pipeline.distributed import bounds, merged, share
from pipeline.post.measure.downstream import Agreement, Totals, compare, logits, nll, nll_of_hidden
from pipeline.post.measure.observe import batches
from pldr_model.config import ModelConfig
from pldr_model.layers import RopeTables
from pldr_model.model import PLDRModel
from pldr_model.rotary_part import rotary_part

EFFECTS = ("zero", "identity", "plain")
ON_BLOCK = ("random_tokens", "other")  # judged beside the live loss; the effects beside the cached one


@torch.inference_mode()
def compare_losses(
    model: PLDRModel, g_LHKK: Tensor, text_NT: Tensor, *, random_LHKK: Tensor | None = None
) -> dict[str, Any]:
    """Held-out losses in nats per token by the G they were computed with. N >= 2. random_LHKK: a G of random tokens.

    `losses`: `block` (live), `cached`, `zero`, `identity`, `plain`, `other` (of the prompt before) and, if given,
    `random_tokens`. `prefix`: over the second half of each sequence only, with G live (`block`), of the first half (`prefix`:
    it cannot have seen a target, and is the G of a cache filled by the prompt), and cached. `agreement`: `random_tokens`
    against live.
    """
    weight = model.embedding.weight
    given = _replacements(g_LHKK.to(device=weight.device, dtype=weight.dtype), model.config)
    if random_LHKK is not None:
        given["random_tokens"] = random_LHKK.to(device=weight.device, dtype=weight.dtype)
    totals, agreement = Totals(), Agreement()
    half = (text_NT.shape[1] - 1) // 2
    # Each prompt takes the G of the one before it; the very first takes that of the last.
    before_1S = text_NT[bounds(len(text_NT))[0] - 1, :-1].unsqueeze(0)
    previous_LBHKK = model.compute_g(before_1S.to(weight.device), padded=False)
    for ids_BT in batches(share(text_NT), model):
        inputs_BS, targets_BS = ids_BT[:, :-1], ids_BT[:, 1:]
        g_live_LBHKK = model.compute_g(inputs_BS, padded=False)
        g_other_LBHKK = torch.cat((previous_LBHKK, g_live_LBHKK[:, :-1]), dim=1)
        previous_LBHKK = g_live_LBHKK[:, -1:]
        totals.add("tokens", targets_BS.numel())
        totals.add("tokens of prefix", targets_BS[:, half:].numel())
        g_prefix_LBHKK = model.compute_g(inputs_BS[:, : max(1, half)], padded=False)
        of_both: list[Tensor] = []  # logits, where more than their losses is measured
        for name, g in {"block": None, **given, "other": g_other_LBHKK, "prefix": g_prefix_LBHKK}.items():
            if random_LHKK is not None and name in ("block", "random_tokens"):
                of_both.append(logits(model, inputs_BS, g))
                nll_BS = nll(of_both[-1], targets_BS)
            else:
                nll_BS = nll_of_hidden(model, model.hidden(inputs_BS, g_lm=g, padded=False), targets_BS)
            totals.add(name, nll_BS.sum().item())
            totals.add(f"prefix {name}", nll_BS[:, half:].sum().item())
        if of_both:
            compare(agreement, *of_both)
    sums = merged(totals).sums
    names = ("block", *given, "other")
    return {
        "losses": {name: sums[name] / sums["tokens"] for name in names},
        "prefix": {name: sums[f"prefix {name}"] / sums["tokens of prefix"] for name in ("block", "prefix", "cached")},
        "agreement": {"random_tokens": merged(agreement).as_dict()} if random_LHKK is not None else {},
    }


@torch.inference_mode()
def effects_by_layer(
    model: PLDRModel, g_LHKK: Tensor, text_NT: Tensor, losses: Mapping[str, float], *, min_effect: float
) -> dict[str, Any]:
    """What replacing G_LM costs in nats: in all layers (differences of `losses`), and in one layer at a time with
    the others cached, `per_layer`. A layer whose G = 0 costs `min_effect` or more alone is in `alive_layers`.

    A layer's input does not depend on its own G or a later one, so it is computed once: layer l costs the layers from l on.
    """
    weight = model.embedding.weight
    given = _replacements(g_LHKK.to(device=weight.device, dtype=weight.dtype), model.config)
    cached_LHKK = given.pop("cached")
    totals = Totals()
    for ids_BT in batches(share(text_NT), model):
        inputs_BS, targets_BS = ids_BT[:, :-1], ids_BT[:, 1:]
        with _inputs_of_layers(model) as (x_LBSD, rope):
            x_BSD = model.hidden(inputs_BS, g_lm=cached_LHKK, padded=False)
        cached_nll = nll_of_hidden(model, x_BSD, targets_BS).sum().item()
        totals.add("tokens", targets_BS.numel())
        for layer in range(len(x_LBSD)):
            for name, replacement_LHKK in given.items():
                x_BSD = x_LBSD[layer]
                for later in range(layer, len(x_LBSD)):
                    g_HKK = (replacement_LHKK if later == layer else cached_LHKK)[later]
                    x_BSD, _ = model.layers[later](x_BSD, rope[0], g=g_HKK)
                totals.add(f"{name} {layer}", nll_of_hidden(model, x_BSD, targets_BS).sum().item() - cached_nll)
    sums = merged(totals).sums
    per_layer = {
        name: [sums[f"{name} {i}"] / sums["tokens"] for i in range(model.config.num_layers)] for name in EFFECTS
    }
    return {
        "num_prompts": len(text_NT),
        **{name: losses[name] - losses["cached"] for name in EFFECTS},
        "per_layer": per_layer,
        "alive_layers": [layer for layer, cost in enumerate(per_layer["zero"]) if cost >= min_effect],
    }


def estimated(of_all: Mapping[str, float], of_few: Mapping[str, float]) -> dict[str, float]:
    """The losses over all prompts: `block` and `cached` as measured, the others by their difference on the few."""
    base = {name: "block" if name in ON_BLOCK else "cached" for name in of_few if name not in of_all}
    return {**of_all, **{name: of_all[on] + (of_few[name] - of_few[on]) for name, on in base.items()}}


def _replacements(g_LHKK: Tensor, config: ModelConfig) -> dict[str, Tensor]:
    """The cached G and what takes its place, each [L,H,K,K]."""
    identity_KK = torch.eye(config.head_dim, dtype=g_LHKK.dtype, device=g_LHKK.device)
    return {
        "cached": g_LHKK,
        "zero": torch.zeros_like(g_LHKK),
        "identity": identity_KK.expand_as(g_LHKK),
        "plain": rotary_part(g_LHKK, config),
    }


@contextmanager
def _inputs_of_layers(model: PLDRModel) -> Iterator[tuple[list[Tensor], list[RopeTables]]]:
    """What the layers are given by passes inside: their inputs [B,S,D] in order, and the rotary tables."""
    inputs: list[Tensor] = []
    tables: list[RopeTables] = []

    def keep(_: torch.nn.Module, given: tuple[Tensor, RopeTables]) -> None:
        inputs.append(given[0])
        tables.append(given[1])

    handles = [layer.register_forward_pre_hook(keep) for layer in model.layers]
    try:
        yield inputs, tables
    finally:
        for handle in handles:
            handle.remove()
