"""Losses of a validation by the source of each target: `val/loss/SOURCE`.

A packed sequence holds text of several sources, so what is told apart are tokens, by the numbers that `tokens.sources` stores.
A target counts for its own source, also where it begins a document and is predicted after the end of another one. Sums and
counts are reduced over ranks and divided at the end, like every loss of a validation. A source without a target in the held-out
sequences has no loss.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class Sources:
    """Of held-out sequences: the names of the sources, and each token's number [n, S+1], 1 for the first name, 0 for
    padding."""

    names: tuple[str, ...]
    numbers: np.ndarray


class SourceLosses:
    """Sums and counts over this rank's targets; without sources nothing is done."""

    def __init__(self, sources: Sources | None, device: torch.device) -> None:
        self._sources = sources
        width = 0 if sources is None else len(sources.names) + 1
        self._sums = torch.zeros(2, width, dtype=torch.float64, device=device)  # losses and targets, by number

    def add(self, nll_BS: Tensor, targets_BS: Tensor, rows: np.ndarray, *, pad_id: int) -> None:
        """Add the losses (0 at padding) of these rows of the held-out sequences."""
        if self._sources is None:
            return
        numbers = torch.from_numpy(self._sources.numbers[rows, 1:].reshape(-1)).to(nll_BS.device)
        losses, counts = nll_BS.flatten().double(), (targets_BS.flatten() != pad_id).double()
        self._sums.index_add_(1, numbers, torch.stack([losses, counts]))

    def read(self) -> dict[str, float]:
        """The metrics; collective."""
        if self._sources is None:
            return {}
        dist.all_reduce(self._sums)
        rows = zip(self._sources.names, *self._sums[:, 1:].tolist(), strict=True)
        return {f"val/loss/{name}": loss / count for name, loss, count in rows if count}
