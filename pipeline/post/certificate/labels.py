"""Labels of the certificate's page, and the verdict in plain words."""

from __future__ import annotations

from typing import Any

from pipeline.bundle.certificate.checks import FOLLOWS
from pipeline.bundle.certificate.statement import rounded_up
from pipeline.bundle.certificate.verdict import looser
from pipeline.report.numbers import number

Tree = dict[str, Any]
CHECK_LABELS = {
    "held_out_prompts": "distinct held-out prompts",
    "ids_covered": "ids of the vocabulary that some prompt holds",
    "not_finite": "weights, tensors and logits with NaN or infinity",
    "relative_deviation_g": "how much G_LM changes with the input (worst head, worst prompt)",
    "relative_deviation_g_fp32": "how much G_LM changes in the model's own precision",
    "cached_g_deviation": "how far the cached G_LM is from the mean of the model's own",
    "query_deviation_g": "how much the input changes G_LM in the directions of the queries",
    "worst_row_deviation": "how much G_LM changes for the worst rows there are, searched",
    "attention_effect_zero": "loss increase without G_LM (G = 0), nats",
    "attention_effect_identity": "loss increase with plain attention (G = identity), nats",
    "leak_gap": "gap between the block loss and one that cannot leak, nats",
    "leak_effect": "how much a changed ending changes the logits before it",
    "cache_gap": "change of the loss when G_LM is cached, nats",
    "random_tokens_gap": "change of the loss with a G_LM from random tokens, nats",
    "kl": "KL of cached against live outputs, nats per token",
    "kl_short": "KL after short prompts, nats per token",
    "top1_agreement": "share of tokens with the same top-1, cached and live",
    "top1_agreement_short": "share of tokens with the same top-1 after short prompts",
    "greedy_agreement": "share of greedy decisions equal to those without any cache",
    "negative_control": "how much the untrained model's G_LM changes (must be large)",
}
FAILED_WHY = {  # what it means that a check failed
    "held_out_prompts": "too few different texts were held out to prove anything",
    "ids_covered": "some ids were in no prompt, so nothing is known of them",
    "not_finite": "there is NaN or infinity in the model, so nothing could be measured",
    "relative_deviation_g": "G_LM still changes with the input, so a cached one is not the one that the model computes",
    "relative_deviation_g_fp32": "in the precision that the model runs in, G_LM changes more than round-off explains",
    "cached_g_deviation": "the cached G_LM is another one than the model computes",
    "query_deviation_g": "G_LM changes with the input just where queries are, so attention changes",
    "worst_row_deviation": "there are inputs, in the prompts or not, for which G_LM is another one",
    "attention_effect_zero": "the model predicts as well without G_LM: its attention is dead, and agreement proves nothing",
    "attention_effect_identity": "the model predicts as well with plain attention: G_LM does nothing",
    "leak_gap": "the live G_LM has seen the tokens to be predicted, and the loss shows it",
    "leak_effect": "later tokens change the predictions of earlier ones",
    "cache_gap": "caching G_LM changes the held-out loss",
    "random_tokens_gap": "G_LM of random tokens gives another loss than G_LM of text, so it is no constant",
    "kl": "caching G_LM changes the probabilities of the next token",
    "kl_short": "caching G_LM changes what short prompts give",
    "top1_agreement": "caching G_LM changes which next token is the most likely",
    "top1_agreement_short": "caching G_LM changes which next token is the most likely after short prompts",
    "greedy_agreement": "caching G_LM changes generated text",
    "negative_control": "the untrained model passes this measure too, so the measure proves nothing",
}
LOSS_LABELS = {
    "block": "live: deduced from the whole sequence (sees future tokens unless invariant)",
    "cached": "cached: what the bundle serves",
    "mean": "mean over these prompts",
    "other": "of another prompt (cannot leak)",
    "random_tokens": "from random tokens",
    "plain": "projected on plain attention with rotated frequencies",
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
                f"{_proven(certificate)}Over every kind of prompt tried, G_LM stayed constant to {number(deviation)} of its "
                f"size in the worst head. Computed once, it replaces the network that deduces it, "
                f"{_effect_on_outputs(certificate, loose)}."
            )
        if loose:
            why += f" The thresholds are looser than the defaults: {loose}."
        return {"passed": True, "title": "Certified: G_LM may be cached", "why": why}
    return {"passed": False, "title": "Not certified: G_LM must not be cached", "why": _why_not(certificate)}


def _proven(certificate: Tree) -> str:
    """What a proof that closed says, for the page's first lines."""
    if certificate["tier"] != "proven":
        return ""
    bound = number(rounded_up(certificate["measures"]["proof"]["bound"]))
    return f"For every input of any length, in exact arithmetic, G_LM stays constant to {bound} of its size. "


def _why_not(certificate: Tree) -> str:
    """Why a certificate failed, in a sentence or two."""
    names = [failure["measure"] for failure in certificate["failed"]]
    if names == ["held_out_prompts"]:
        return "No measurement speaks against it, but there were too few prompts to prove anything."
    if "not_finite" in names:
        return "The model has NaN or infinity in it, so it cannot be shown that caching would not change its outputs."
    if "relative_deviation_g" in names:
        deviation = certificate["measures"]["relative_deviation_g"]
        if deviation is None:
            return "How much G_LM changes with the input could not be measured."
        share = f"{deviation:.0%}" if deviation >= 0.01 else number(deviation)
        return (
            f"G_LM changes with the input by {share} of its size in the worst head. Computed once, it would be another one "
            "than the model computes, so a cache would change the outputs."
        )
    return "A cached G_LM would change the model's outputs, or it could not be shown that it would not."


def failures(certificate: Tree) -> list[Tree]:
    """What failed: label, why in plain words, value, what is required, fix (none where another failure is the cause).
    Nothing is claimed of what could not be measured."""
    found = [check for check in certificate["checks"] if not check["passed"]]
    broken = any(check["measure"] == "not_finite" for check in found)  # the cause of whatever has no value
    return [
        {
            "measure": check["measure"],
            "label": CHECK_LABELS.get(check["measure"], check["measure"]),
            "why": "" if check["value"] is None else FAILED_WHY.get(check["measure"], ""),
            "value": "not measured" if check["value"] is None else number(check["value"]),
            "required": required(check),
            "fix": "" if check["fix"].endswith(FOLLOWS) or (check["value"] is None and broken) else check["fix"],
        }
        for check in found
    ]


def required(check: Tree) -> str:
    """The bound of a check."""
    return f"{'≤' if check['bound'] == '<=' else '≥'} {number(check['threshold'])}"


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
    return "and on these prompts the outputs stay the same"
