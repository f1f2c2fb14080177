"""Several processes validate together: each takes a contiguous share of the prompts, and the accumulators are merged.

Decision: the processes share nothing but accumulators, one at a time, so that no rank holds more than `world` of them, and
every rank ends with the same numbers. Ranks that are not there (no torch.distributed) are one rank. What is exchanged are
our own objects between processes of one job that torch.distributed has joined; nothing that a user hands us comes in here.
"""

from __future__ import annotations

from typing import TypeVar

import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")
M = TypeVar("M")


def rank_and_world() -> tuple[int, int]:
    """This process's rank and how many there are; (0, 1) without torch.distributed."""
    joined = dist.is_available() and dist.is_initialized()
    return (dist.get_rank(), dist.get_world_size()) if joined else (0, 1)


def bounds(count: int) -> tuple[int, int]:
    """First and last (exclusive) of `count` prompts that are this rank's; empty where there are more ranks than prompts."""
    rank, world = rank_and_world()
    return count * rank // world, count * (rank + 1) // world


def share(prompts_NS: Tensor) -> Tensor:
    """This rank's prompts."""
    start, stop = bounds(len(prompts_NS))
    return prompts_NS[start:stop]


def gathered(mine: T) -> list[T]:
    """What every rank holds, in the order of ranks. Collective."""
    _, world = rank_and_world()
    if world == 1:
        return [mine]
    everyone: list[T | None] = [None] * world
    dist.all_gather_object(everyone, mine)
    return [one for one in everyone if one is not None]


def merged(mine: M) -> M:
    """The accumulators of all ranks in one, the same on every rank. Collective."""
    first, *others = gathered(mine)
    for other in others:
        first.merge(other)  # type: ignore[attr-defined]
    return first
