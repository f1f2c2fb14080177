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


class Seen(NamedTuple):
    """What prompts showed the metric learner. rows: L tensors [P,K], and sets_LHKK, all rows of each head's worst prompt: the
    search starts there. queries_LHKK: the mean of q^T q over their tokens."""

    rows: list[Tensor]
    sets_LHKK: Tensor
    queries_LHKK: Tensor


class Found(NamedTuple):
    """record: the largest deviation (`max`), where (`worst`), `per_head`, and how it was searched; the certificate's
    `worst_row`. query_LH: the largest RMS(q dG) / RMS(q G) on the way, with the queries that were seen."""

    record: dict[str, Any]
    query_LH: Tensor


def search_worst_rows(model: PLDRModel, g_LHKK: Tensor, seen: Seen, *, seed: int) -> Found:
    """Search every layer and head. The same seed gives the same
    digits on the same machine. A deviation that is not finite is infinite. Only for a model that learns its G. Collective: each
    rank searches some of the layers."""
    plgas = learned_layers(model)
    mine = []
    for layer in range(*bounds(len(plgas))):
        generator = torch.Generator().manual_seed(seed + layer)  # so that the result does not depend on the ranks
        search = _Search(RowFunction(plgas[layer]), g_LHKK[layer], seen.queries_LHKK[layer], generator)
        search.run(seen.rows[layer], seen.sets_LHKK[layer])
        mine.append([search.best_H.tolist(), search.best_query_H.tolist()])
    every_L2H = torch.tensor([of_layer for part in gathered(mine) for of_layer in part], dtype=torch.float64)
    worst_LH = every_L2H[:, 0]
    layer, head = divmod(int(worst_LH.argmax()), worst_LH.shape[1])
    record = {
        "max": float(worst_LH.max()),
        "worst": {"layer": layer, "head": head},
        "per_head": worst_LH.tolist(),
        "starts": 2 * BEST_ROWS + 2 * RANDOM_STARTS + 1,
        "steps": STEPS,
        "seed": seed,
        "rows_from_prompts": sum(len(rows) for rows in seen.rows),
    }
    return Found(record, every_L2H[:, 1])


class _Search:
    """The search in one layer. `best_H` and `best_query_H` grow with whatever is evaluated."""

    def __init__(self, function: RowFunction, g_HKK: Tensor, queries_HKK: Tensor, generator: torch.Generator) -> None:
        self.function, self.generator = function, generator
        self.g_HKK = g_HKK.to(function.plga.W)
        self.queries_HKK = queries_HKK.to(self.g_HKK)
        self.best_H = self.best_query_H = torch.zeros(len(g_HKK)).to(self.g_HKK)

    def run(self, rows_PK: Tensor, set_HKK: Tensor) -> None:
        """Search from these rows and this set of rows, and from others."""
        H, K, _ = self.g_HKK.shape
        rows_PK = torch.cat([each.to(self.g_HKK) for each in (poles(K), self._random(RANDOM_ROWS, K), rows_PK)])
        A_PK = self.function.learned(rows_PK)
        repeated_MH = self._best_repeated(A_PK)
        mixed_MHK = self._mixed(A_PK, repeated_MH)
        starts = [
            rows_PK[repeated_MH].unsqueeze(2).expand(-1, H, K, K),
            rows_PK[mixed_MHK],
            self._random(RANDOM_STARTS, 1, 1, K).expand(-1, H, K, K),
            self._random(RANDOM_STARTS, H, K, K),
            set_HKK.to(self.g_HKK).unsqueeze(0),
        ]
        for z_MHKK in torch.split(torch.cat(starts), max(1, BATCH_ROWS // (H * K))):
            self._ascend(z_MHKK)

    def _deviation(self, A_MHKK: Tensor) -> Tensor:
        """Relative deviation of G_LM, [M,H]; infinity where it is not finite."""
        difference_MHKK = self.function.energy_curvature(A_MHKK) - self.g_HKK
        deviation_MH = _ratio(difference_MHKK.square(), self.g_HKK.square())
        self.best_H = torch.maximum(self.best_H, deviation_MH.detach().amax(dim=0))
        with torch.no_grad():  # |q x|^2 summed over queries is the sum of x * (q^T q x)
            query_MH = _ratio(
                difference_MHKK * (self.queries_HKK @ difference_MHKK), self.g_HKK * (self.queries_HKK @ self.g_HKK)
            )
            self.best_query_H = torch.maximum(self.best_query_H, query_MH.amax(dim=0))
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


def _ratio(above: Tensor, below: Tensor) -> Tensor:
    """Square root of the ratio of two sums over entries [...,K,K]; 0 where the first is 0, infinity where it is not finite."""
    top, bottom = above.sum(dim=(-2, -1)).clamp_min(0), below.sum(dim=(-2, -1)).clamp_min(0)
    ratio = torch.where(top == 0, top, top.sqrt() / bottom.sqrt())
    return ratio.where(ratio.isfinite(), math.inf)
