"""The verdict: a function of a certificate's measures and thresholds, and of nothing else.

Decision: the writer judges the numbers as they are written (rounded), and a reader judges them again by the same function. So
no check can be left out, skipped, loosened or renamed in a certificate without a contradiction, and tier, verdict and
statement cannot claim more than the measures support. This is not a signature: someone who edits every number consistently is
not found out. Every certificate is judged by the rules of its own schema.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from pipeline.bundle.certificate.checks import Check, Tier, make_checks, rounded, tier_of, tier_with_proof
from pipeline.bundle.certificate.consistency import inconsistent
from pipeline.bundle.certificate.earlier import EARLIER
from pipeline.bundle.certificate.rules import Rules, Tree
from pipeline.bundle.certificate.statement import statement
from pipeline.config.post import PostConfig, recorded

COMPARED = ("value", "threshold", "bound", "skipped", "passed")  # of a check; a fix is advice


def _checks(certificate: Tree, config: PostConfig) -> list[Check]:
    return make_checks(
        certificate["measures"],
        certificate["controls"],
        config,
        variant=certificate["model"]["g_source"],
        num_prompts=certificate["prompts"]["distinct"],
        budget=certificate["lineage"]["invariance_budget"],
    )


def _tier(certificate: Tree, config: PostConfig) -> Tier:
    return tier_with_proof(certificate["measures"], config, constant=certificate["model"]["g_source"] != "learned")


# Which values of a key ask less of a model stands beside the key (pipeline/config/post.py).
TODAY = Rules(
    config=PostConfig,
    above=recorded("thresholds", looser="above"),
    below=recorded("thresholds", looser="below"),
    less=recorded("settings", looser="below"),
    settings=recorded("settings"),
    checks=_checks,
    tier=_tier,
    statement=statement,
    inconsistent=inconsistent,
)
RULES = {4: EARLIER, 5: TODAY}  # by schema_version


def plain(value: Any) -> Any:
    """Plain JSON values; floats to nine digits, NaN and infinity as null."""
    if isinstance(value, Mapping):
        return {str(key): plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [plain(inner) for inner in value]
    if isinstance(value, float):
        return rounded(value)
    assert value is None or isinstance(value, str | int | bool), type(value)
    return value


def judged(certificate: Tree) -> dict[str, Any]:
    """The parts of a certificate that follow from its `measures`, `controls`, `thresholds`, `settings`, `prompts`, `model` and
    `lineage`. Raises ValueError, one line, for thresholds that no configuration may have."""
    rules = RULES[certificate["schema_version"]]
    config = rules.config_of(certificate)
    if wrong := _origin(certificate):
        raise ValueError(wrong)
    constant = certificate["model"]["g_source"] != "learned"
    checks = [check.as_dict() for check in rules.checks(certificate, config)]
    failed, tier = failures(checks), rules.tier(certificate, config)
    by_precision = {
        name: found.get("G_LM", {}).get("max") for name, found in certificate["measures"]["deviations"].items()
    }
    names = [failure["measure"] for failure in failed]
    return {
        "verdict": "failed" if failed else "certified",
        "tier": tier,
        "statement": rules.statement(certificate, tier, names, rules.looser(certificate)),
        "constant_by_construction": constant,
        "failed": failed,
        "checks": checks,
        "precision": {
            name: {"relative_deviation_g": value, "tier": tier_of(value, config, constant=constant)}
            for name, value in by_precision.items()
        },
    }


def failures(checks: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The failed checks, in their short form."""
    return [{k: c[k] for k in ("measure", "value", "threshold", "fix")} for c in checks if not c["passed"]]


def looser(certificate: Tree) -> str:
    """Thresholds and settings looser than the defaults: "name value (default ...), ..."; empty when there are none."""
    return RULES[certificate["schema_version"]].looser(certificate)


def contradiction(certificate: Tree) -> str | None:
    """The first part of a certificate that does not follow from what was measured, in one line; None when all do."""
    rules = RULES[certificate["schema_version"]]
    try:
        rules.config_of(certificate)
        if wrong := _origin(certificate) or rules.inconsistent(certificate):
            return wrong
        ours = judged(certificate)
    except (ValueError, OverflowError) as error:  # an int may be too large for a float
        return str(error)
    checks = certificate["checks"]
    names, expected = [c["measure"] for c in checks], [c["measure"] for c in ours["checks"]]
    if names != expected:
        odd = [name for name in expected if name not in names] or [name for name in names if name not in expected]
        return f"checks: not all of them, each once, in order ({', '.join(odd) or 'wrong order'})"
    for check, made in zip(checks, ours["checks"], strict=True):
        for key in COMPARED:
            if check[key] != made[key]:
                return f"checks: {check['measure']}: {key} {check[key]!r} does not follow from the measures ({made[key]!r})"
    if certificate["failed"] != failures(checks):
        return f"`failed` does not name the checks that failed ({', '.join(f['measure'] for f in ours['failed']) or 'none'})"
    for key in ("verdict", "tier", "constant_by_construction", "precision", "statement"):
        if certificate[key] != ours[key]:
            return f"{key} {certificate[key]!r} does not follow from the checks and measures"
    return None


def _origin(certificate: Tree) -> str | None:
    """What the checks need of model and lineage, and is not there."""
    source, budget = certificate["model"].get("g_source"), certificate["lineage"].get("invariance_budget", "missing")
    if not isinstance(source, str) or not (budget is None or type(budget) in (int, float)):
        return "model.g_source is not a string, or lineage.invariance_budget not a number"
    return None
