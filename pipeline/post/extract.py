"""The G_LM of a model that will be cached: stage `extract`.

Background (2502.13502): the papers take G from one prompt. Decision: the mean over many held-out prompts is the default
(`post.g_from: mean`), summed in fp64 and kept in fp32, together with the standard deviation of every entry over the prompts;
`first` is the papers' method. For an invariant model the two agree to round-off, and the certificate shows it.

Shapes: N prompts, S tokens, L layers, H heads, K head dim.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from pipeline.bundle.extracted import SCHEMA_VERSION, ExtractedG
from pipeline.errors import UserError
from pipeline.post.measure.observe import batches
from pipeline.post.measure.prompts import PromptKind, sha256_kinds
from pipeline.post.measure.statistics import Spread
from pldr_model.model import PLDRModel


@torch.inference_mode()
def extract_g(model: PLDRModel, prompts_NS: Tensor, how: Literal["mean", "first"]) -> ExtractedG:
    """G_LM over prompts of one length. Memory does not grow with N.

    The spread is over all prompts, however G is chosen. Raises UserError naming layer and head when a G_LM is not
    finite, or when there are no prompts.
    """
    if len(prompts_NS) == 0:
        raise UserError("extract: no held-out prompts; raise data.val_fraction or add more text")
    spread, first_LHKK = Spread(), None
    for ids_BS in batches(prompts_NS, model):
        g_BLHKK = model.compute_g(ids_BS, padded=None).transpose(0, 1)
        bad_LH = ~g_BLHKK.isfinite().all(dim=0).all(dim=-1).all(dim=-1)
        if bad_LH.any():
            layer, head = bad_LH.nonzero()[0].tolist()
            raise UserError(
                f"extract: G_LM of layer {layer}, head {head} is not finite: training diverged; use an earlier checkpoint"
            )
        first_LHKK = g_BLHKK[0] if first_LHKK is None else first_LHKK
        spread.update(g_BLHKK)
    assert first_LHKK is not None
    g_LHKK = (spread.mean_LHKK if how == "mean" else first_LHKK).float().cpu()
    rms_LH = spread.rms().clamp_min(torch.finfo(torch.float64).tiny)
    record = {
        "schema_version": SCHEMA_VERSION,
        "how": how,
        "num_prompts": spread.count,
        "prompt_length": prompts_NS.shape[1],
        "prompts_sha256": sha256_kinds([PromptKind("extract", prompts_NS)]),
        "max_relative_spread": float((spread.rms_from(spread.mean_LHKK) / rms_LH).max()),
    }
    return ExtractedG(g_LHKK, spread.std().float().cpu(), record)
