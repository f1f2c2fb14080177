"""Labels of the certificate's page, and the verdict in plain words."""

from __future__ import annotations

import math
from typing import Any

from pipeline.bundle.certificate.verdict import looser

Tree = dict[str, Any]
CHECK_LABELS = {
    "held_out_prompts": "distinct held-out prompts",
    "not_finite": "tensors with NaN or infinity",
    "relative_deviation_g": "how much G_LM changes with the input (worst head)",
    "attention_effect_zero": "loss increase without G_LM (G = 0), nats",
    "attention_effect_identity": "loss increase with plain attention (G = identity), nats",
    "leak_gap": "gap between the block loss and one that cannot leak, nats",
    "leak_effect": "how much a changed ending changes the logits before it",
    "cache_gap": "change of the loss when G_LM is cached, nats",
    "random_tokens_gap": "change of the loss with a G_LM from random tokens, nats",
    "kl": "KL of cached against live outputs, nats per token",
    "top1_agreement": "share of tokens with the same top-1, cached and live",
    "greedy_agreement": "share of greedy decisions equal to those without any cache",
    "negative_control": "how much the untrained model's G_LM changes (must be large)",
}
LOSS_LABELS = {
    "block": "live: deduced from the whole sequence (sees future tokens unless invariant)",
    "cached": "cached: what the bundle serves",
    "mean": "mean over these prompts",
    "other": "of another prompt (cannot leak)",
    "random_tokens": "from random tokens",
    "identity": "identity (plain attention)",
    "zero": "zero (attention averages)",
}


def plain_verdict(certificate: Tree) -> Tree:
    """The verdict as a heading and two sentences, for readers who do not know the measures."""
    deviation, loose = certificate["measures"]["relative_deviation_g"], looser(certificate)
    if certificate["verdict"] == "certified":
        if certificate["constant_by_construction"]:
            why = "G_LM is a constant of this model by construction, so caching it is exact."
        else:
            why = (
                f"Over every kind of prompt tried, G_LM stayed constant to {number(deviation)} of its size in the worst head. "
                f"Computed once, it replaces the network that deduces it, {_effect_on_outputs(certificate, loose)}."
            )
        if loose:
            why += f" The thresholds are looser than the defaults: {loose}."
        return {"passed": True, "title": "Certified: G_LM may be cached", "why": why}
    failed = [CHECK_LABELS.get(failure["measure"], failure["measure"]) for failure in certificate["failed"]]
    if [failure["measure"] for failure in certificate["failed"]] == ["held_out_prompts"]:
        why = "No measurement speaks against it, but there were too few prompts to prove anything."
    else:
        why = "A cached G_LM would change the model's outputs, or it could not be shown that it would not."
    return {
        "passed": False,
        "title": "Not certified: G_LM must not be cached",
        "why": f"{why} Failed: {'; '.join(failed)}.",
    }


def _effect_on_outputs(certificate: Tree, loose: str) -> str:
    """What caching does to the outputs. Some greedy texts may differ although their check passes: it is a rate per decision."""
    if loose:
        return "within the configured thresholds"
    greedy = certificate["measures"]["greedy"]
    differ = 1 - (greedy["identical"] or 0.0)
    if differ > 0:
        return (
            f"and nearly all outputs stay the same: {differ:.0%} of {greedy['num_prompts']} greedy texts differ from some "
            "token on"
        )
    return "and the outputs stay the same"


def number(value: Any) -> str:
    """A number for a table: short; a dash for a missing one."""
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return "-"
    if isinstance(value, int) or (value == int(value) and abs(value) < 1e6):
        return f"{int(value):,}"
    return f"{value:.1e}".replace(".0e", "e") if abs(value) < 1e-2 or abs(value) >= 1e5 else f"{value:.4g}"
