"""int4: 4-bit numbers in groups of 32 columns, and the scales that are closest to the weights.

Decision. A group's numbers are `(n - 8) * scale`, n in 0..15. The scale may be negative, so that the largest weight of a group
can be -8 whatever its sign. Of the largest weight at -8, 7 or 8 steps, each also shortened down to 0.7, the scale with the
least square error is taken. It is bf16, as the kernel has it, and the numbers are rounded with that very scale.

Shapes: R rows, C columns, G groups.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from pldr_model.decode.linear import BLOCK, GROUP

SHORTER = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7)
STEPS = (-8, 7, 8)


def quantize(weight_RC: Tensor) -> tuple[Tensor, Tensor]:
    """A weight as `Matrix.int4` takes it: numbers, two a byte, uint8 [R, 16 G], and scales, bf16 [R,G]."""
    rows = max(1, BLOCK // weight_RC.shape[1])
    parts = [_quantize(part_RC) for part_RC in torch.split(weight_RC.float(), rows)]
    values, scales = zip(*parts, strict=True)
    return torch.cat(values), torch.cat(scales)


def _quantize(weight_RC: Tensor) -> tuple[Tensor, Tensor]:
    rows, columns = weight_RC.shape
    groups_RGC = F.pad(weight_RC, (0, -columns % GROUP)).view(rows, -1, GROUP)
    largest_RG1 = groups_RGC.gather(-1, groups_RGC.abs().argmax(dim=-1, keepdim=True))
    best_RG1, least_RG1 = torch.zeros_like(largest_RG1), torch.full_like(largest_RG1, torch.inf)
    for share in SHORTER:
        for steps in STEPS:
            scale_RG1 = (largest_RG1 * share / steps).bfloat16().float()
            error_RG1 = (_integers(groups_RGC, scale_RG1) * scale_RG1 - groups_RGC).square().sum(dim=-1, keepdim=True)
            best_RG1 = torch.where(error_RG1 < least_RG1, scale_RG1, best_RG1)
            least_RG1 = torch.minimum(error_RG1, least_RG1)
    integers_RC = (_integers(groups_RGC, best_RG1) + 8).to(torch.uint8).view(rows, -1)
    return integers_RC[:, ::2] | integers_RC[:, 1::2] << 4, best_RG1.squeeze(-1).bfloat16()


def _integers(groups_RGC: Tensor, scale_RG1: Tensor) -> Tensor:
    """-8..7; zero where the scale is."""
    return torch.where(scale_RG1 == 0, 0.0, (groups_RGC / scale_RG1).round_().clamp_(-8, 7))
