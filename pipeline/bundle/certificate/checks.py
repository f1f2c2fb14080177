"""Every check: its measure, its threshold, and the fix when it fails. How a value is measured is pipeline/post/measure/.

Decisions. A check passes only when its value is a finite number on the right side of its threshold. A value that could
not be measured (None, NaN, infinity) fails, so that nothing is certified by accident. Values and thresholds are rounded as
the certificate writes them *before* they are judged: a reader who judges the written numbers comes to the same verdict. A
reader compares the reasons in `skipped` word by word (verdict.py): those texts may not change. Fixes are advice and may.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, Protocol

from pipeline.config.post import PostConfig
from pipeline.config.schedule import BUDGET_PUBLISHED, BUDGET_TABLE, MORE_BUDGET

Tier = Literal[
    "variant", "approximate", "invariant", "at round-off", "proven", "constant by construction", "unknown"
]  # fmt: skip
FOLLOWS = "fix relative_deviation_g first"  # how the fix of a failure ends that follows from that one
CONSTANT = "G_LM is constant by construction: nothing is deduced from the input"


class Tiers(Protocol):
    """The thresholds between tiers."""

    @property
    def variant_above(self) -> float: ...
    @property
    def approximate_above(self) -> float: ...
    @property
    def invariant_above(self) -> float: ...


def rounded(value: float | None) -> float | None:
    """To nine digits, enough to distinguish any two fp32 numbers and losses 1e-8 apart; None when not finite."""
    return None if value is None or not math.isfinite(value) else float(f"{value:.9g}")


@dataclass(frozen=True)
class Check:
    """One judged measure. `skipped`: why it does not apply; it then counts as passed."""

    measure: str
    value: float | None
    threshold: float
    bound: Literal["<=", ">="]
    fix: str
    skipped: str | None = None

    @property
    def passed(self) -> bool:
        """Skipped, or a finite value on the right side."""
        if self.skipped is not None:
            return True
        if self.value is None or not math.isfinite(self.value):
            return False
        return self.value <= self.threshold if self.bound == "<=" else self.value >= self.threshold

    def as_dict(self) -> dict[str, Any]:
        """Its form in the certificate."""
        return {**asdict(self), "passed": self.passed}


def tier_of(deviation: float | None, config: Tiers, *, constant: bool) -> Tier:
    """The name for a relative deviation of G_LM over inputs (docs/certificate.md)."""
    if constant:
        return "constant by construction"
    if deviation is None or not math.isfinite(deviation):
        return "unknown"
    if deviation > config.variant_above:
        return "variant"
    if deviation > config.approximate_above:
        return "approximate"
    return "invariant" if deviation > config.invariant_above else "at round-off"


def tier_with_proof(measures: dict[str, Any], config: PostConfig, *, constant: bool) -> Tier:
    """The tier of `relative_deviation_g`; `proven` where a bound over every input there is, not only over the prompts, is
    small enough and nothing that was measured speaks against it."""
    tier, proof = tier_of(measures["relative_deviation_g"], config, constant=constant), measures.get("proof")
    bound = proof["bound"] if proof and proof["closed"] else None
    if tier not in ("invariant", "at round-off") or measures["not_finite"] or bound is None:
        return tier
    return "proven" if bound <= config.max_worst_row_deviation else tier


def make_checks(
    measures: dict[str, Any],
    controls: dict[str, Any],
    config: PostConfig,
    *,
    variant: str,
    num_prompts: int,
    budget: float | None,
) -> list[Check]:
    """Every judged measure, rounded. `measures` and `controls` as in the certificate; `variant`: g_source; `num_prompts`:
    distinct held-out prompts among those measured."""
    if budget is not None and budget >= BUDGET_PUBLISHED:
        enough = (
            f"the invariance budget of {budget:.2f} should have been enough for 8 residual units: with fewer raise "
            "model.num_reslayerA; else look for a loss spike, lower train.max_lr, train longer or raise "
            f"train.metric_weight_decay ({BUDGET_TABLE})"
        )
    else:
        spent = (
            "the invariance budget (pldr plan) is too small"
            if budget is None
            else f"the invariance budget was {budget:.2f}"
        )
        enough = f"{spent}: {MORE_BUDGET} ({BUDGET_TABLE})"
    not_finite = measures["not_finite"]
    losses, agreement = measures["losses"], measures["agreement"].get("cached", {})
    short = measures["agreement"].get("short", {})
    cached, coverage = losses.get("cached"), measures.get("coverage") or {}
    alive = (
        "attention is dead: the outputs do not depend on G_LM, so their agreement proves nothing; train longer, or lower "
        "train.weight_decay or train.max_lr"
    )
    identity_skip = {
        "identity": "G_LM is the identity: it cannot be told from itself",
        "constant": "G_LM is a trained parameter: a cache is exact, however near the identity it is",
    }.get(variant)
    control_skip = None if variant == "learned" else "G_LM is constant by construction: untrained it is as constant"
    deviation = Check(
        "relative_deviation_g",
        measures["relative_deviation_g"],
        config.max_relative_deviation_g,
        "<=",
        f"G_LM still depends on the input; {enough}",
    )
    then = enough if deviation.passed else FOLLOWS
    constant_skip = None if variant == "learned" else CONSTANT
    checks = [
        Check(
            "held_out_prompts",
            float(num_prompts),
            float(config.min_prompts),
            ">=",
            f"{num_prompts} different held-out prompts are too few to certify by: raise post.prompts or data.val_fraction, "
            "add more text, or lower post.min_prompts on purpose (the certificate will state the number)",
        ),
        Check(
            "ids_covered",
            _float(coverage.get("seen")),
            float(coverage.get("ids") or 1),
            ">=",
            "some ids of the vocabulary are in no prompt, so nothing is known of them: report this as a bug of the validator",
        ),
        Check(
            "not_finite",
            float(len(not_finite)),
            0.0,
            "<=",
            "NaN or infinity in " + "; ".join(causes(not_finite)[:3]) + ": training diverged: use an earlier checkpoint"
            if not_finite
            else "",
        ),
        deviation,
        Check(
            "relative_deviation_g_fp32",
            measures.get("relative_deviation_g_fp32"),
            config.max_relative_deviation_g_fp32,
            "<=",
            "G_LM is a constant in fp64 but not in the model's own precision: large terms cancel in it; look for heads whose "
            "a A_P and b_a are far larger than their sum"
            if deviation.passed
            else then,
        ),
        Check(
            "cached_g_deviation",
            measures.get("cached_g_deviation"),
            config.max_relative_deviation_g,
            "<=",
            "the cached G_LM is not the one that the model computes: run `pldr extract CONFIG --force`"
            if deviation.passed
            else then,
        ),
        Check(
            "query_deviation_g",
            (measures.get("query_deviation") or {}).get("max"),
            config.max_query_deviation,
            "<=",
            f"G_LM still depends on the input in the directions that queries have; {then}",
            constant_skip,
        ),
        Check(
            "worst_row_deviation",
            (measures.get("worst_row") or {}).get("max"),
            config.max_worst_row_deviation,
            "<=",
            f"there are inputs, though none among the prompts, for which G_LM is another one; {then}"
            if deviation.passed
            else f"G_LM still depends on the input; {then}",
            constant_skip,
        ),
        Check("attention_effect_zero", minus(losses.get("zero"), cached), config.min_attention_effect, ">=", alive),
        Check(
            "attention_effect_identity",
            minus(losses.get("identity"), cached),
            config.min_attention_effect,
            ">=",
            "G_LM does no better than the identity; train longer, or use model.g_source=identity",
            identity_skip,
        ),
        Check(
            "leak_gap",
            size(minus(losses.get("other"), losses.get("block"))),
            config.max_leak_gap,
            "<=",
            f"the block loss sees future tokens through G_LM and cannot be trusted; {then}",
        ),
        Check(
            "leak_effect",
            measures["leak"].get("worst_rms"),
            config.max_leak_effect,
            "<=",
            f"logits depend on later tokens: G_LM leaks; {then}"
            if not deviation.passed
            else "logits depend on later tokens although G_LM is constant: look for attention that is not causal",
        ),
        Check(
            "cache_gap",
            size(minus(cached, losses.get("block"))),
            config.max_leak_gap,
            "<=",
            f"caching G_LM changes the held-out loss; {then}",
        ),
        Check(
            "random_tokens_gap",
            size(minus(losses.get("random_tokens"), losses.get("block"))),
            config.max_leak_gap,
            "<=",
            f"a G_LM deduced from random tokens gives another loss than one from text; {then}",
        ),
        Check("kl", agreement.get("kl"), config.max_kl, "<=", f"caching G_LM changes the outputs; {then}"),
        Check(
            "kl_short", short.get("kl"), config.max_kl, "<=", f"caching G_LM changes what short prompts give; {then}"
        ),
        Check(
            "top1_agreement",
            agreement.get("top1"),
            config.min_top1_agreement,
            ">=",
            f"caching G_LM changes the top-1 token; {then}",
        ),
        Check(
            "top1_agreement_short",
            short.get("top1"),
            config.min_top1_agreement,
            ">=",
            f"caching G_LM changes the top-1 token of short prompts; {then}",
        ),
        Check(
            "greedy_agreement",
            measures["greedy"].get("per_decision"),
            config.min_top1_agreement,
            ">=",
            f"generated text with the cache differs from full recomputation; {then}",
        ),
        Check(
            "negative_control",
            (controls.get("untrained") or {}).get("relative_deviation_g"),
            config.max_relative_deviation_g,
            ">=",
            "the untrained model passes this measure too, so the measure or its threshold proves nothing: lower "
            "post.max_relative_deviation_g, or report this as a bug of the validator",
            control_skip,
        ),
    ]
    return [as_written(check) for check in checks]


def causes(not_finite: list[str]) -> list[str]:
    """What is not finite, in the order in which it explains the rest: ids, weights, tensors, then logits of whole kinds."""

    def rank(name: str) -> int:
        return 0 if " of id " in name else 1 if name.startswith("weight") else 3 if name.startswith("logits") else 2

    return sorted(not_finite, key=rank)


def as_written(check: Check) -> Check:
    """The check with its numbers rounded as the certificate writes them."""
    return replace(check, value=rounded(check.value), threshold=float(f"{check.threshold:.9g}"))


def _float(x: int | None) -> float | None:
    return None if x is None else float(x)


def minus(a: float | None, b: float | None) -> float | None:
    """The difference; None when either could not be measured."""
    return None if a is None or b is None else a - b


def size(x: float | None) -> float | None:
    """The absolute value; None when it could not be measured."""
    return None if x is None else abs(x)
