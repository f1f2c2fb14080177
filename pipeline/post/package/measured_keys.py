"""What low-rank keys cost on held-out text, against full keys and with the same weights.

Low-rank keys are measured as the full-size G_LM that their factors multiply to: the same numbers up to rounding, without a
cache. Bounded by `post.max_key_loss`, or by the `max_loss` that chose the ranks.

Shapes: L layers, H heads, K head dim, N sequences, T = S+1 tokens of a sequence, B batch, M new tokens.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pipeline.bundle.certificate.key_rank import cache_numbers, passed
from pipeline.bundle.certificate.verdict import plain
from pipeline.config.post import KeyRankConfig, PostConfig
from pipeline.post.measure.downstream import Agreement, Totals, compare, logits, nll
from pipeline.post.measure.generation import greedy_continuations
from pipeline.post.measure.observe import batches
from pipeline.post.measure.prompts import PromptKind, sha256_kinds
from pldr_model.decode.low_rank import truncate_g
from pldr_model.model import PLDRModel


def measure_keys(
    model: PLDRModel,
    g_LHKK: Tensor,
    rank_LH: Tensor,
    text_NT: Tensor,
    config: PostConfig,
    *,
    sha256: str,
) -> dict[str, Any]:
    """The certificate's section `key_rank`. model: with the weights that are stored, and sha256 that of their file;
    text_NT: held-out sequences without padding."""
    asked = config.key_rank
    assert asked is not None, "ranks come from a configuration"
    g_LHKK = g_LHKK.to(model.embedding.weight)
    low_LHKK = truncate_g(g_LHKK, rank_LH)
    ranks = rank_LH.tolist()
    section = plain(
        {
            "by": chosen_by(asked),
            "ranks": ranks,
            "sha256": sha256,
            **cache_numbers(ranks, model.config.head_dim),
            "prompts": len(text_NT),
            "prompts_sha256": sha256_kinds([PromptKind("key_rank", text_NT)]),
            **measure_outputs(model, g_LHKK, low_LHKK, text_NT),
            **_greedy(model, g_LHKK, low_LHKK, text_NT, config),
            "max_loss_difference": config.max_key_loss if asked.max_loss is None else asked.max_loss,
        }
    )
    assert isinstance(section, dict)
    return {**section, "passed": passed(section)}  # of the numbers as they are written


def chosen_by(asked: KeyRankConfig) -> str:
    """Which of the three keys chose the ranks."""
    return next(key for key in ("energy", "max_loss", "ranks") if getattr(asked, key) is not None)


@torch.inference_mode()
def measure_outputs(model: PLDRModel, g_LHKK: Tensor, low_LHKK: Tensor, text_NT: Tensor) -> dict[str, float]:
    """Losses in nats per token with each G_LM and their difference, KL(full || low), and top-1 agreement."""
    agreement, totals = Agreement(), Totals()
    for ids_BT in batches(text_NT, model):
        full_BSV, low_BSV = (logits(model, ids_BT[:, :-1], g) for g in (g_LHKK, low_LHKK))
        compare(agreement, full_BSV, low_BSV)
        for name, logits_BSV in (("full", full_BSV), ("low", low_BSV)):
            totals.add(name, nll(logits_BSV, ids_BT[:, 1:]).sum().item())
    full, low = (totals.sums[name] / agreement.tokens for name in ("full", "low"))
    found = agreement.as_dict()
    return {
        "loss_full": full,
        "loss": low,
        "loss_difference": low - full,
        "kl": found["kl"],
        "top1_agreement": found["top1"],
    }


@torch.inference_mode()
def _greedy(
    model: PLDRModel, g_LHKK: Tensor, low_LHKK: Tensor, text_NT: Tensor, config: PostConfig
) -> dict[str, float | int]:
    """Greedy texts with full keys, read again with low-rank ones: does each token stay the first choice? A text without a
    difference is the greedy text of both. NaN when any logits were not finite."""
    totals = Totals()
    count, size = config.generate_prompts, config.generate_tokens
    for ids_BS, num_new, broken in greedy_continuations(model, g_LHKK, text_NT, num_tokens=size, num_prompts=count):
        low_BSV = logits(model, ids_BS[:, :-1], low_LHKK)[:, -num_new:]
        same_BM = low_BSV.argmax(-1) == ids_BS[:, -num_new:]
        known = 1.0 if not broken and low_BSV.isfinite().all() else float("nan")
        totals.add("same", known * int(same_BM.sum()))
        totals.add("tokens", same_BM.numel())
        totals.add("identical", known * int(same_BM.all(-1).sum()))
        totals.add("texts", len(same_BM))
    sums = totals.sums
    return {
        "greedy_agreement": sums["same"] / sums["tokens"],
        "greedy_identical": sums["identical"] / sums["texts"],
        "greedy_texts": int(sums["texts"]),
        "greedy_tokens": int(sums["tokens"]),
    }
