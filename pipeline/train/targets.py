"""What is padding in sequences on the host, where looking costs no wait for the device, and which documents they hold.

A loss is a mean over targets, never over micro batches, ranks or sequences: with `tokens.packing` pad or best-fit they hold
different numbers of targets.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch


def with_documents(sequences: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
    """Sequences [n, S+1], and with `train.document_masks` the number of each token's document, from [2, n, S+1]."""
    return (sequences, None) if sequences.ndim == 2 else (sequences[0], sequences[1])


def masks(documents: np.ndarray | None, device: torch.device, rows: Any = slice(None)) -> dict[str, torch.Tensor]:
    """The model's argument `documents` for the inputs of these rows of sequences with documents [n, S+1]; none without them."""
    if documents is None:
        return {}
    return {"documents": torch.from_numpy(documents[rows, :-1]).to(device, non_blocking=True)}


def num_targets(sequences: np.ndarray, pad_id: int) -> int:
    """The targets that count in sequences [n, S+1]: their last S tokens without padding."""
    return int(np.count_nonzero(sequences[:, 1:] != pad_id))


def has_padding(sequences: np.ndarray, pad_id: int) -> bool:
    """Whether there is padding in the inputs, the first S tokens, of sequences [n, S+1]: the model's argument `padded`."""
    return bool((sequences[:, :-1] == pad_id).any())
