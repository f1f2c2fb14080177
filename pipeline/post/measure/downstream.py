"""What caching G_LM does to the model's outputs, against full recomputation without any cache.

Background (docs/certificate.md, "what fools a validator"):
- The control is the live model: G deduced from the whole sequence, nothing cached. Caching only K/V would freeze G too.
- A G deduced from a whole sequence has seen the tokens to be predicted. So the live loss is compared with the loss under the
  G of *another* prompt, which cannot leak; their difference is the leak gap. The leak test measures the same directly:
  change the last tokens and compare the logits before them.
- A model whose attention is dead agrees with itself perfectly under any G. So the loss with G = 0 and with G = identity
  must be higher.

Every function is collective where there are several ranks (pipeline/distributed.py).
Shapes: N sequences, T = S+1 tokens of a sequence, B batch, V vocabulary, L layers, H heads, K head dim.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.distributed import bounds, merged, share
from pipeline.post.measure.observe import batches, slice_rows
from pldr_model.model import PLDRModel

COMPARED = ("cached", "random_tokens")  # the given G whose outputs are compared with live ones, token by token


class Agreement:
    """Streaming comparison of cached against live logits: max |delta|, KL(live || cached) per token, top-1."""

    def __init__(self) -> None:
        self.tokens = self.same = 0
        self.kl_sum = self.kl_max = self.max_delta = 0.0

    def update(self, live_NV: Tensor, log_p_NV: Tensor, cached_NV: Tensor) -> None:
        """Add the logits of N tokens, live (with their log-probabilities in fp64) and cached."""
        log_q_NV = cached_NV.double().log_softmax(-1)
        kl_N = (log_p_NV.exp() * (log_p_NV - log_q_NV)).sum(-1)
        self.tokens += len(kl_N)
        self.same += int((live_NV.argmax(-1) == cached_NV.argmax(-1)).sum())
        self.kl_sum += kl_N.sum().item()
        self.kl_max = _larger(self.kl_max, kl_N.max().item())
        self.max_delta = _larger(self.max_delta, (live_NV - cached_NV).abs().max().item())

    def merge(self, other: Agreement) -> None:
        """Add what another accumulator has seen."""
        self.tokens += other.tokens
        self.same += other.same
        self.kl_sum += other.kl_sum
        self.kl_max, self.max_delta = _larger(self.kl_max, other.kl_max), _larger(self.max_delta, other.max_delta)

    def as_dict(self) -> dict[str, float]:
        """Plain numbers; KL in nats per token."""
        return {
            "max_abs_delta_logit": self.max_delta,
            "kl": max(0.0, self.kl_sum / self.tokens) if math.isfinite(self.kl_sum) else math.nan,
            "kl_max": self.kl_max,
            "top1": self.same / self.tokens if math.isfinite(self.max_delta) else math.nan,
        }


def compare(agreement: Mapping[str, Agreement], live_BSV: Tensor, others_BSV: Mapping[str, Tensor]) -> None:
    """Add one batch's logits to each of `agreement`; in slices, so that a large vocabulary fits in fp64."""
    rows = slice_rows(live_BSV.shape[-1])
    for start in range(0, live_BSV.shape[0] * live_BSV.shape[1], rows):
        live_RV = live_BSV.flatten(0, 1)[start : start + rows]
        log_p_RV = live_RV.double().log_softmax(-1)
        for name, seen in agreement.items():
            seen.update(live_RV, log_p_RV, others_BSV[name].flatten(0, 1)[start : start + rows])


class Totals:
    """Sums and largest values by name."""

    def __init__(self) -> None:
        self.sums: dict[str, float] = {}
        self.largest: dict[str, float] = {}

    def add(self, name: str, value: float) -> None:
        """Add to a sum."""
        self.sums[name] = self.sums.get(name, 0) + value

    def take(self, name: str, value: float) -> None:
        """Keep the largest."""
        self.largest[name] = _larger(self.largest.get(name, 0.0), value)

    def merge(self, other: Totals) -> None:
        """Add what another accumulator has seen."""
        for name, value in other.sums.items():
            self.add(name, value)
        for name, value in other.largest.items():
            self.take(name, value)


