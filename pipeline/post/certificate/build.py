"""Building the certificate: one JSON that states whether G_LM may be cached, with all the evidence.

Schema and verdict are pipeline/bundle/certificate/{schema,verdict}.py. Floats are rounded to nine digits and are finite or
null. It has no time of day, so that equal inputs give equal bytes.

Decision: `files` holds the sha256 that `model.safetensors` and `g_lm.safetensors` of the bundle will have, computed from
the tensors that were measured. A bundle whose files have other hashes has the certificate of another model, and is refused.
"""

from __future__ import annotations

import platform
from importlib import metadata
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor

from pipeline.bundle.certificate.schema import SCHEMA_VERSION, Certificate, first_fault
from pipeline.bundle.certificate.verdict import TODAY, judged, plain
from pipeline.bundle.format import certified_files
from pipeline.config.post import PostConfig
from pipeline.errors import UserError, first_line
from pipeline.report.numbers import beside
from pldr_model.model import PLDRModel

PACKAGES = ("torch", "safetensors", "sentencepiece", "pldr")


def make_certificate(
    model: PLDRModel,
    g_LHKK: Tensor,
    config: PostConfig,
    *,
    measures: dict[str, Any],
    controls: dict[str, Any],
    prompts: dict[str, Any],
    lineage: dict[str, Any],
) -> dict[str, Any]:
    """The certificate. The verdict is `certified` when every check that applies has passed.

    Raises UserError for thresholds that no configuration may have.
    """
    evidence = plain(
        {
            "schema_version": SCHEMA_VERSION,
            "measures": measures,
            "controls": controls,
            "thresholds": {name: getattr(config, name) for name in TODAY.thresholds},
            "settings": {name: getattr(config, name) for name in TODAY.settings},
            "prompts": prompts,
            "model": {**model.config.to_dict(), "num_parameters": model.config.num_parameters()["total"]},
            "files": certified_files(model, g_LHKK),
            "lineage": lineage,
            "software": software(model.embedding.weight.device),
        }
    )
    try:
        certificate = {**evidence, **judged(evidence)}
        Certificate.model_validate(certificate)  # what is written follows the schema
    except ValueError as error:
        fault = first_fault(error) if isinstance(error, ValidationError) else first_line(error)
        raise UserError(f"validate: not a valid certificate: {fault}; check `post` in the configuration") from None
    return certificate


def software(device: torch.device) -> dict[str, str | None]:
    """The versions and device that computed the numbers; their last digits depend on them."""
    return {
        "python": platform.python_version(),
        **{name: _version(name) for name in PACKAGES},
        "cuda": torch.version.cuda,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu {platform.machine()}",
        "threads": str(torch.get_num_threads()),
    }


# Checks that passed share a line on a terminal with those that ask the same.
TOGETHER = (
    ("held_out_prompts", "ids_covered", "not_finite"),
    ("relative_deviation_g", "relative_deviation_g_fp32", "cached_g_deviation"),
    ("query_deviation_g", "worst_row_deviation"),
    ("attention_effect_zero", "attention_effect_identity"),
    ("leak_gap", "leak_effect"),
    ("cache_gap", "random_tokens_gap"),
    ("kl", "kl_short"),
    ("top1_agreement", "top1_agreement_short", "greedy_agreement"),
    ("negative_control",),
)


def summary_lines(certificate: dict[str, Any]) -> list[str]:
    """The certificate for a terminal: the verdict, the checks, the losses, and the fix for each failure."""
    first, *more = certificate["statement"].split(". ")
    lines = [f"certificate: {certificate['verdict'].upper()} - {first}", *(f"  {sentence}" for sentence in more)]
    checks = {check["measure"]: check for check in certificate["checks"]}
    skipped: dict[str, list[str]] = {}
    for measure, check in checks.items():
        if check["skipped"]:
            skipped.setdefault(check["skipped"], []).append(measure)
    failed = [name for name, check in checks.items() if not check["passed"]]
    lines += [f"  FAIL  {name:<26} {_needs(checks[name])}" for name in failed]
    for names in TOGETHER:
        passed = [name for name in names if name in checks and checks[name]["passed"] and not checks[name]["skipped"]]
        if passed:
            lines.append("   ok   " + ", ".join(f"{name} {_needs(checks[name])}" for name in passed))
    lines += [f"  skip  {', '.join(names)}: {why}" for why, names in skipped.items()]
    losses = certificate["measures"]["losses"]
    if losses:
        shown = ", ".join(f"{name} {value:.4f}" for name, value in losses.items() if value is not None)
        lines.append(f"  held-out loss (nats) with G: {shown}")
    lines += [f"  fix   {failure['measure']}: {failure['fix']}" for failure in certificate["failed"]]
    return lines


def _needs(check: dict[str, Any]) -> str:
    value, threshold = check["value"], check["threshold"]
    return f"{beside(value, threshold)} (needs {check['bound']} {threshold:.9g})"


def _version(name: str) -> str | None:
    if name == "torch":
        return str(torch.__version__)
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None
