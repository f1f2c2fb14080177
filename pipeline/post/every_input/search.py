"""The worst rows there are, by gradient ascent: how far can G_LM move from the cached one, whatever the input?

    worst = largest, over sets of K rows, of RMS(G(rows) - cached G) / RMS(cached G), per layer and head, in fp64

Background: prompts visit few of the rows that exist, so the worst prompt says little about the worst input. Gradient ascent
finds it in seconds, because a layer's G_LM is a function of K rows and of nothing else (rows.py).

Decision: a start is K rows of every head. Single rows come first, because the metric learner runs once for each of them, for
all heads: poles, random ones, and those of prompts. Repeated K times, each is one set; and for every place of a head the
one that raises the deviation most, to first order, makes a set of different rows. The best of these, the prompts' worst set and
random ones are then improved. Of everything that was evaluated the largest counts: the result is never below that of a start.

It is a lower bound: what has no gradient (a gate that is shut everywhere but in one place) is not found.

Shapes: M sets of rows, P single rows, L layers, H heads, K head dim (rows, and their length).
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pipeline.distributed import bounds, gathered
from pipeline.post.every_input.rows import RowFunction, learned_layers, poles, project
from pldr_model.model import PLDRModel

STEPS = 60  # of Adam, with a step size that falls from STEP to 0 as a cosine
STEP = 0.3  # the entries of a row have RMS 1
MOMENTS = (0.9, 0.99)
RANDOM_ROWS = 64  # single rows that are tried beside poles and prompts
BEST_ROWS = 2  # of the single rows; each gives two starts: repeated, and mixed with the others
RANDOM_STARTS = 2  # of one row repeated, and as many of K different rows
ROUNDS = 3  # of choosing the row of every place again
BATCH_ROWS = 1024  # through the metric learner at once: 120 MB of gradients in the papers' sizes
BATCH_ENTRIES = 1 << 21  # of G_LM at once: 17 MB


class PromptRows(NamedTuple):
    """Rows that prompts produced, as starts. single: L tensors [P,K]; sets_LHKK: all rows of each head's worst prompt."""

    single: list[Tensor]
    sets_LHKK: Tensor


def search_worst_rows(
    model: PLDRModel, g_LHKK: Tensor, *, seed: int, prompts: PromptRows | None = None
) -> dict[str, Any]:
    """The largest deviation found: `max`, where (`worst`), `per_head`, and how it was searched. The same seed gives the same
    digits on the same machine. A deviation that is not finite is infinite. Only for a model that learns its G. Collective: each
    rank searches some of the layers."""
    plgas = learned_layers(model)
    mine = []
    for layer in range(*bounds(len(plgas))):
        generator = torch.Generator().manual_seed(seed + layer)  # so that the result does not depend on the ranks
        search = _Search(RowFunction(plgas[layer]), g_LHKK[layer].to(plgas[layer].W.device).double(), generator)
        singles = [prompts.single[layer]] if prompts is not None else []
        sets = [prompts.sets_LHKK[layer].unsqueeze(0)] if prompts is not None else []
        mine.append(search.run(singles, sets).tolist())
    worst_LH = torch.tensor([of_layer for part in gathered(mine) for of_layer in part], dtype=torch.float64)
    layer, head = divmod(int(worst_LH.argmax()), worst_LH.shape[1])
    return {
        "max": float(worst_LH.max()),
        "worst": {"layer": layer, "head": head},
        "per_head": worst_LH.tolist(),
        "starts": 2 * BEST_ROWS + 2 * RANDOM_STARTS + (prompts is not None),
        "steps": STEPS,
        "seed": seed,
        "rows_from_prompts": sum(len(rows) for rows in prompts.single) if prompts is not None else 0,
    }


