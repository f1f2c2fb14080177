"""The certificate: one JSON that says whether G_LM may be cached, and everything it was judged by.

Its schema is in schema.py. Floats are rounded to six digits and are finite or null. No time of day, so that equal inputs are
equal bytes.

Decision: `files` holds the sha256 that `model.safetensors` and `g_lm.safetensors` of the bundle will have, computed from
the tensors that were measured. A bundle whose files have other hashes carries somebody else's certificate, and is refused.
"""

from __future__ import annotations

import math
import platform
from importlib import metadata
from typing import Any

import torch
from torch import Tensor

from pipeline.config import PostConfig
from pipeline.post.checks import Check, tier_of
from pipeline.post.schema import SCHEMA_VERSION as SCHEMA_VERSION
from pipeline.post.schema import Certificate
from pipeline.post.tensors import sha256_tensors
from pldr_model.model import PLDRModel

FULL_PROMPTS = 100  # with fewer held-out prompts than these the statement says so
PACKAGES = ("torch", "safetensors", "sentencepiece", "pldr")
THRESHOLDS = (
    "min_prompts",
    "variant_above",
    "approximate_above",
    "invariant_above",
    "max_relative_deviation_g",
    "min_attention_effect",
    "max_leak_gap",
    "max_leak_effect",
    "max_kl",
    "min_top1_agreement",
)
SETTINGS = ("prompts", "fp64_prompts", "generate_tokens", "generate_prompts", "g_from")


def bundle_tensors(model: PLDRModel) -> dict[str, Tensor]:
    """The weights a bundle keeps: everything but the metric learner, W, b, P, a, b_a, and a constant G."""
    return {name: t for name, t in model.state_dict().items() if ".plga." not in name and name != "g_lm"}


def bundle_g(g_LHKK: Tensor) -> dict[str, Tensor]:
    """What `g_lm.safetensors` holds."""
    return {"g_lm": g_LHKK.detach().cpu().float()}


def make_certificate(
    model: PLDRModel,
    g_LHKK: Tensor,
    config: PostConfig,
    *,
    measures: dict[str, Any],
    controls: dict[str, Any],
    checks: list[Check],
    prompts: dict[str, Any],
    lineage: dict[str, Any],
) -> dict[str, Any]:
    """Put the certificate together. The verdict is `certified` when every check that applies passed."""
    constant = model.config.g_source != "learned"
    deviation = measures["relative_deviation_g"]
    failed = [check for check in checks if not check.passed]
    tier = tier_of(deviation, config, constant=constant)
    by_precision = {name: found.get("G_LM", {}).get("max") for name, found in measures["deviations"].items()}
    certificate = {
        "schema_version": SCHEMA_VERSION,
        "verdict": "failed" if failed else "certified",
        "tier": tier,
        "statement": _statement(failed, tier, deviation, config, prompts["kinds"]["text"][0]),
        "constant_by_construction": constant,
        "failed": [{"measure": c.measure, "value": c.value, "threshold": c.threshold, "mend": c.mend} for c in failed],
        "checks": [check.as_dict() for check in checks],
        "measures": measures,
        "controls": controls,
        "thresholds": {name: getattr(config, name) for name in THRESHOLDS},
        "settings": {name: getattr(config, name) for name in SETTINGS},
        "prompts": prompts,
        "precision": {
            name: {"relative_deviation_g": value, "tier": tier_of(value, config, constant=constant)}
            for name, value in by_precision.items()
        },
        "model": {**model.config.to_dict(), "num_parameters": model.config.num_parameters()["total"]},
        "files": {
            "model.safetensors": sha256_tensors(bundle_tensors(model)),
            "g_lm.safetensors": sha256_tensors(bundle_g(g_LHKK)),
        },
        "lineage": lineage,
        "software": {"python": platform.python_version(), **{name: _version(name) for name in PACKAGES}},
    }
    plain = _finite(certificate)
    Certificate.model_validate(plain)  # what is written is what is described
    assert isinstance(plain, dict)
    return plain


def summary_lines(certificate: dict[str, Any]) -> list[str]:
    """The certificate for a terminal: the verdict, one line for each check, the mends, and the losses."""
    lines = [f"certificate: {certificate['verdict'].upper()} - {certificate['statement']}"]
    for check in certificate["checks"]:
        if check["skipped"]:
            mark, detail = "skip", check["skipped"]
        else:
            mark = " ok " if check["passed"] else "FAIL"
            value = "not measured" if check["value"] is None else f"{check['value']:.3g}"
            detail = f"{value} (needs {check['bound']} {check['threshold']:g})"
        lines.append(f"  {mark}  {check['measure']:<26} {detail}")
    losses = certificate["measures"]["losses"]
    if losses:
        shown = ", ".join(f"{name} {value:.4f}" for name, value in losses.items() if value is not None)
        lines.append(f"  held-out loss (nats) with G: {shown}")
    lines += [f"  mend  {failure['measure']}: {failure['mend']}" for failure in certificate["failed"]]
    return lines


def _statement(failed: list[Check], tier: str, deviation: float | None, config: PostConfig, num_prompts: int) -> str:
    few = (
        f"; judged by {num_prompts} held-out prompts only, {FULL_PROMPTS} are usual"
        if num_prompts < FULL_PROMPTS
        else ""
    )
    if failed:
        names = ", ".join(check.measure for check in failed)
        return f"G_LM must not be cached as if it were exact; failed: {names}{few}"
    if tier == "constant by construction":
        return f"G_LM is constant by construction: caching it is exact, and attention is alive{few}"
    assert deviation is not None
    return (
        f"G_LM may be cached: over inputs it deviates by {deviation:.1e} of its size in the worst head "
        f"({tier}; allowed {config.max_relative_deviation_g:g}), and attention is alive{few}"
    )


def _finite(value: Any) -> Any:
    """Plain JSON values; floats to six digits, NaN and infinity as null."""
    if isinstance(value, dict):
        return {str(key): _finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(inner) for inner in value]
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    assert value is None or isinstance(value, str | int | bool), type(value)
    return value


def _version(name: str) -> str | None:
    if name == "torch":
        return str(torch.__version__)
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None
