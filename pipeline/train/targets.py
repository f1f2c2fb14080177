"""What is padding in sequences on the host, where looking costs no wait for the device.

A loss is a mean over targets, never over micro batches, ranks or sequences: with `tokens.packing` pad or best-fit they hold
different numbers of targets.
"""

from __future__ import annotations

import numpy as np


def num_targets(sequences: np.ndarray, pad_id: int) -> int:
    """The targets that count in sequences [n, S+1]: their last S tokens without padding."""
    return int(np.count_nonzero(sequences[:, 1:] != pad_id))


def has_padding(sequences: np.ndarray, pad_id: int) -> bool:
    """Whether there is padding in the inputs, the first S tokens, of sequences [n, S+1]: the model's argument `padded`."""
    return bool((sequences[:, :-1] == pad_id).any())
