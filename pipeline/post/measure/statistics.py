"""The measures of invariance, as pure functions and streaming accumulators. No model is involved.

Background (docs/certificate.md): a G_LM may be cached when it does not depend on the input. How much a tensor depends on
the input is measured per layer and head over many prompts. Determinants, loss gaps and averages over heads hide failures, so
nothing here averages over heads.

Decision: accumulators, not lists. `Spread` keeps mean, variance and extremes of every entry (Welford's update, merged as
Chan et al. do), in fp64, so that memory does not grow with the number of prompts and fp32 inputs lose nothing. They
are on the CPU, whatever device the model is on, and `merge` combines those of several ranks.

Shapes: N prompts, L layers, H heads, K head dim (rows and columns of the tensors).
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor


class Spread:
    """Streaming mean, variance and extremes of tensors [N,L,H,K,K] over N. The caller must reject non-finite inputs."""

    def __init__(self) -> None:
        self.count = 0
        self.mean_LHKK = self._m2_LHKK = self._low_LHKK = self._high_LHKK = torch.zeros(())

    def update(self, x_NLHKK: Tensor) -> None:
        """Add N more prompts."""
        x = x_NLHKK.detach().double()
        other, mean_LHKK = Spread(), x.mean(dim=0)
        other.count, other.mean_LHKK = x.shape[0], mean_LHKK.cpu()
        other._m2_LHKK = (x - mean_LHKK).square().sum(dim=0).cpu()
        other._low_LHKK, other._high_LHKK = x.amin(dim=0).cpu(), x.amax(dim=0).cpu()
        self.merge(other)

    def merge(self, other: Spread) -> None:
        """Add what another accumulator has seen."""
        if other.count == 0:
            return
        if self.count == 0:
            self.__dict__.update(other.__dict__)
            return
        total = self.count + other.count
        delta = other.mean_LHKK - self.mean_LHKK
        self._m2_LHKK = self._m2_LHKK + other._m2_LHKK + delta.square() * (self.count * other.count / total)
        self.mean_LHKK = self.mean_LHKK + delta * (other.count / total)
        self._low_LHKK = torch.minimum(self._low_LHKK, other._low_LHKK)
        self._high_LHKK = torch.maximum(self._high_LHKK, other._high_LHKK)
        self.count = total

    def std(self) -> Tensor:
        """Standard deviation of every entry over the prompts seen, [L,H,K,K]."""
        return (self._m2_LHKK / self.count).clamp_min(0).sqrt()

    def rms(self) -> Tensor:
        """Root mean square per head, over prompts and entries, [L,H]."""
        return _mean_over_entries(self._m2_LHKK / self.count + self.mean_LHKK.square()).sqrt()

    def rms_from(self, reference_LHKK: Tensor) -> Tensor:
        """Root mean square of `x - reference` per head, over prompts and entries, [L,H]."""
        offset = self.mean_LHKK - reference_LHKK.double()
        return _mean_over_entries(self._m2_LHKK / self.count + offset.square()).sqrt()

    def max_from(self, reference_LHKK: Tensor) -> Tensor:
        """Largest `|x - reference|` per head, over prompts and entries, [L,H]."""
        reference = reference_LHKK.double()
        return torch.maximum(self._high_LHKK - reference, reference - self._low_LHKK).amax(dim=(-2, -1))


class Scalars:
    """Streaming mean, standard deviation and extremes of [N,L,H] over N; non-finite values are counted separately, per head."""

    def __init__(self, num_layers: int, num_heads: int) -> None:
        shape = (num_layers, num_heads)
        self.count_LH = self.not_finite_LH = self._mean_LH = self._m2_LH = torch.zeros(shape, dtype=torch.float64)
        self._low_LH = torch.full(shape, math.inf, dtype=torch.float64)
        self._high_LH = torch.full(shape, -math.inf, dtype=torch.float64)

    def update(self, x_NLH: Tensor) -> None:
        """Add N more prompts."""
        x = x_NLH.detach().cpu().double()
        finite = x.isfinite()
        other = Scalars(*x.shape[1:])
        other.count_LH = finite.double().sum(dim=0)
        other.not_finite_LH = len(x) - other.count_LH
        other._mean_LH = x.where(finite, 0.0).sum(dim=0) / other.count_LH.clamp_min(1)
        other._m2_LH = (x - other._mean_LH).square().where(finite, 0.0).sum(dim=0)
        other._low_LH = x.where(finite, math.inf).amin(dim=0)
        other._high_LH = x.where(finite, -math.inf).amax(dim=0)
        self.merge(other)

    def merge(self, other: Scalars) -> None:
        """Add what another accumulator has seen."""
        total = self.count_LH + other.count_LH
        delta = other._mean_LH - self._mean_LH
        self._m2_LH = self._m2_LH + other._m2_LH + delta.square() * self.count_LH * other.count_LH / total.clamp_min(1)
        self._mean_LH = self._mean_LH + delta * other.count_LH / total.clamp_min(1)
        self._low_LH = torch.minimum(self._low_LH, other._low_LH)
        self._high_LH = torch.maximum(self._high_LH, other._high_LH)
        self.not_finite_LH = self.not_finite_LH + other.not_finite_LH
        self.count_LH = total

    def as_dict(self) -> dict[str, Any]:
        """mean, std, low, high per head, [L,H] lists; NaN where nothing finite was seen."""
        seen = self.count_LH > 0
        values = {
            "mean": self._mean_LH,
            "std": (self._m2_LH / self.count_LH.clamp_min(1)).clamp_min(0).sqrt(),
            "low": self._low_LH,
            "high": self._high_LH,
        }
        return {name: value.where(seen, math.nan).tolist() for name, value in values.items()}


class Pair:
    """Streaming order parameter of two runs over the same prompts, tensors [N,L,H,K,K] each: RMSE / |mean| and RMSE / RMS.

    |mean| and RMS are over both runs. |mean| can vanish, and then the first number is meaningless (inf at 0): judge
    by the second, which is bounded. Source: arXiv 2603.23539, and docs/certificate.md.
    """

    def __init__(self) -> None:
        self._entries = 0
        self._error_LH = self._sum_LH = self._square_LH = torch.zeros((), dtype=torch.float64)

    def update(self, first_NLHKK: Tensor, second_NLHKK: Tensor) -> None:
        """Add N more prompts."""
        first, second = first_NLHKK.detach().cpu().double(), second_NLHKK.detach().cpu().double()
        over = (0, -2, -1)
        self._error_LH = self._error_LH + (first - second).square().sum(dim=over)
        self._sum_LH = self._sum_LH + first.sum(dim=over) + second.sum(dim=over)
        self._square_LH = self._square_LH + first.square().sum(dim=over) + second.square().sum(dim=over)
        self._entries += len(first) * first.shape[-2] * first.shape[-1]

    def merge(self, other: Pair) -> None:
        """Add what another accumulator has seen."""
        self._entries += other._entries
        self._error_LH = self._error_LH + other._error_LH
        self._sum_LH = self._sum_LH + other._sum_LH
        self._square_LH = self._square_LH + other._square_LH

    def as_dict(self) -> dict[str, Any]:
        """`by_mean` and `by_rms` over everything, as in the papers, and `by_mean_per_head`, `by_rms_per_head` [L,H]."""
        by_mean, by_rms = _order(self._error_LH.mean(), self._sum_LH.mean(), self._square_LH.mean(), self._entries)
        per_head = _order(self._error_LH, self._sum_LH, self._square_LH, self._entries)
        return {
            "by_mean": by_mean.item(),
            "by_rms": by_rms.item(),
            "by_mean_per_head": per_head[0].tolist(),
            "by_rms_per_head": per_head[1].tolist(),
        }


def _order(error: Tensor, total: Tensor, square: Tensor, entries: int) -> tuple[Tensor, Tensor]:
    """RMSE / |mean| and RMSE / RMS from sums over `entries` entries of each of two runs; 0 where the error is 0."""
    rmse = (error / entries).sqrt()
    mean, rms = (total / (2 * entries)).abs(), (square / (2 * entries)).sqrt()
    zero = torch.zeros_like(rmse)
    return torch.where(rmse == 0, zero, rmse / mean), torch.where(rmse == 0, zero, rmse / rms)


def _mean_over_entries(x_LHKK: Tensor) -> Tensor:
    return x_LHKK.clamp_min(0).mean(dim=(-2, -1))


def relative_deviation(spread: Spread, reference_LHKK: Tensor, *, scale_LH: Tensor) -> Tensor:
    """RMS of `x - reference` over `scale` (the head's RMS), [L,H]; 0 where a head never leaves an exact zero."""
    return relative(spread.rms_from(reference_LHKK), scale_LH)


def relative(deviation: Tensor, scale: Tensor) -> Tensor:
    """Their ratio, and 0 where the deviation is exactly 0, whatever the scale."""
    return torch.where(deviation == 0, 0.0, deviation / scale)


def row_variance_ratio(A: Tensor) -> Tensor:
    """How much the rows of A differ, [...,K,K] -> [...]: variance between rows over all variance, 0 for equal rows.

    The metric learner's output has it near 1 at initialization, and at 1e-7 to 1e-13 once it ignores its input.
    """
    wide = A.double()
    between = wide.var(dim=-2, correction=0).mean(dim=-1)
    total = wide.var(dim=(-2, -1), correction=0)
    return torch.where(between == 0, 0.0, between / total)


def log_abs_det(G: Tensor) -> Tensor:
    """log|det| in fp64, [...,K,K] -> [...]; -inf for an exactly singular matrix. The determinant itself underflows."""
    result: Tensor = torch.linalg.slogdet(G.double()).logabsdet
    return result


def numerical_rank(G: Tensor) -> Tensor:
    """Singular values above `largest * K * eps(fp32)`, [...,K,K] -> [...]."""
    values: Tensor = torch.linalg.svdvals(G.double())
    floor = values[..., :1] * G.shape[-1] * torch.finfo(torch.float32).eps
    return (values > floor).sum(dim=-1)
