"""Choosing the ranks of low-rank keys, as `post.key_rank` asks: by energy, by held-out loss, or as given.

`max_loss` measures. Every head is given smaller ranks, one head and rank at a time, and the KL of the full model to that one
is taken over a few prompts. KL and not the loss, as it cannot be negative by chance. A head's ranks and costs have a lower
convex hull; its edges, over all heads, are moves, and those that save most numbers per nat come first. How many of them fit is
found by bisection, with all heads together and over more prompts. Everything is deterministic, and the prompts are of the half
that G_LM was extracted from: the certificate measures on the other, where the loss differs by chance too. So what has to fit is
the cost and two standard errors of what will be judged. Passes over a prompt: 8 (1 + 6 L H) and 128 log2(6 L H) at most.

Shapes: L layers, H heads, K head dim, N sequences, T = S+1 tokens of a sequence.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from pipeline.config.post import KeyRankConfig
from pipeline.post.measure.downstream import Agreement, compare, logits
from pipeline.post.measure.observe import batches
from pipeline.post.package.measured_keys import measure_outputs
from pldr_model.decode.low_rank import ranks_by_energy, round_ranks, truncate_g
from pldr_model.model import PLDRModel

ENERGIES = (1e-1, 1e-2, 1e-3, 1e-4, 1e-6)  # whose ranks a head is tried with, and the smallest: a pass each
PROMPTS_OF_A_HEAD = 8  # that the passes of single heads are over, at most
PROMPTS_TOGETHER = 64  # that the passes of all heads together are over, at most


class Move(NamedTuple):
    """One head's next smaller rank, and the nats that it costs for each number saved."""

    price: float
    layer: int
    head: int
    rank: int


def choose_ranks(
    model: PLDRModel, g_LHKK: Tensor, text_NT: Tensor, asked: KeyRankConfig, *, judged_tokens: int
) -> Tensor:
    """Ranks [L,H], int64. text_NT: sequences [N,S+1] without padding, read for `max_loss` only, and judged_tokens how many
    tokens the loss will be judged by."""
    L, H, K, _ = g_LHKK.shape
    if asked.ranks is not None:
        return torch.tensor(asked.ranks).expand(L, H).clone()
    if asked.energy is not None:
        return _for_kernels(ranks_by_energy(g_LHKK, asked.energy), K, asked)
    most = asked.max_loss
    assert most is not None, "one of the three is given"
    g_LHKK = g_LHKK.to(model.embedding.weight)
    moves = _moves(model, g_LHKK, text_NT[:PROMPTS_OF_A_HEAD], asked.multiple)
    full_LH = torch.full((L, H), K)

    def after(count: int) -> Tensor:
        rank_LH = full_LH.clone()
        for move in moves[:count]:
            rank_LH[move.layer, move.head] = move.rank
        return _for_kernels(rank_LH, K, asked)

    def fits(count: int) -> bool:
        cost = measure_outputs(model, g_LHKK, truncate_g(g_LHKK, after(count)), text_NT[:PROMPTS_TOGETHER])
        # A token's loss differs with a variance of about twice the KL.
        by_chance = 2 * math.sqrt(2 * cost["kl"] / judged_tokens)
        return max(abs(cost["loss_difference"]), cost["kl"]) + by_chance <= most  # False for NaN

    return after(_last(fits, len(moves)))


def _last(fits: Callable[[int], bool], most: int) -> int:
    """The largest count from 0 that fits, if those below one that fits do; 0 is known to."""
    low, high = 0, most + 1
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


@torch.inference_mode()
def _moves(model: PLDRModel, g_LHKK: Tensor, text_NT: Tensor, multiple: int) -> list[Move]:
    """Every head's steps to smaller ranks, cheapest first."""
    L, H, K, _ = g_LHKK.shape
    by_energy = [round_ranks(ranks_by_energy(g_LHKK, energy), K, multiple=multiple) for energy in ENERGIES]
    tried = {
        (layer, head): sorted({min(multiple, K), *(int(rank_LH[layer, head]) for rank_LH in by_energy)} - {K})
        for layer in range(L)
        for head in range(H)
    }
    truncated = {rank: truncate_g(g_LHKK, torch.full((L, H), rank)) for rank in sorted(set().union(*tried.values()))}
    seen = {(*place, rank): Agreement() for place, ranks in tried.items() for rank in ranks}
    for ids_BT in batches(text_NT, model):
        full_BSV = logits(model, ids_BT[:, :-1], g_LHKK)
        for (layer, head, rank), agreement in seen.items():
            one_LHKK = g_LHKK.clone()
            one_LHKK[layer, head] = truncated[rank][layer, head]
            compare(agreement, full_BSV, logits(model, ids_BT[:, :-1], one_LHKK))
    moves = []
    for (layer, head), ranks in tried.items():
        costs = [(rank, seen[layer, head, rank].as_dict()["kl"]) for rank in ranks]
        moves += [Move(price, layer, head, rank) for rank, price in hull(costs, K)]
    return sorted(moves)


def hull(costs: Sequence[tuple[int, float]], full: int) -> list[tuple[int, float]]:
    """A head's (rank, price) on the lower convex hull of its (rank, cost), from the full rank, which costs nothing, downwards:
    the price of a number rises from one to the next. Costs that are not finite are left out."""
    here, spent, found = full, 0.0, []
    left = [(rank, cost) for rank, cost in costs if cost == cost and cost < float("inf")]
    while left := [(rank, cost) for rank, cost in left if rank < here]:
        price, rank, cost = min((max(0.0, cost - spent) / (here - rank), rank, cost) for rank, cost in left)
        found.append((rank, price))
        here, spent = rank, max(spent, cost)
    return found


def _for_kernels(rank_LH: Tensor, full: int, asked: KeyRankConfig) -> Tensor:
    """Rounded up to the multiple, and in each layer to few different ranks."""
    rounded_LH = round_ranks(rank_LH, full, multiple=asked.multiple)
    return torch.tensor([few_ranks(row, asked.groups) for row in rounded_LH.tolist()])


def few_ranks(ranks: Sequence[int], most: int) -> list[int]:
    """At most so many different ranks, none below its own, with the smallest sum."""
    values = sorted(set(ranks))
    if len(values) <= most:
        return list(ranks)
    best: dict[int, tuple[int, list[int]]] = {
        -1: (0, [])
    }  # by the last value kept: the sum up to it, and what was kept
    for _ in range(most):
        further: dict[int, tuple[int, list[int]]] = {}
        for last, (total, kept) in best.items():
            below = values[last] if last >= 0 else 0
            for index in range(last + 1, len(values)):
                value = values[index]
                whole = total + value * sum(below < rank <= value for rank in ranks)
                further[index] = min(further.get(index, (whole, [*kept, value])), (whole, [*kept, value]))
        best = further
    kept = best[len(values) - 1][1]
    return [next(value for value in kept if value >= rank) for rank in ranks]
