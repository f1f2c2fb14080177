"""Pictures of G_LM, one for each head, for the pages that show them.

Shapes: L layers, H heads, K head dim.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from pipeline.report.png import png_uri, scale_of

MAX_MAPS = 128  # heads that are drawn; of more, those that vary most


def head_maps(g_LHKK: Tensor, deviation_LH: Sequence[Sequence[float | None]] | None) -> list[dict[str, Any]]:
    """By layer: {"layer", "heads": [{"head", "uri", "scale"}]}; no `uri` and `scale` where a head is not finite.

    deviation_LH: how much each head varies, None where that is unknown, which is worst.
    """
    heads = [(layer, head) for layer in range(g_LHKK.shape[0]) for head in range(g_LHKK.shape[1])]
    if len(heads) > MAX_MAPS and deviation_LH is not None:
        of = {spot: deviation_LH[spot[0]][spot[1]] for spot in heads}
        worst = sorted(heads, key=lambda spot: -math.inf if (value := of[spot]) is None else -value)
        heads = sorted(worst[:MAX_MAPS])
    layers: dict[int, list[dict[str, Any]]] = {}
    for layer, head in heads[:MAX_MAPS]:
        g_KK = g_LHKK[layer, head]
        if not g_KK.isfinite().all():
            layers.setdefault(layer, []).append({"head": head, "uri": None, "scale": None})
            continue
        scale = scale_of(g_KK)
        layers.setdefault(layer, []).append({"head": head, "uri": png_uri(g_KK, scale), "scale": scale})
    return [{"layer": layer, "heads": found} for layer, found in layers.items()]
