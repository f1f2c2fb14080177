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


def summary_lines(certificate: dict[str, Any]) -> list[str]:
    """The certificate for a terminal: the verdict, one line for each check, the losses, and the fix for each failure."""
    lines = [f"certificate: {certificate['verdict'].upper()} - {certificate['statement']}"]
    for check in certificate["checks"]:
        if check["skipped"]:
            mark, detail = "skip", check["skipped"]
        else:
            mark = " ok " if check["passed"] else "FAIL"
            value = beside(check["value"], check["threshold"])
            detail = f"{value} (needs {check['bound']} {check['threshold']:g})"
        lines.append(f"  {mark}  {check['measure']:<26} {detail}")
    losses = certificate["measures"]["losses"]
    if losses:
        shown = ", ".join(f"{name} {value:.4f}" for name, value in losses.items() if value is not None)
        lines.append(f"  held-out loss (nats) with G: {shown}")
    lines += [f"  fix   {failure['measure']}: {failure['fix']}" for failure in certificate["failed"]]
    return lines


def _version(name: str) -> str | None:
    if name == "torch":
        return str(torch.__version__)
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None