@torch.inference_mode()
def compare_losses(model: PLDRModel, given: Mapping[str, Tensor], text_NT: Tensor) -> dict[str, Any]:
    """Held-out losses in nats per token by the G they were computed with, and how well outputs with it agree with live ones.

    given: constant G by name [L,H,K,K], `cached` among them. N >= 2.
    `losses`: `block` (live), each given one, `other` (of the prompt before), `zero`, `identity`. `prefix`: over the second
    half of each sequence only, with G live (`block`), of the first half (`prefix`: it cannot have seen a target, and is the G
    of a cache filled by the prompt), and cached. `agreement`: by name of the given G, for those in COMPARED.
    """
    device = model.embedding.weight.device
    given = {name: g.to(device) for name, g in given.items()}
    zero_LHKK = torch.zeros_like(given["cached"])
    identity_LHKK = torch.eye(zero_LHKK.shape[-1], dtype=zero_LHKK.dtype, device=device).expand_as(zero_LHKK)
    totals, agreement = Totals(), {name: Agreement() for name in COMPARED if name in given}
    half = (text_NT.shape[1] - 1) // 2
    # Each prompt takes the G of the one before it; the very first takes that of the last.
    before_1S = text_NT[bounds(len(text_NT))[0] - 1, :-1].unsqueeze(0)
    previous_LBHKK = model.compute_g(before_1S.to(device), padded=False)
    for ids_BT in batches(share(text_NT), model):
        inputs_BS, targets_BS = ids_BT[:, :-1], ids_BT[:, 1:]
        g_live_LBHKK = model.compute_g(inputs_BS, padded=False)
        g_other_LBHKK = torch.cat((previous_LBHKK, g_live_LBHKK[:, :-1]), dim=1)
        previous_LBHKK = g_live_LBHKK[:, -1:]
        live_BSV = _logits(model, inputs_BS)
        nll_BS = _nll(live_BSV, targets_BS)
        totals.add("tokens", nll_BS.numel())
        totals.add("block", nll_BS.sum().item())
        totals.add("tokens of prefix", nll_BS[:, half:].numel())
        totals.add("prefix block", nll_BS[:, half:].sum().item())
        compared_BSV: dict[str, Tensor] = {}
        for name, g in {**given, "other": g_other_LBHKK, "zero": zero_LHKK, "identity": identity_LHKK}.items():
            logits_BSV = _logits(model, inputs_BS, g)
            nll_BS = _nll(logits_BSV, targets_BS)
            totals.add(name, nll_BS.sum().item())
            if name in agreement:
                compared_BSV[name] = logits_BSV
            if name == "cached":
                totals.add("prefix cached", nll_BS[:, half:].sum().item())
        compare(agreement, live_BSV, compared_BSV)
        del compared_BSV
        g_prefix_LBHKK = model.compute_g(inputs_BS[:, : max(1, half)], padded=False)
        nll_BS = _nll(_logits(model, inputs_BS, g_prefix_LBHKK), targets_BS)
        totals.add("prefix prefix", nll_BS[:, half:].sum().item())
    sums = merged(totals).sums
    names = ("block", *given, "other", "zero", "identity")
    return {
        "losses": {name: sums[name] / sums["tokens"] for name in names},
        "prefix": {name: sums[f"prefix {name}"] / sums["tokens of prefix"] for name in ("block", "prefix", "cached")},
        "agreement": {name: merged(seen).as_dict() for name, seen in agreement.items()},
    }


