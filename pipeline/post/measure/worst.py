"""Streaming accumulators of the worst there is among prompts. No model is involved; statistics.py has those of means.

They are on the CPU in fp64, keep a number of values that does not depend on that of prompts, and `merge` combines ranks.

Shapes: N prompts, L layers, H heads, K head dim (rows and columns of the tensors).
"""

from __future__ import annotations

import torch
from torch import Tensor

from pipeline.post.measure.statistics import relative


class Top:
    """The `keep` largest of a stream of values, each with something beside it (a prompt's index, a row); of equal ones the
    first. NaN counts as larger than any number."""

    def __init__(self, keep: int) -> None:
        self.keep = keep
        self.values_N = torch.zeros(0, dtype=torch.float64)
        self.beside: Tensor | None = None

    def update(self, values_N: Tensor, beside: Tensor) -> None:
        """Add N more values, and what is beside each of them [N,...]."""
        largest = values_N.detach().double().sort(descending=True, stable=True).indices[: self.keep]
        other = Top(self.keep)
        other.values_N, other.beside = values_N.detach().double()[largest].cpu(), beside.detach()[largest].cpu()
        self.merge(other)

    def merge(self, other: Top) -> None:
        """Add what another accumulator has seen."""
        if other.beside is None:
            return
        beside = other.beside if self.beside is None else torch.cat([self.beside, other.beside])
        values_N, order = torch.cat([self.values_N, other.values_N]).sort(descending=True, stable=True)
        self.values_N, self.beside = values_N[: self.keep], beside[order[: self.keep]]


class Worst:
    """Streaming maximum over prompts of the relative deviation of tensors [N,L,H,K,K] from a reference: per prompt the RMS over
    entries, over that of the reference's head. Also the `keep` worst prompts, each head's own (`prompt_LH`), and how many are
    above `above` in any head."""

    def __init__(self, reference_LHKK: Tensor, *, keep: int, above: float) -> None:
        self.reference_LHKK, self.above = reference_LHKK, above
        self.max_LH = torch.zeros(reference_LHKK.shape[:2], dtype=torch.float64)
        self.prompt_LH = torch.zeros(reference_LHKK.shape[:2], dtype=torch.int64)
        self.prompts = Top(keep)
        self.num_above = 0

    def update(self, x_NLHKK: Tensor, *, start: int) -> None:
        """Add N more prompts, `start` being the index of the first."""
        deviation_NLH = deviation_of_each(x_NLHKK, self.reference_LHKK)
        of_prompt_N = deviation_NLH.amax(dim=(1, 2))
        largest_LH, index_LH = deviation_NLH.max(dim=0)
        self._take(largest_LH, start + index_LH)
        self.prompts.update(of_prompt_N, torch.arange(start, start + len(of_prompt_N)))
        self.num_above += len(of_prompt_N) - int((of_prompt_N <= self.above).sum())

    def merge(self, other: Worst) -> None:
        """Add what another accumulator has seen."""
        self._take(other.max_LH, other.prompt_LH)
        self.prompts.merge(other.prompts)
        self.num_above += other.num_above

    def prompts_of_heads(self, above: float, below: float) -> list[int]:
        """The worst prompt of every head whose largest deviation lies between these. A head that deviates in all prompts fills
        `prompts`, and would hide another."""
        return sorted(set(self.prompt_LH[(self.max_LH > above) & (self.max_LH <= below)].tolist()))

    def _take(self, deviation_LH: Tensor, prompt_LH: Tensor) -> None:
        more_LH = ~(deviation_LH <= self.max_LH) & ~self.max_LH.isnan()
        self.prompt_LH = torch.where(more_LH, prompt_LH, self.prompt_LH)
        self.max_LH = torch.maximum(self.max_LH, deviation_LH)


class QueryRatio:
    """Streaming RMS(q dG) / RMS(q G) per head: above, the largest over prompts of the RMS over a prompt's tokens; below, the
    RMS over all tokens."""

    def __init__(self) -> None:
        self.count = 0
        self._largest_LH = self._sum_LH = torch.zeros((), dtype=torch.float64)

    def update(self, moved_BLH: Tensor, size_BLH: Tensor, *, tokens: int) -> None:
        """Add B prompts of `tokens` tokens each: |q dG|^2 and |q G|^2, summed over tokens and entries."""
        self._largest_LH = torch.maximum(self._largest_LH, moved_BLH.amax(dim=0).cpu() / tokens)
        self._sum_LH = self._sum_LH + size_BLH.sum(dim=0).cpu()
        self.count += tokens * len(size_BLH)

    def merge(self, other: QueryRatio) -> None:
        """Add what another accumulator has seen."""
        self._largest_LH = torch.maximum(self._largest_LH, other._largest_LH)
        self._sum_LH = self._sum_LH + other._sum_LH
        self.count += other.count

    def per_head(self) -> Tensor:
        """The ratio, [L,H]; 0 where q G never moves."""
        return relative(self._largest_LH.sqrt(), (self._sum_LH / self.count).sqrt())


class RowSets:
    """Streaming: for every head the rows of the prompt whose G_LM deviates most, [L,H,K,K]."""

    def __init__(self) -> None:
        self.deviation_LH = self.rows_LHKK = torch.zeros(0)

    def update(self, deviation_BLH: Tensor, rows_BLHKK: Tensor) -> None:
        """Add B more prompts."""
        other = RowSets()
        other.deviation_LH, prompt_LH = deviation_BLH.cpu().max(dim=0)
        layer_L1, head_1H = (torch.arange(n) for n in prompt_LH.shape)
        other.rows_LHKK = rows_BLHKK[prompt_LH.to(rows_BLHKK.device), layer_L1.unsqueeze(1), head_1H].cpu()
        self.merge(other)

    def merge(self, other: RowSets) -> None:
        """Add what another accumulator has seen."""
        if not len(self.deviation_LH) or not len(other.deviation_LH):
            self.__dict__.update((self if len(self.deviation_LH) else other).__dict__)
            return
        more_LH = other.deviation_LH > self.deviation_LH
        self.deviation_LH = torch.where(more_LH, other.deviation_LH, self.deviation_LH)
        self.rows_LHKK = torch.where(more_LH[..., None, None], other.rows_LHKK, self.rows_LHKK)


class Moment:
    """Streaming mean over tokens of q^T q, [L,H,K,K]."""

    def __init__(self) -> None:
        self.count, self._sum_LHKK = 0, torch.zeros((), dtype=torch.float64)

    def update(self, sum_LHKK: Tensor, *, count: int) -> None:
        """Add the sum over `count` more tokens."""
        self._sum_LHKK = self._sum_LHKK + sum_LHKK.cpu()
        self.count += count

    def merge(self, other: Moment) -> None:
        """Add what another accumulator has seen."""
        self.update(other._sum_LHKK, count=other.count)

    def mean(self) -> Tensor:
        """Over all tokens seen."""
        return self._sum_LHKK / self.count


def deviation_of_each(x_NLHKK: Tensor, reference_LHKK: Tensor) -> Tensor:
    """Of each prompt and head: RMS over entries of `x - reference`, over that of the reference's head, [N,L,H] on the CPU."""
    x_NLHKK, reference = x_NLHKK.detach().double(), reference_LHKK.to(x_NLHKK.device).double()
    deviation_NLH = (x_NLHKK - reference).square().mean(dim=(-2, -1)).sqrt()
    return relative(deviation_NLH, reference.square().mean(dim=(-2, -1)).sqrt()).cpu()
