"""What the certificate's page calls things, and its verdict in plain words."""

from __future__ import annotations

import math
from typing import Any

from pipeline.bundle.certificate.verdict import looser

Tree = dict[str, Any]
WORDS = {
    "held_out_prompts": "held-out prompts it was judged by",
    "not_finite": "tensors with NaN or infinity",
    "relative_deviation_g": "how far G_LM moves with the input (worst head)",
    "attention_effect_zero": "nats lost without attention's G_LM (G = 0)",
    "attention_effect_identity": "nats lost with plain attention (G = identity)",
    "leak_gap": "nats between the block loss and one that cannot leak",
    "leak_effect": "how far a changed ending moves the logits before it",
    "cache_gap": "nats that caching G_LM costs",
    "random_tokens_gap": "nats lost with a G_LM from random tokens",
    "kl": "KL of cached against live answers, nats per token",
    "top1_agreement": "best token the same, cached and live",
    "greedy_agreement": "greedy decisions the same as without any cache",
    "negative_control": "how far the untrained model's G_LM moves (must be large)",
}
LOSSES = {
    "block": "live: deduced from the whole sequence (sees the future until invariant)",
    "cached": "cached: what the bundle serves",
    "mean": "mean over these very prompts",
    "other": "of another prompt (cannot leak)",
    "random_tokens": "from random tokens",
    "identity": "identity (plain attention)",
    "zero": "zero (attention averages)",
}


def plain_verdict(certificate: Tree) -> Tree:
    """The verdict in a heading and two sentences that need no knowledge of the measures."""
    deviation, loose = certificate["measures"]["relative_deviation_g"], looser(certificate)
    if certificate["verdict"] == "certified":
        if certificate["constant_by_construction"]:
            why = "G_LM is a constant of this model by construction, so there is nothing that a cache could get wrong."
        else:
            why = (
                f"Over every kind of prompt tried, G_LM stayed the same to {number(deviation)} of its size in the worst head. "
                f"Computed once, it replaces the network that deduces it, {_answers(certificate, loose)}."
            )
        if loose:
            why += f" The thresholds are looser than the defaults: {loose}."
        return {"passed": True, "title": "Certified: G_LM may be cached", "why": why}
    failed = [WORDS.get(failure["measure"], failure["measure"]) for failure in certificate["failed"]]
    if [failure["measure"] for failure in certificate["failed"]] == ["held_out_prompts"]:
        why = "Nothing that was measured speaks against it, but too few prompts were: this proves nothing yet."
    else:
        why = "A cached G_LM would give other answers than the model, or it cannot be shown that it would not."
    return {
        "passed": False,
        "title": "Not certified: G_LM must not be cached",
        "why": f"{why} Failed: {'; '.join(failed)}.",
    }


def _answers(certificate: Tree, loose: str) -> str:
    """What becomes of the answers. The check of greedy texts is a rate per decision: some texts may differ and it passes."""
    if loose:
        return "within the thresholds that were set"
    greedy = certificate["measures"]["greedy"]
    differ = 1 - (greedy["identical"] or 0.0)
    if differ > 0:
        return (
            f"and nearly every answer stays what it was: {differ:.0%} of {greedy['num_prompts']} greedy texts differ from some "
            "token on"
        )
    return "and the answers stay what they were"


def number(value: Any) -> str:
    """A number for a table: short, and a dash where there is none."""
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return "-"
    if isinstance(value, int) or (value == int(value) and abs(value) < 1e6):
        return f"{int(value):,}"
    return f"{value:.1e}".replace(".0e", "e") if abs(value) < 1e-2 or abs(value) >= 1e5 else f"{value:.4g}"
