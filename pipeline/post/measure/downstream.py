"""What caching G_LM does to the model's outputs, against full recomputation without any cache.

Background (docs/certificate.md, "what fools a validator"):
- The control is the live model: G deduced from the whole sequence, nothing cached. Caching only K/V would freeze G too.
- A G deduced from a whole sequence has seen the tokens to be predicted. The leak test measures that directly: change the last
  tokens and compare the logits before them. (The loss with the G of another prompt, which cannot leak: effects.py.)

Decision: `Outputs` watches the live passes of `observe` (passes.py), so that a prompt costs one live pass for everything, one
with the cached G, and two with its end changed. With the cached G only causality is left to be tested, which is a property of
the attention's code and not of a prompt, so the first prompts do. Everything is summed; memory does not grow with prompts.

Shapes: N sequences, T = S+1 tokens of a sequence, B batch, R tokens at once, V vocabulary, L layers, H heads, K head dim.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.distributed import merged
from pipeline.post.measure.observe import slice_rows
from pipeline.post.measure.parts import part
from pipeline.post.measure.passes import LivePass
from pldr_model.loss import TokenLosses
from pldr_model.model import PLDRModel

SHORT = 16  # tokens; prompts up to here are measured for themselves
LEAK_PROMPTS = 32  # of a kind whose end is changed: as costly as a prompt each, and all leak if one does
CAUSAL_PROMPTS = 16  # of a kind whose end is changed under the cached G as well
SMALL_DELTA = 1.0  # nats; a change of logits below it is expanded, one above it recomputed in fp64


class Agreement:
    """Streaming comparison of cached against live logits: max |delta|, KL(live || cached) per token, top-1."""

    def __init__(self) -> None:
        self.tokens = self.same = 0
        self.kl_sum = self.kl_max = self.max_delta = 0.0

    def update(self, live_RV: Tensor, cached_RV: Tensor) -> None:
        """Add the logits of R tokens, live and cached."""
        delta_RV = live_RV - cached_RV
        kl_R = _kl(live_RV, cached_RV, delta_RV)
        self.tokens += len(kl_R)
        self.same += int((live_RV.max(-1).indices == cached_RV.max(-1).indices).sum())
        self.kl_sum += kl_R.sum().item()
        self.kl_max = larger(self.kl_max, kl_R.max().item())
        self.max_delta = larger(self.max_delta, largest_size(delta_RV))

    def merge(self, other: Agreement) -> None:
        """Add what another accumulator has seen."""
        self.tokens += other.tokens
        self.same += other.same
        self.kl_sum += other.kl_sum
        self.kl_max, self.max_delta = larger(self.kl_max, other.kl_max), larger(self.max_delta, other.max_delta)

    def as_dict(self) -> dict[str, float]:
        """Plain numbers; KL in nats per token. NaN where no token was seen."""
        known = self.tokens and math.isfinite(self.max_delta)
        return {
            "max_abs_delta_logit": self.max_delta if self.tokens else math.nan,
            "kl": max(0.0, self.kl_sum / self.tokens) if known and math.isfinite(self.kl_sum) else math.nan,
            "kl_max": self.kl_max if self.tokens else math.nan,
            "top1": self.same / self.tokens if known else math.nan,
        }


def compare(agreement: Agreement, live_BSV: Tensor, cached_BSV: Tensor) -> None:
    """Add one batch's logits; in slices, so that a large vocabulary fits."""
    for live_RV, cached_RV in zip(_slices(live_BSV), _slices(cached_BSV), strict=True):
        agreement.update(live_RV, cached_RV)


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
        self.largest[name] = larger(self.largest.get(name, 0.0), value)

    def merge(self, other: Totals) -> None:
        """Add what another accumulator has seen."""
        for name, value in other.sums.items():
            self.add(name, value)
        for name, value in other.largest.items():
            self.take(name, value)


