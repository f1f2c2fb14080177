"""Weights and caches on huge pages, where Linux offers them.

A step reads every weight once, in pieces of a few MB. On pages of 4 KB a CPU spends a good part of that on finding the pages
(`pldr bench decode` says how much).
Decision: memory that is filled (weights) moves to huge pages by MADV_COLLAPSE (Linux 6.1); memory that is new (caches) is asked
to be on them before it is written to. Numbers and addresses stay as they are. Where the kernel has no such pages or none left,
nothing happens. PyTorch's own switch, THP_MEM_ALLOC_ENABLE, has to be set before the process starts, and does not reach weights
that oneDNN packs.
"""

from __future__ import annotations

import ctypes
import functools
import sys
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

HUGE = 1 << 21  # bytes of a huge page, on x86-64 and on arm64 with pages of 4 KB
MADV_HUGEPAGE, MADV_COLLAPSE = 14, 25  # Linux, include/uapi/asm-generic/mman-common.h
SMALL = 1 << 18  # bytes of a tensor that stays where it is: a cache keeps it
NEAR = 1 << 13  # bytes between the ends of two neighbors: malloc's own, and what is left of a page


def collapse(tensors: Iterable[Tensor]) -> int:
    """Move the memory of these tensors to huge pages; returns how many bytes are on them then. A third of a second for 100
    MB, the first time."""
    return _advise(tensors, MADV_COLLAPSE)


def zeros(*shape: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A tensor of zeros. Memory that the process has not used before (that of long caches) is on huge pages from the start."""
    tensor = torch.empty(shape, dtype=dtype, device=device)
    _advise([tensor], MADV_HUGEPAGE)
    return tensor.zero_()


def _advise(tensors: Iterable[Tensor], advice: int) -> int:
    """`advice` for all huge pages that hold a part of these tensors, if they are the process's throughout; returns the bytes of
    those for which it was taken. What else lies on them moves along."""
    madvise, taken = _madvise(), 0
    if madvise is None:
        return 0
    for start, end in _joined(_ranges(tensors)):
        for first in range(start // HUGE * HUGE, end, HUGE):
            taken += HUGE if madvise(first, HUGE, advice) == 0 else 0
    return taken


def _ranges(tensors: Iterable[Tensor]) -> list[tuple[int, int]]:
    """First address and the one behind the last, of those in the CPU's memory."""
    found = []
    for tensor in tensors:
        if tensor.is_mkldnn:
            start = torch.ops.mkldnn.data_ptr(tensor)
            found.append((start, start + torch.ops.mkldnn._nbytes(tensor)))
        elif tensor.device.type == "cpu":
            storage = tensor.untyped_storage()
            found.append((storage.data_ptr(), storage.data_ptr() + storage.nbytes()))
    return [(start, end) for start, end in found if end - start >= SMALL]


def _joined(ranges: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Neighbors as one: a huge page may hold the end of one and the beginning of the next."""
    joined: list[tuple[int, int]] = []
    for start, end in sorted(ranges):
        if joined and start - joined[-1][1] <= NEAR:
            joined[-1] = (joined[-1][0], max(end, joined[-1][1]))
        else:
            joined.append((start, end))
    return joined


@functools.cache
def _madvise() -> Callable[[int, int, int], int] | None:
    """The C library's, on Linux."""
    if not sys.platform.startswith("linux"):
        return None
    function = ctypes.CDLL(None).madvise
    function.argtypes, function.restype = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int], ctypes.c_int
    return function
