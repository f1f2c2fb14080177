"""The measures of invariance, as pure functions and streaming accumulators. No model in here.

Background (docs/certificate.md): a G_LM may be cached when it does not depend on the input. How much a tensor depends on
it is measured per layer and head over many prompts. Determinants, loss gaps and averages over heads hide what fails, so
nothing here averages over heads.

Decision: accumulators, not lists. `Spread` keeps mean, variance and extremes of every entry (Welford's update, merged as
Chan et al. do), in fp64, so that memory does not grow with the number of prompts and fp32 inputs lose nothing.

Shapes: N prompts, L layers, H heads, K head dim (rows and columns of the tensors).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

ENERGY_LEFT_OUT = 1e-6  # of the effective rank: the share of sum(singular value^2) that may be dropped


class Spread:
    """Streaming mean, variance and extremes of tensors [N,L,H,K,K] over N. Non-finite inputs are the caller's to refuse."""

    def __init__(self) -> None:
        self.count = 0
        self.mean_LHKK = self._m2_LHKK = self._low_LHKK = self._high_LHKK = torch.zeros(())

    def update(self, x_NLHKK: Tensor) -> None:
        """Take in N more prompts."""
        x = x_NLHKK.detach().double()
        other = Spread()
        other.count = x.shape[0]
        other.mean_LHKK = x.mean(dim=0)
        other._m2_LHKK = (x - other.mean_LHKK).square().sum(dim=0)
        other._low_LHKK, other._high_LHKK = x.amin(dim=0), x.amax(dim=0)
        self.merge(other)

    def merge(self, other: Spread) -> None:
        """Take in what another accumulator has seen."""
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
    """Streaming mean, standard deviation and extremes of [N,L,H] over N, counting what is not finite apart."""

    def __init__(self) -> None:
        self._spread = Spread()
        self.not_finite = 0

    def update(self, x_NLH: Tensor) -> None:
        """Take in N more prompts; a prompt with a non-finite entry is counted and left out."""
        finite_N = x_NLH.isfinite().flatten(1).all(dim=1)
        self.not_finite += int((~finite_N).sum())
        if finite_N.any():
            self._spread.update(x_NLH[finite_N][..., None, None])

    def mean(self) -> Tensor | None:
        """[L,H], or None when nothing finite was seen."""
        return self._spread.mean_LHKK[..., 0, 0] if self._spread.count else None

    def std(self) -> Tensor | None:
        """[L,H], or None when nothing finite was seen."""
        return self._spread.std()[..., 0, 0] if self._spread.count else None

    def high(self) -> Tensor | None:
        """Largest value per head, [L,H], or None when nothing finite was seen."""
        return self._spread._high_LHKK[..., 0, 0] if self._spread.count else None


def _mean_over_entries(x_LHKK: Tensor) -> Tensor:
    return x_LHKK.clamp_min(0).mean(dim=(-2, -1))


def relative_deviation(spread: Spread, reference_LHKK: Tensor, *, scale_LH: Tensor) -> Tensor:
    """RMS of `x - reference` over `scale` (the head's RMS), [L,H]; 0 where a head never leaves an exact zero."""
    deviation_LH = spread.rms_from(reference_LHKK)
    return torch.where(deviation_LH == 0, 0.0, deviation_LH / scale_LH)


def order_parameter(first_NLHKK: Tensor, second_NLHKK: Tensor) -> tuple[float, float]:
    """The papers' order parameter of two runs over the same prompts: (RMSE / |mean|, RMSE / RMS), pooled over everything.

    |mean| and RMS are over both runs. |mean| can vanish, and the first number with it means nothing (inf at 0): judge
    by the second, which is bounded. Source: arXiv 2603.23539, and docs/certificate.md.
    """
    first, second = first_NLHKK.double(), second_NLHKK.double()
    rmse = (first - second).square().mean().sqrt().item()
    both = torch.stack((first, second))
    mean, rms = abs(both.mean().item()), both.square().mean().sqrt().item()
    if rmse == 0:
        return 0.0, 0.0
    return (rmse / mean if mean > 0 else math.inf), rmse / rms


def row_variance_ratio(A: Tensor) -> Tensor:
    """How far the rows of A differ, [...,K,K] -> [...]: variance between rows over all variance, 0 for equal rows.

    The metric learner's output has it near 1 at initialisation and at 1e-7 to 1e-13 once it has forgotten its input.
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


def effective_rank(G: Tensor, *, left_out: float = ENERGY_LEFT_OUT) -> Tensor:
    """Smallest rank that keeps all but `left_out` of the energy (sum of squared singular values), [...,K,K] -> [...]."""
    energy: Tensor = torch.linalg.svdvals(G.double()).square()
    tail = energy.flip(-1).cumsum(-1).flip(-1)  # what is lost by stopping before each value
    return (tail > left_out * energy.sum(dim=-1, keepdim=True)).sum(dim=-1)
