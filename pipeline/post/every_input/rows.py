"""What one layer's G_LM is a function of: the normalized rows of its density matrix, in fp64.

    row of the density matrix -> z = (row - mean) / std -> metric learner(gamma z + beta) = a row of A;  A -> G_LM

Every z has mean 0 and norm <= sqrt(K), whatever the input and its length: `project` maps anything onto this ball. The K rows
of a head are treated as free of one another, though those of a density matrix (symmetric, positive) are not: the set is
larger than what inputs give, never smaller.

Shapes: M any number of row sets, H heads, K head dim (rows, and their length).
"""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pldr_model.model import PLDRModel
from pldr_model.plga import PLGA


class RowFunction:
    """G_LM of one layer as a function of rows: a copy of its PLGA in fp64, without gradients for the weights."""

    def __init__(self, plga: PLGA) -> None:
        self.plga = copy.deepcopy(plga).double().eval().requires_grad_(False)

    def learned(self, z: Tensor) -> Tensor:
        """Rows of A, [...,K] -> [...,K]."""
        norm = self.plga.density_norm
        rows: Tensor = self.plga.metric_learner(z * norm.weight + norm.bias)
        return rows

    def energy_curvature(self, A_MHKK: Tensor) -> Tensor:
        """G_LM [M,H,K,K] of the metric learner's outputs."""
        return self.plga.power_law(A_MHKK).G_LM


def learned_layers(model: PLDRModel) -> list[PLGA]:
    """The PLGA of every layer; none in a model that learns no G."""
    return [module for module in model.modules() if isinstance(module, PLGA)]


def normalized(density: Tensor, norm: nn.LayerNorm) -> Tensor:
    """The rows z of density matrices [...,K,K], before gamma and beta."""
    return F.layer_norm(density, norm.normalized_shape, eps=norm.eps)


def project(z: Tensor) -> Tensor:
    """The nearest rows [...,K] that an input may have: mean 0, norm <= sqrt(K)."""
    centered = z - z.mean(dim=-1, keepdim=True)
    longest = z.shape[-1] ** 0.5
    rows: Tensor = centered * (longest / centered.norm(dim=-1, keepdim=True).clamp_min(longest))
    return rows


def poles(size: int) -> Tensor:
    """The rows where one entry is as far out as it can be, up or down: [2K,K]. The metric learner of a trained model amplifies
    single entries."""
    axes = torch.eye(size, dtype=torch.float64)
    centered = axes - axes.mean(dim=-1, keepdim=True)
    outer = centered * (size**0.5 / centered.norm(dim=-1, keepdim=True))
    return torch.cat([outer, -outer])
