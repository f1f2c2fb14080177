"""The verdict: a function of a certificate's measures and thresholds, and of nothing else.

Decision: the writer judges the numbers as they are written (rounded), and a reader judges them again by the same function. So
no check can be left out, skipped, loosened or renamed in a certificate without a contradiction, and tier, verdict and
statement cannot claim more than the measures support. This is not a signature: someone who edits every number consistently is
not found out. Statements are compared word by word, also those on disk: their text may not change.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

from pydantic import ValidationError

from pipeline.bundle.certificate.checks import make_checks, rounded, tier_of
from pipeline.config.post import PostConfig, recorded

FULL_PROMPTS = 100  # with fewer held-out prompts than these the statement says so
# Keys of `post`, by what a certificate records of them and by which values ask less of a model (pipeline/config/post.py).
LOOSER_ABOVE = recorded("thresholds", looser="above")
LOOSER_BELOW = recorded("thresholds", looser="below")
THRESHOLDS = (*LOOSER_ABOVE, *LOOSER_BELOW)
LESS_BELOW = recorded("settings", looser="below")  # with smaller ones less was tried
SETTINGS = recorded("settings")
# Measured where everything was finite, and only there.
MEASURED = ("losses", "prefix", "agreement", "leak", "greedy", "fp64", "cached_rank")
COMPARED = ("value", "threshold", "bound", "skipped", "passed")  # of a check; a fix is advice


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


def judged(certificate: Mapping[str, Any]) -> dict[str, Any]:
    """The parts of a certificate that follow from its `measures`, `controls`, `thresholds`, `settings`, `prompts`, `model` and
    `lineage`. Raises ValueError, one line, for thresholds that no configuration may have."""
    config = _config_of(certificate)
    measures, model, prompts = certificate["measures"], certificate["model"], certificate["prompts"]
    budget = certificate["lineage"].get("invariance_budget", "missing")
    if not isinstance(model.get("g_source"), str) or not (budget is None or type(budget) in (int, float)):
        raise ValueError("model.g_source is not a string, or lineage.invariance_budget not a number")
    constant = model["g_source"] != "learned"
    deviation = measures["relative_deviation_g"]
    checks = [
        check.as_dict()
        for check in make_checks(
            measures,
            certificate["controls"],
            config,
            variant=model["g_source"],
            num_prompts=prompts["distinct"],
            budget=budget,
        )
    ]
    failed = failures(checks)
    tier = tier_of(deviation, config, constant=constant)
    by_precision = {name: found.get("G_LM", {}).get("max") for name, found in measures["deviations"].items()}
    return {
        "verdict": "failed" if failed else "certified",
        "tier": tier,
        "statement": _statement([f["measure"] for f in failed], tier, deviation, certificate),
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


def looser(certificate: Mapping[str, Any]) -> str:
    """Thresholds and settings looser than the defaults: "name value (default ...), ..."; empty when there are none."""
    values = {**certificate["thresholds"], **certificate["settings"]}
    found = []
    for name in (*THRESHOLDS, *LESS_BELOW):
        default = PostConfig.model_fields[name].default
        if values[name] > default if name in LOOSER_ABOVE else values[name] < default:
            found.append(f"{name} {values[name]:g} (default {default:g})")
    return ", ".join(found)


def contradiction(certificate: Mapping[str, Any]) -> str | None:
    """The first part of a certificate that does not follow from what was measured, in one line; None when all do."""
    try:
        ours = judged(certificate)
    except (ValueError, OverflowError) as error:  # an int may be too large for a float
        return str(error)
    if wrong := _inconsistent_measures(certificate):
        return wrong
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


def _config_of(certificate: Mapping[str, Any]) -> PostConfig:
    """The `post` configuration with these thresholds and settings. What it refuses certifies nothing."""
    thresholds, settings = certificate["thresholds"], certificate["settings"]
    for name, found, known in (("thresholds", thresholds, THRESHOLDS), ("settings", settings, SETTINGS)):
        if found.keys() != set(known):
            raise ValueError(f"{name}: not the keys of a certificate ({', '.join(sorted(found.keys() ^ set(known)))})")
    try:
        return PostConfig.model_validate({**thresholds, **settings})
    except ValidationError as error:
        first = error.errors()[0]
        where = "".join(f".{part}" for part in first["loc"])
        raise ValueError(f"post{where}: {first['msg'].removeprefix('Value error, ')}") from None


def _inconsistent_measures(certificate: Mapping[str, Any]) -> str | None:
    """The first summary among the measures that their details contradict."""
    measures, controls, prompts = certificate["measures"], certificate["controls"], certificate["prompts"]
    learned = certificate["model"]["g_source"] == "learned"
    if "text" not in prompts["kinds"] or not 2 <= prompts["distinct"] <= prompts["kinds"]["text"][0]:
        return f"prompts: {prompts['distinct']} different ones do not match the number of held-out ones"
    if measures["deviations"].keys() != {"fp32", "fp64"}:
        return "measures.deviations: not exactly fp32 and fp64"
    worst: list[float | None] = []
    for precision, tensors in measures["deviations"].items():
        if not learned and set(tensors) - {"G_LM"}:
            return f"measures.deviations.{precision}: a constant G_LM has no other deduced tensors"
        if wrong := _inconsistent_details(tensors, f"measures.deviations.{precision}"):
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
    untrained = controls.get("untrained")
    if learned is not bool(untrained):
        return "controls.untrained: missing" if learned else "controls.untrained: a constant G_LM has none"
    if untrained:
        tensors = untrained["deviations"]
        if untrained["relative_deviation_g"] != tensors.get("G_LM", {}).get("max"):
            return "controls.untrained.relative_deviation_g does not match its G_LM"
        return _inconsistent_details(tensors, "controls.untrained.deviations")
    return None


def _inconsistent_details(tensors: Mapping[str, Any], where: str) -> str | None:
    """The first tensor whose `max` does not match its kinds, or its heads."""
    for name, found in tensors.items():
        heads = [value for row in found["per_head"] for value in row]
        if found["max"] != largest(found["by_kind"].values()) or found["max"] != largest(heads):
            return f"{where}.{name}.max is not the largest of its kinds and heads"
    return None


def largest(values: Iterable[float | None]) -> float | None:
    """The largest; None when there is none, or any could not be measured."""
    known = list(values)
    finite = [value for value in known if value is not None and math.isfinite(value)]
    return max(finite) if finite and len(finite) == len(known) else None


def _statement(failed: list[str], tier: str, deviation: float | None, certificate: Mapping[str, Any]) -> str:
    """The certificate in one sentence."""
    distinct, loose = certificate["prompts"]["distinct"], looser(certificate)
    limits = ""
    if distinct < FULL_PROMPTS:
        limits = f"; judged by {distinct} held-out prompts only, {FULL_PROMPTS} are usual"
    if loose:
        limits += f"; thresholds looser than the defaults: {loose}"
    if failed:
        return f"G_LM must not be cached as if it were exact; failed: {', '.join(failed)}{limits}"
    if tier == "constant by construction":
        return f"G_LM is constant by construction: caching it is exact, and attention is alive{limits}"
    assert deviation is not None
    return (
        f"G_LM may be cached: over inputs it deviates by {deviation:.1e} of its size in the worst head "
        f"({tier}; allowed {certificate['thresholds']['max_relative_deviation_g']:g}), and attention is alive{limits}"
    )