@torch.inference_mode()
def leak_test(model: PLDRModel, g_LHKK: Tensor, text_NT: Tensor, *, seed: int) -> dict[str, Any]:
    """Change the end of each sequence: how much do the logits before it change, relative to their own spread?

    `last_token` (the next id instead) and `last_quarter` (random ids instead), each with `live_rms`, `live_max` (RMS and
    largest |delta| over the standard deviation of the logits) and `cached_rms`, `cached_max`, where causality alone makes them
    zero up to round-off. `worst_rms`: the largest of the four.
    """
    device = model.embedding.weight.device
    g_LHKK = g_LHKK.to(device)
    S = text_NT.shape[1] - 1
    generator = torch.Generator().manual_seed(seed)
    others_NS = torch.randint(model.config.vocab_size, (len(text_NT), S), generator=generator)
    # Each sequence beside its random one, so that both are on one rank.
    both_NZ = torch.cat((text_NT[:, :S], others_NS), dim=1)
    totals = Totals()
    for both_BZ in batches(share(both_NZ), model):
        ids_BS, others_BS = both_BZ[:, :S], both_BZ[:, S:]
        logits_BSV = {name: _logits(model, ids_BS, g) for name, g in (("live", None), ("cached", g_LHKK))}
        totals.add("logit", logits_BSV["live"].sum(dtype=torch.float64).item())
        totals.add("square", logits_BSV["live"].square().sum(dtype=torch.float64).item())
        totals.add("count", logits_BSV["live"].numel())
        for what, start in (("last_token", S - 1), ("last_quarter", S - max(1, S // 4))):
            changed_BS = ids_BS.clone()
            # Never the padding id, which would mask the key instead of changing it; never the id that was there.
            new = (ids_BS[:, start:] + 1) if what == "last_token" else others_BS[:, start:]
            new = torch.where(new == ids_BS[:, start:], new + 1, new) % model.config.vocab_size
            changed_BS[:, start:] = torch.where(new == model.config.pad_id, new + 1, new)
            for name, g in (("live", None), ("cached", g_LHKK)):
                delta_BSV = (_logits(model, changed_BS, g) - logits_BSV[name])[:, :start]
                if delta_BSV.numel():
                    totals.take(f"{what} {name}", delta_BSV.abs().max().item())
                    totals.add(f"{what} {name}", delta_BSV.square().sum(dtype=torch.float64).item())
                    totals.add(f"{what} {name} count", delta_BSV.numel())
    totals = merged(totals)
    sums = totals.sums
    spread = math.sqrt(max(0.0, sums["square"] / sums["count"] - (sums["logit"] / sums["count"]) ** 2)) or math.nan
    result: dict[str, Any] = {"logit_spread": spread, "worst_rms": 0.0}
    for what in ("last_token", "last_quarter"):
        result[what] = {}
        for name in ("live", "cached"):
            rms = math.sqrt(sums[f"{what} {name}"] / (sums[f"{what} {name} count"] or math.nan)) / spread
            result[what] |= {f"{name}_rms": rms, f"{name}_max": totals.largest.get(f"{what} {name}", math.nan) / spread}
            result["worst_rms"] = _larger(result["worst_rms"], rms)
    return result


def _logits(model: PLDRModel, ids_BS: Tensor, g: Tensor | None = None) -> Tensor:
    logits_BSV = model(ids_BS, g_lm=g, padded=False)
    assert isinstance(logits_BSV, Tensor)
    return logits_BSV


def _nll(logits_BSV: Tensor, targets_BS: Tensor) -> Tensor:
    """Negative log-likelihood of every target in nats; in fp64, so that sums resolve a gap of 1e-6 per token."""
    wide = logits_BSV.to(torch.promote_types(logits_BSV.dtype, torch.float32))
    return F.cross_entropy(wide.flatten(0, 1), targets_BS.flatten(), reduction="none").double().view_as(targets_BS)


def _larger(a: float, b: float) -> float:
    """The larger; NaN when either is NaN, which Python's max may drop."""
    return math.nan if math.isnan(a) or math.isnan(b) else max(a, b)
