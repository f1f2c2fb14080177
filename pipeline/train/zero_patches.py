"""Redundant work in a DeepSpeed step, skipped: the results are bit-equal, the step is shorter.

Measured on DeepSpeed 0.19.8 (`pldr bench train`, docs/speed.md). Small models and CPUs gain; with a large model on a GPU most
of it is hidden behind the computation.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pipeline.devices import has_gpu


def skip_redundant_work(engine: Any, zero_stage: int, world_size: int) -> None:
    """Replace methods of an engine and of its ZeRO 1 or 2 optimizer."""
    if world_size == 1:
        engine.buffered_allreduce_fallback = _nothing  # stage 0
    zero = engine.optimizer
    if zero_stage not in (1, 2) or not hasattr(zero, "averaged_gradients"):
        return
    _check_gradients_at_once(zero)
    _keep_pointers(zero)
    copied = zero.contiguous_gradients or zero.overlap_comm or zero.use_grad_accum_attribute
    if zero_stage == 1 and world_size == 1 and not copied:
        _reduce_nothing(zero)
    if not has_gpu() and not zero.cpu_offload:
        _keep_flat_gradients(zero)


def _nothing(*_: Any, **__: Any) -> None:
    """The mean over one rank needs no work."""


def _check_gradients_at_once(zero: Any) -> None:
    """ZeRO 1 and 2 read each gradient from Python, twice: for NaN and infinity, and for its norm. Here one kernel does both
    for all gradients. (A norm that overflows fp32 counts as infinite.)"""

    def norms(gradients: Any) -> Tensor:
        real = [g.detach().float() for g in gradients if g is not None and not getattr(g, "_zero_padding", False)]
        return torch.stack(torch._foreach_norm(real)) if real else torch.zeros(1, device=zero.device)

    def has_overflow() -> Tensor:
        everything = [g for group in zero.averaged_gradients.values() for g in group or ()]
        return ~norms(everything).isfinite().all().reshape(1)

    def norm(gradients: Any, params: Any, norm_type: int = 2) -> Tensor:
        assert norm_type == 2, norm_type
        squares = norms(gradients).square().sum()
        torch.distributed.all_reduce(squares, group=zero.dp_process_group)
        total = squares.sqrt()
        return torch.where(total.isfinite(), total, -torch.ones_like(total))  # DeepSpeed's mark of an overflow

    zero.has_overflow_partitioned_grads_serial = has_overflow
    zero.get_grad_norm_direct = norm


def _keep_pointers(zero: Any) -> None:
    """After each step ZeRO points every parameter, in Python, at the piece of the flat weights that it already is."""
    step = zero.step

    def lean_step(*args: Any, **kwargs: Any) -> Any:
        zero._update_model_bit16_weights = _nothing
        try:
            return step(*args, **kwargs)
        finally:
            del zero._update_model_bit16_weights  # back to the class's method: loading a checkpoint needs it

    zero.step = lean_step


def _reduce_nothing(zero: Any) -> None:
    """With one rank gradients would be copied together, divided by one and copied back."""

    def reduce_gradients(pipeline_parallel: bool = False) -> None:
        assert not pipeline_parallel
        zero.overlapping_partition_gradients_reduce_epilogue()

    zero.reduce_gradients = reduce_gradients


def _keep_flat_gradients(zero: Any) -> None:
    """A rank's gradients are copied into one tensor for the optimizer: a new one in each step, whose pages the operating system
    has to find and clear first. Here one is kept. (A GPU's allocator keeps it anyway, and lends it to others meanwhile.)"""
    original = zero._get_preflattened_grad_partition
    kept: dict[int, tuple[Tensor, list[Tensor]]] = {}

    def flat_gradients(group: int) -> Tensor:
        flat: Tensor | None = original(group)
        if flat is not None:
            return flat
        pieces = zero.averaged_gradients[group]
        if group not in kept:
            flat = torch.zeros(int(zero.partition_size[group]), dtype=pieces[0].dtype, device=pieces[0].device)
            sizes = [piece.numel() for piece in pieces]
            parts = torch.split(flat[: sum(sizes)], sizes)
            kept[group] = flat, [part.view_as(piece) for part, piece in zip(parts, pieces, strict=True)]
        flat, views = kept[group]
        torch._foreach_copy_(views, pieces)
        return flat

    zero._get_preflattened_grad_partition = flat_gradients
