"""Certificates of schema 3 and 4: their thresholds, checks and words, frozen, so that they are read as what they were.

They judged the RMS of the deviation over prompts, the worse of fp32 and fp64, and neither searched nor proved. Nothing here
may change: readers compare every part of an earlier certificate with what these rules make of its measures.
"""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from pipeline.bundle.certificate.checks import Check, Tier, as_written, minus, size, tier_of
from pipeline.bundle.certificate.consistency import largest, unlike_details, untrained
from pipeline.bundle.certificate.rules import Rules, Tree

FULL_PROMPTS = 100
MEASURED = ("losses", "prefix", "agreement", "leak", "greedy", "fp64", "cached_rank")
ABOVE = ("variant_above", "approximate_above", "invariant_above", "max_relative_deviation_g",
         "max_leak_gap", "max_leak_effect", "max_kl")  # fmt: skip
BELOW = ("min_prompts", "min_attention_effect", "min_top1_agreement")
LESS = ("fp64_prompts", "generate_tokens", "generate_prompts")


class EarlierPost(BaseModel):
    """Thresholds and settings with the bounds and defaults that they had."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    g_from: Literal["mean", "first"] = "mean"
    prompts: int = Field(128, ge=2)
    min_prompts: int = Field(100, ge=2)
    fp64_prompts: int = Field(16, ge=2)
    generate_tokens: int = Field(256, ge=1)
    generate_prompts: int = Field(16, ge=1)
    variant_above: float = Field(1e-2, gt=0, le=1e-2)
    approximate_above: float = Field(1e-5, gt=0, le=1e-5)
    invariant_above: float = Field(1e-6, gt=0, le=1e-6)
    max_relative_deviation_g: float = Field(1e-5, gt=0, le=1e-2)
    min_attention_effect: float = Field(0.05, gt=0)
    max_leak_gap: float = Field(1e-3, gt=0, le=0.1)
    max_leak_effect: float = Field(1e-4, gt=0, le=0.1)
    max_kl: float = Field(1e-4, gt=0, le=0.1)
    min_top1_agreement: float = Field(0.999, ge=0.9, le=1)

    @model_validator(mode="after")
    def _can_certify(self) -> EarlierPost:
        if not self.variant_above > self.approximate_above > self.invariant_above:
            raise ValueError("variant_above > approximate_above > invariant_above must hold")
        if self.max_relative_deviation_g > self.variant_above:
            raise ValueError("max_relative_deviation_g is above variant_above: a G_LM that varies is never certified")
        if self.prompts < self.min_prompts:
            raise ValueError(f"prompts {self.prompts} is below min_prompts {self.min_prompts}")
        return self


def _checks(certificate: Tree, config: EarlierPost) -> list[Check]:
    """Every judged measure, rounded. Fixes are advice, which a certificate on disk has its own of."""
    measures, variant = certificate["measures"], certificate["model"]["g_source"]
    losses, agreement = measures["losses"], measures["agreement"].get("cached", {})
    cached, block = losses.get("cached"), losses.get("block")
    identity = {
        "identity": "G_LM is the identity: it cannot be told from itself",
        "constant": "G_LM is a trained parameter: a cache is exact, however near the identity it is",
    }.get(variant)
    control = None if variant == "learned" else "G_LM is constant by construction: untrained it is as constant"
    gap, deviation, effect = config.max_leak_gap, config.max_relative_deviation_g, config.min_attention_effect
    fresh = (certificate["controls"].get("untrained") or {}).get("relative_deviation_g")
    found = [
        Check("held_out_prompts", float(certificate["prompts"]["distinct"]), float(config.min_prompts), ">=", ""),
        Check("not_finite", float(len(measures["not_finite"])), 0.0, "<=", ""),
        Check("relative_deviation_g", measures["relative_deviation_g"], deviation, "<=", ""),
        Check("attention_effect_zero", minus(losses.get("zero"), cached), effect, ">=", ""),
        Check("attention_effect_identity", minus(losses.get("identity"), cached), effect, ">=", "", identity),
        Check("leak_gap", size(minus(losses.get("other"), block)), gap, "<=", ""),
        Check("leak_effect", measures["leak"].get("worst_rms"), config.max_leak_effect, "<=", ""),
        Check("cache_gap", size(minus(cached, block)), gap, "<=", ""),
        Check("random_tokens_gap", size(minus(losses.get("random_tokens"), block)), gap, "<=", ""),
        Check("kl", agreement.get("kl"), config.max_kl, "<=", ""),
        Check("top1_agreement", agreement.get("top1"), config.min_top1_agreement, ">=", ""),
        Check("greedy_agreement", measures["greedy"].get("per_decision"), config.min_top1_agreement, ">=", ""),
        Check("negative_control", fresh, deviation, ">=", "", control),
    ]
    return [as_written(check) for check in found]


def _tier(certificate: Tree, config: EarlierPost) -> Tier:
    constant = certificate["model"]["g_source"] != "learned"
    return tier_of(certificate["measures"]["relative_deviation_g"], config, constant=constant)


def _statement(certificate: Tree, tier: Tier, failed: list[str], looser: str) -> str:
    """The certificate in one sentence."""
    distinct = certificate["prompts"]["distinct"]
    limits = ""
    if distinct < FULL_PROMPTS:
        limits = f"; judged by {distinct} held-out prompts only, {FULL_PROMPTS} are usual"
    if looser:
        limits += f"; thresholds looser than the defaults: {looser}"
    if failed:
        return f"G_LM must not be cached as if it were exact; failed: {', '.join(failed)}{limits}"
    if tier == "constant by construction":
        return f"G_LM is constant by construction: caching it is exact, and attention is alive{limits}"
    deviation = certificate["measures"]["relative_deviation_g"]
    return (
        f"G_LM may be cached: over inputs it deviates by {deviation:.1e} of its size in the worst head "
        f"({tier}; allowed {certificate['thresholds']['max_relative_deviation_g']:g}), and attention is alive{limits}"
    )


def _inconsistent(certificate: Tree) -> str | None:
    """The first summary among the measures that their details contradict."""
    measures, prompts = certificate["measures"], certificate["prompts"]
    learned = certificate["model"]["g_source"] == "learned"
    if "text" not in prompts["kinds"] or not 2 <= prompts["distinct"] <= prompts["kinds"]["text"][0]:
        return f"prompts: {prompts['distinct']} different ones do not match the number of held-out ones"
    if measures["deviations"].keys() != {"fp32", "fp64"}:
        return "measures.deviations: not exactly fp32 and fp64"
    worst: list[float | None] = []
    for precision, tensors in measures["deviations"].items():
        if not learned and set(tensors) - {"G_LM"}:
            return f"measures.deviations.{precision}: a constant G_LM has no other deduced tensors"
        if wrong := unlike_details(tensors, f"measures.deviations.{precision}"):
            return wrong
        worst.append(tensors.get("G_LM", {}).get("max"))
    if measures["relative_deviation_g"] != largest(worst):
        return "measures.relative_deviation_g is not the larger of fp32 and fp64"
    finite = not measures["not_finite"]
    if bool(measures["row_variance_ratio_A"]) is not learned:
        return "measures.row_variance_ratio_A: missing, or present for a model without A"
    for name in (*MEASURED, *(("order_parameter",) if learned else ())):
        if bool(measures[name]) is not finite:
            return f"measures.{name}: {'missing' if finite else 'measured although something was not finite'}"
    if finite and measures["leak"]["worst_rms"] != largest(
        [measures["leak"][what][rms] for what in ("last_token", "last_quarter") for rms in ("live_rms", "cached_rms")]
    ):
        return "measures.leak.worst_rms is not the largest of the four"
    return untrained(certificate["controls"], learned=learned)


EARLIER = Rules(
    config=EarlierPost,
    above=ABOVE,
    below=BELOW,
    less=LESS,
    settings=("g_from", "prompts", *LESS),
    checks=_checks,
    tier=_tier,
    statement=_statement,
    inconsistent=_inconsistent,
)
