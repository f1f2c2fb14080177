"""What huge pages give cached decoding: the products of a step with weights on them, beside those on pages as they come."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
import torch.nn.functional as F

from pipeline.bench.rounds import Work, in_rounds, speed_ratio
from pldr_model.config import ModelConfig
from pldr_model.decode import huge_pages


def huge_pages_gain(config: ModelConfig, rounds: int) -> float | None:
    """How many times as fast the fp32 products of a step at batch 1 are; None where weights cannot be moved or are small."""
    D, hidden = config.d_model, config.feed_forward_size
    layer = [(3 * D, D), (D, D), (2 * hidden, D), (D, hidden)]
    shapes = [*layer * config.num_layers, (config.vocab_size, D)]
    small, huge = ([torch.randn(shape) for shape in shapes] for _ in range(2))
    if not huge_pages.collapse(huge):
        return None
    inputs = {columns: torch.randn(1, columns) for columns in (D, hidden)}

    def products(weights: Sequence[torch.Tensor]) -> None:
        for weight in weights:
            F.linear(inputs[weight.shape[1]], weight)

    works: dict[str, Work] = {"small": partial(products, small), "huge": partial(products, huge)}
    for weights in (small, huge):
        products(weights)
    times = in_rounds(works, rounds, torch.device("cpu"))
    return speed_ratio(times["huge"].seconds, times["small"].seconds)