class Outputs:
    """Watches live passes and measures losses, agreement and leak with the cached G_LM beside them.

    Measured are the kind `text` (its targets are the next ids of `text_NT`), and for themselves the kinds of at most SHORT
    tokens and those of random lengths, whose prompts are short and long. Other kinds are passed over.

    first: only the first so many prompts of every kind.
    """

    def __init__(
        self, model: PLDRModel, g_LHKK: Tensor, text_NT: Tensor, *, seed: int, first: int | None = None
    ) -> None:
        self._first = sys.maxsize if first is None else first
        weight = model.embedding.weight
        self._model, self._text_NT = model, text_NT
        self._g_LHKK = g_LHKK.to(device=weight.device, dtype=weight.dtype)
        self._totals = Totals()
        self._agreement = {"cached": Agreement(), "short": Agreement()}
        generator = torch.Generator().manual_seed(seed)
        shape = (len(text_NT), text_NT.shape[1] - 1)
        self._others_NS = torch.randint(model.config.vocab_size, shape, generator=generator)

    def __call__(self, live: LivePass) -> None:
        """Measure one batch."""
        text, S = live.kind.name == "text", live.ids_BS.shape[1]
        few = self._first - live.start
        if few <= 0 or (not text and (live.kind.padded or not _is_short(live.kind.name, S))):
            return
        live = live._replace(ids_BS=live.ids_BS[:few], logits_BSV=live.logits_BSV[:few])
        rows = slice(live.start, live.start + len(live.ids_BS))
        with part("losses"):
            cached_BSV = logits(self._model, live.ids_BS, self._g_LHKK)
            compare(self._agreement["cached" if text else "short"], live.logits_BSV, cached_BSV)
            if text:
                targets_BS = self._text_NT[rows, 1:].to(live.ids_BS.device)
                self._totals.add("tokens", targets_BS.numel())
                self._totals.add("block", nll(live.logits_BSV, targets_BS).sum().item())
                self._totals.add("cached", nll(cached_BSV, targets_BS).sum().item())
        with part("leak"):
            if text:
                self._totals.add("logit", live.logits_BSV.sum(dtype=torch.float64).item())
                self._totals.add("square", squares(live.logits_BSV))
                self._totals.add("count", live.logits_BSV.numel())
                self._leak("last_token", live, cached_BSV, live.ids_BS[:, -1:] + 1)
                last = max(1, S // 4)
                self._leak("last_quarter", live, cached_BSV, self._others_NS[rows, -last:].to(live.ids_BS.device))
            if 1 < S <= SHORT:
                self._leak("short", live, cached_BSV, live.ids_BS[:, -1:] + 1)

    def _leak(self, what: str, live: LivePass, cached_BSV: Tensor, new_BE: Tensor) -> None:
        """Put these ids at the prompts' ends: how much do the logits before them move?"""
        config, start = self._model.config, live.ids_BS.shape[1] - new_BE.shape[1]
        # Never the padding id, which would mask the key instead of changing it; never the id that was there.
        new_BE = torch.where(new_BE == live.ids_BS[:, start:], new_BE + 1, new_BE) % config.vocab_size
        changed_BS = torch.cat(
            (live.ids_BS[:, :start], torch.where(new_BE == config.pad_id, new_BE + 1, new_BE)), dim=1
        )
        some, few = (max(0, most - live.start) for most in (LEAK_PROMPTS, CAUSAL_PROMPTS))
        if some:
            self._moved(f"{what} live", live.logits_BSV[:some, :start], changed_BS[:some], None)
        if few:
            with part("causality"):
                self._moved(f"{what} cached", cached_BSV[:few, :start], changed_BS[:few], self._g_LHKK)

    def _moved(self, name: str, before_BPV: Tensor, changed_BS: Tensor, g: Tensor | None) -> None:
        """Add how much logits move."""
        moved_BPV = logits(self._model, changed_BS, g)[:, : before_BPV.shape[1]]
        for moved_RV, before_RV in zip(_slices(moved_BPV), _slices(before_BPV), strict=True):
            delta_RV = moved_RV - before_RV
            self._totals.take(name, largest_size(delta_RV))
            self._totals.add(name, squares(delta_RV))
            self._totals.add(f"{name} count", delta_RV.numel())

    def merge_ranks(self) -> dict[str, Any]:
        """`losses` (block, cached), in nats per token; `agreement` (cached, short); `leak`, by what was changed: `last_token`
        (the next id instead), `last_quarter` (random ids), `short` (the last token of short prompts), each with `live_rms`,
        `live_max` (RMS and largest |delta| over the standard deviation of the logits of full-length text) and `cached_rms`,
        `cached_max`, where causality alone makes them zero up to round-off; `worst_rms` is the largest. Collective."""
        totals = merged(self._totals)
        return {
            "losses": {name: totals.sums[name] / totals.sums["tokens"] for name in ("block", "cached")},
            "agreement": {name: merged(seen).as_dict() for name, seen in self._agreement.items()},
            "leak": _leak_of(totals),
        }


def _leak_of(totals: Totals) -> dict[str, Any]:
    sums = totals.sums
    spread = math.sqrt(max(0.0, sums["square"] / sums["count"] - (sums["logit"] / sums["count"]) ** 2)) or math.nan
    result: dict[str, Any] = {"logit_spread": spread, "worst_rms": 0.0}
    for what in ("last_token", "last_quarter", "short"):
        if f"{what} live" not in sums:
            continue
        result[what] = {}
        for name in ("live", "cached"):
            rms = math.sqrt(sums[f"{what} {name}"] / sums[f"{what} {name} count"]) / spread
            result[what] |= {f"{name}_rms": rms, f"{name}_max": totals.largest[f"{what} {name}"] / spread}
            result["worst_rms"] = larger(result["worst_rms"], rms)
    return result


def logits(model: PLDRModel, ids_BS: Tensor, g: Tensor | None = None) -> Tensor:
    """Logits [B,S,V] of prompts without padding, with this G or the live one."""
    logits_BSV = model(ids_BS, g_lm=g, padded=False)
    assert isinstance(logits_BSV, Tensor)
    return logits_BSV


def nll(logits_BSV: Tensor, targets_BS: Tensor) -> Tensor:
    """Negative log-likelihood of every target in nats; in fp64, so that sums resolve a gap of 1e-6 per token."""
    wide = logits_BSV.to(torch.promote_types(logits_BSV.dtype, torch.float32))
    return F.cross_entropy(wide.flatten(0, 1), targets_BS.flatten(), reduction="none").double().view_as(targets_BS)


def nll_of_hidden(model: PLDRModel, x_BSD: Tensor, targets_BS: Tensor) -> Tensor:
    """`nll` of the logits that the output layer makes of these, without making all of them."""
    tokens = model.output(x_BSD, targets_BS, pad_id=-1)  # every target counts
    assert isinstance(tokens, TokenLosses)
    return tokens.nll_BS.double()


def squares(x: Tensor) -> float:
    """Sum of squares in fp64, without a copy of the tensor."""
    return float(torch.linalg.vector_norm(x, dtype=torch.float64).square())


def largest_size(x: Tensor) -> float:
    """The largest |entry|; NaN when one is NaN."""
    low, high = x.aminmax()
    return larger(-low.item(), high.item())


def larger(a: float, b: float) -> float:
    """The larger; NaN when either is NaN, which Python's max may drop."""
    return math.nan if math.isnan(a) or math.isnan(b) else max(a, b)


def _is_short(name: str, length: int) -> bool:
    return name == "lengths" or (name.startswith("text_") and length <= SHORT)


def _kl(live_RV: Tensor, cached_RV: Tensor, delta_RV: Tensor) -> Tensor:
    """KL(live || cached) of every token in fp64, in nats.

    With p = softmax(live) and d = live - cached less a number near its mean under p, it is log E_p[exp(-d)] + E_p[d]. For a
    small d nothing cancels, so the logits' own dtype does, where log-probabilities would have to be in fp64.
    """
    p_RV = live_RV.softmax(-1)
    d_RV = delta_RV - torch.linalg.vecdot(p_RV, delta_RV).unsqueeze(-1)
    size_R = torch.maximum(-d_RV.amin(-1), d_RV.amax(-1))
    rest_R = torch.linalg.vecdot(p_RV, d_RV).double()
    kl_R = torch.linalg.vecdot(p_RV, d_RV.neg_().expm1_()).double().log1p() + rest_R
    wide_R = ~(size_R < SMALL_DELTA)  # NaN too
    if wide_R.any():
        log_p, log_q = live_RV[wide_R].double().log_softmax(-1), cached_RV[wide_R].double().log_softmax(-1)
        kl_R[wide_R] = (log_p.exp() * (log_p - log_q)).sum(-1)
    clamped_R: Tensor = kl_R.clamp_min(0)
    return clamped_R


def _slices(x_BSV: Tensor) -> Iterator[Tensor]:
    """A few tokens' logits [R,V] at a time, each of one prompt."""
    rows = slice_rows(x_BSV.shape[-1])
    for x_SV in x_BSV:
        yield from x_SV.split(rows)
