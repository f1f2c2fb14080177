"""What a process has to know about its ranks: its share of the work, and collectives over plain values."""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from pipeline.errors import UserError, first_line

T = TypeVar("T")
M = TypeVar("M")


def end_with_parent() -> None:
    """From now on, end this process when the one that started it is gone: the other end of our stdin, a pipe, closes. A killed
    run leaves no orphans that go on writing."""

    def watch() -> None:
        while os.read(0, 4096):  # unbuffered: a thread inside sys.stdin cannot be left at interpreter shutdown
            pass
        os._exit(1)

    threading.Thread(target=watch, name="parent", daemon=True).start()


def rank_and_world() -> tuple[int, int]:
    """This process's rank and how many there are; (0, 1) without torch.distributed."""
    joined = dist.is_available() and dist.is_initialized()
    return (dist.get_rank(), dist.get_world_size()) if joined else (0, 1)


def bounds(count: int) -> tuple[int, int]:
    """First and last (exclusive) of this rank's part of `count` prompts; empty when there are more ranks than prompts."""
    rank, world = rank_and_world()
    return count * rank // world, count * (rank + 1) // world


def share(prompts_NS: Tensor) -> Tensor:
    """This rank's prompts."""
    start, stop = bounds(len(prompts_NS))
    return prompts_NS[start:stop]


def gathered(mine: T) -> list[T]:
    """The values of all ranks, in the order of ranks. Collective."""
    _, world = rank_and_world()
    if world == 1:
        return [mine]
    everyone: list[T | None] = [None] * world
    dist.all_gather_object(everyone, mine)
    return [one for one in everyone if one is not None]


def merged(mine: M) -> M:
    """The accumulators of all ranks merged into one, the same on every rank. Collective."""
    first, *others = gathered(mine)
    for other in others:
        first.merge(other)  # type: ignore[attr-defined]
    return first


def on_every_rank(work: Callable[[], T]) -> T:
    """The result of `work` on this rank, if it succeeded on all ranks. Collective.

    Otherwise raises UserError on every rank, naming the ranks that failed and why: before training, instead of a hang in it.
    """
    problem: tuple[int, str] | None = None
    try:
        result = work()
    except (UserError, OSError) as error:
        code = error.exit_code if isinstance(error, UserError) else 1
        problem = (code, f"rank {dist.get_rank()} on {socket.gethostname()}: {first_line(error)}")
    problems: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(problems, problem)
    found = [p for p in problems if p is not None]
    if found:
        raise UserError("; ".join(dict.fromkeys(text for _, text in found)), exit_code=max(code for code, _ in found))
    return result


def agreement(timeout_s: float) -> Callable[[list[bool]], list[bool]]:
    """A function that gives, for each of its booleans, whether any rank passed True. Collective.

    It has its own group, so that a thread can use it during training, on the CPU, so that it does not wait for the GPU's queue.
    """
    group = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout_s))

    def agree(verdicts: list[bool]) -> list[bool]:
        votes = torch.tensor(verdicts, dtype=torch.uint8)
        dist.all_reduce(votes, op=dist.ReduceOp.MAX, group=group)
        return [bool(vote) for vote in votes.tolist()]

    return agree