class _Search:
    """The search in one layer. `best_H` grows with whatever is evaluated."""

    def __init__(self, function: RowFunction, g_HKK: Tensor, generator: torch.Generator) -> None:
        self.function, self.g_HKK, self.generator = function, g_HKK, generator
        self.scale_H = g_HKK.square().mean(dim=(-2, -1)).sqrt()
        self.best_H = torch.zeros_like(self.scale_H)

    def run(self, singles: list[Tensor], sets: list[Tensor]) -> Tensor:
        """The worst deviation of every head, [H]."""
        H, K, _ = self.g_HKK.shape
        rows_PK = torch.cat([each.to(self.g_HKK) for each in (poles(K), self._random(RANDOM_ROWS, K), *singles)])
        A_PK = self.function.learned(rows_PK)
        repeated_MH = self._best_repeated(A_PK)
        mixed_MHK = self._mixed(A_PK, repeated_MH)
        starts = [
            rows_PK[repeated_MH].unsqueeze(2).expand(-1, H, K, K),
            rows_PK[mixed_MHK],
            self._random(RANDOM_STARTS, 1, 1, K).expand(-1, H, K, K),
            self._random(RANDOM_STARTS, H, K, K),
            *(each.to(self.g_HKK) for each in sets),
        ]
        for z_MHKK in torch.split(torch.cat(starts), max(1, BATCH_ROWS // (H * K))):
            self._ascend(z_MHKK)
        return self.best_H

    def _deviation(self, A_MHKK: Tensor) -> Tensor:
        """Relative deviation of G_LM, [M,H]; infinity where it is not finite."""
        squared_MH = (self.function.energy_curvature(A_MHKK) - self.g_HKK).square().mean(dim=(-2, -1))
        deviation_MH = torch.where(squared_MH == 0, squared_MH, squared_MH.sqrt() / self.scale_H)
        deviation_MH = deviation_MH.where(deviation_MH.isfinite(), math.inf)
        self.best_H = torch.maximum(self.best_H, deviation_MH.detach().amax(dim=0))
        return deviation_MH

    def _gradient(self, deviation_MH: Tensor, of: Tensor) -> Tensor:
        """Of the logarithm, so that its size does not depend on that of the deviation. 0 where it is not finite."""
        tiny = torch.finfo(torch.float64).tiny
        (gradient,) = torch.autograd.grad(deviation_MH.clamp_min(tiny).log().sum(), of)
        return gradient.nan_to_num(0.0, 0.0, 0.0)

    @torch.no_grad()
    def _best_repeated(self, A_PK: Tensor) -> Tensor:
        """Of the rows, repeated K times, the BEST_ROWS worst of every head: indices [M,H]."""
        H, K, _ = self.g_HKK.shape
        parts = torch.split(A_PK, max(1, BATCH_ENTRIES // self.g_HKK.numel()))
        found_PH = torch.cat([self._deviation(part_PK[:, None, None].expand(-1, H, K, K)) for part_PK in parts])
        return found_PH.topk(BEST_ROWS, dim=0).indices

    def _mixed(self, A_PK: Tensor, start_MH: Tensor) -> Tensor:
        """For each place of a head the row that raises the deviation most, to first order: indices [M,H,K]."""
        K = A_PK.shape[-1]
        chosen_MHK = best_MHK = start_MH.unsqueeze(-1).expand(-1, -1, K)
        best_MH = torch.full_like(start_MH, -1.0, dtype=A_PK.dtype)
        for _ in range(ROUNDS + 1):
            A_MHKK = A_PK[chosen_MHK].requires_grad_()
            deviation_MH = self._deviation(A_MHKK)
            better_MH = deviation_MH.detach() > best_MH
            best_MH = torch.where(better_MH, deviation_MH.detach(), best_MH)
            best_MHK = torch.where(better_MH.unsqueeze(-1), chosen_MHK, best_MHK)
            chosen_MHK = (self._gradient(deviation_MH, A_MHKK) @ A_PK.T).argmax(dim=-1)
        return best_MHK

    def _ascend(self, z_MHKK: Tensor) -> None:
        """Adam, each head and start on its own."""
        first = second = torch.zeros_like(z_MHKK)
        for step in range(STEPS + 1):
            z_MHKK = project(z_MHKK.detach()).requires_grad_()
            deviation_MH = self._deviation(self.function.learned(z_MHKK))
            if step == STEPS:
                return
            gradient = self._gradient(deviation_MH, z_MHKK)
            first = first.lerp(gradient, 1 - MOMENTS[0])
            second = second.lerp(gradient.square(), 1 - MOMENTS[1])
            mean, square = (m / (1 - b ** (step + 1)) for m, b in zip((first, second), MOMENTS, strict=True))
            size = STEP * (1 + math.cos(math.pi * step / STEPS)) / 2
            z_MHKK = z_MHKK + size * mean / square.sqrt().clamp_min(torch.finfo(torch.float64).tiny)

    def _random(self, *shape: int) -> Tensor:
        """Random rows of the greatest norm, on the layer's device."""
        drawn = torch.randn(shape, dtype=torch.float64, generator=self.generator)
        return project(drawn * shape[-1]).to(self.g_HKK.device)
