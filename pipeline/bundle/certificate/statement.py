"""A certificate in a few short sentences: the verdict, then what was found, and what it rests on.

Readers compare statements word by word, also those on disk: this text may not change without a new schema.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from decimal import ROUND_CEILING, Context

from pipeline.bundle.certificate import key_rank
from pipeline.bundle.certificate.checks import Tier
from pipeline.bundle.certificate.rules import FULL_PROMPTS, Tree

CONFIDENCE = 0.95
EXACT = "for every input of any length, in exact arithmetic, G_LM deviates by at most"


def statement(certificate: Tree, tier: Tier, failed: list[str], looser: str) -> str:
    """The certificate's statement, without the last period. looser: thresholds looser than the defaults, in words."""
    constant = tier == "constant by construction"
    found = [_verdict(certificate, tier, failed)]
    if not failed:
        found += [_alive(certificate), _plain(certificate)]
    if not constant:
        found.append(sampled(certificate))
    if section := certificate.get(key_rank.SECTION):
        found.append(key_rank.describe(section, certificate["model"]["head_dim"]))
    found += [_limits(certificate), f"Thresholds looser than the defaults: {looser}" if looser else ""]
    return ". ".join(part for part in found if part)


def highest_share(deviating: int, number: int) -> float:
    """The share that `deviating` of `number` independent samples rule out, with 95 % confidence: Clopper and Pearson's upper
    bound, the p at which so few or fewer are found with probability 5 %."""
    assert deviating >= 0 and number > 0
    if deviating >= number:
        return 1.0
    if deviating == 0:
        return float(1 - (1 - CONFIDENCE) ** (1 / number))
    low, high = 0.0, 1.0
    for _ in range(60):  # to the last bit
        middle = (low + high) / 2
        low, high = (middle, high) if _at_most(deviating, number, middle) > 1 - CONFIDENCE else (low, middle)
    return high


def sampled(certificate: Tree) -> str:
    """What the text prompts can say of others like them. Prompts of one document are one sample, not many."""
    prompts, allowed = certificate["prompts"], certificate["thresholds"]["max_relative_deviation_g"]
    if certificate["measures"]["not_finite"]:
        return ""
    documents, deviating = prompts["documents"], prompts["deviating"]
    number = min(prompts["distinct"], prompts["distinct"] if documents is None else documents)
    origin = "" if documents is None else f" from {_count(documents, 'document')}"
    what = "of documents do" if documents is not None and documents < prompts["distinct"] else "of such prompts do"
    share = highest_share(min(deviating, number), number)
    largest = certificate["measures"]["relative_deviation_g_fp32"]  # all prompts are measured so, and only some in fp64
    where = f" in fp32, by up to {largest:.1e}" if deviating and largest is not None else ""
    bound = f"with 95 % confidence fewer than {100 * share:.3g} % {what}" if share < 1 else "nothing bounds their share"
    count = prompts["kinds"]["text"][0]
    return f"{deviating} of {count} text prompts{origin} deviated by more than {allowed:g}{where}: {bound}"


def _verdict(certificate: Tree, tier: Tier, failed: list[str]) -> str:
    measures = certificate["measures"]
    if failed:
        return f"G_LM must not be cached as if it were exact; failed: {', '.join(failed)}"
    if tier == "constant by construction":
        return "G_LM may be cached: it is constant by construction, so caching it is exact"
    name, allowed = "" if tier == "proven" else f"{tier}; ", certificate["thresholds"]["max_relative_deviation_g"]
    deviation, worst_row = rounded_up(measures["relative_deviation_g"]), measures["worst_row"]["max"]
    found = (
        f"over prompts in fp64 it deviates by at most {deviation:.1e} of its size in the worst head "
        f"({name}allowed {allowed:g}), and over the worst rows that a search found by {worst_row:.1e}"
    )
    proof = measures["proof"]
    if tier == "proven":
        return f"G_LM may be cached: {EXACT} {rounded_up(proof['bound']):.1e} (proven); {found}"
    return f"G_LM may be cached: {found}. It is not proven for every input: {_why_unproven(proof)}"


def _why_unproven(proof: Tree) -> str:
    if not proof:
        return "no proof was tried (post.prove)"
    return (
        "the proof does not close" if proof["bound"] is None else f"the proof allows {rounded_up(proof['bound']):.1e}"
    )


def _alive(certificate: Tree) -> str:
    """Which layers G_LM is alive in: those in which its loss alone costs enough."""
    effects, least = certificate["measures"]["effects"], certificate["thresholds"]["min_attention_effect"]
    of = certificate["model"]["num_layers"]
    if not effects:
        return ""
    alive = effects["alive_layers"]
    if not alive:
        return (
            f"Attention is alive in the layers together: G = 0 in one layer alone nowhere costs {least:g} nats or more"
        )
    each = "it" if len(alive) == 1 else "any one of them"
    words = f"Attention is alive in {_layers(alive, of)}: G = 0 in {each} alone costs {least:g} nats or more"
    if certificate["model"]["g_source"] == "identity":
        return words
    better = [i for i, value in enumerate(effects["per_layer"]["identity"]) if value is not None and value >= least]
    return (
        f"{words}, and so does the identity"
        if better == alive
        else f"{words}; the identity does in {_layers(better, of)}"
    )


def _plain(certificate: Tree) -> str:
    """How much of G_LM plain attention could do."""
    losses = certificate["measures"]["losses"]
    if certificate["model"]["g_source"] == "identity" or losses.get("plain") is None:
        return ""
    identity, plain = (round(losses[name] - losses["cached"], 3) + 0.0 for name in ("identity", "plain"))  # no -0.000
    return (
        f"Replacing G_LM by the identity costs {identity:.3f} nats, and by its part that commutes with RoPE, which is plain "
        f"attention, {plain:.3f}"
    )


def _limits(certificate: Tree) -> str:
    """What the prompts leave out."""
    prompts, context = certificate["prompts"], certificate["model"]["context_length"]
    distinct, longest = prompts["distinct"], prompts["kinds"]["text"][1]
    found = []
    if distinct < FULL_PROMPTS:
        found.append(f"It was judged by {distinct} held-out prompts only, {FULL_PROMPTS} are usual")
    if longest < context:
        found.append(f"It was measured up to {longest} of {context} tokens")
    return ". ".join(found)


def _layers(layers: Sequence[int], of: int) -> str:
    """`layers 0, 2 and 3 (of 4, counted from 0)`."""
    if not layers or len(layers) == of:
        return "every layer" if layers else "none"
    *most, last = [str(layer) for layer in layers]
    named = f"layers {', '.join(most)} and {last}" if most else f"layer {last}"
    return f"{named} (of {of}, counted from 0)"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def rounded_up(value: float) -> float:
    """Two digits, rounded up: what holds of a bound holds of a larger one."""
    return float(Context(prec=2, rounding=ROUND_CEILING).create_decimal(repr(value)))


def _at_most(count: int, number: int, share: float) -> float:
    """The probability of `count` or fewer among `number` samples, each found with probability `share`."""
    logs = (
        math.lgamma(number + 1) - math.lgamma(k + 1) - math.lgamma(number - k + 1)
        + k * math.log(share) + (number - k) * math.log1p(-share)
        for k in range(count + 1)
    )  # fmt: skip
    return math.fsum(math.exp(value) for value in logs)
