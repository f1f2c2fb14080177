"""Building a bundle: the folder that serves a model with KV-cache and G-cache. Stage `bundle`.

Its files and their format are pipeline/bundle/format.py. Decision: the folder is written under a temporary name, verified as
a reader would, then renamed: a bundle is complete or absent.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from pipeline.bundle.certificate import key_rank
from pipeline.bundle.certificate.schema import SCHEMA_VERSION as SCHEMA_OF_TODAY
from pipeline.bundle.certificate.verdict import judged
from pipeline.bundle.format import (
    METRIC_LEARNER,
    RANKS,
    SCHEMA_VERSION,
    bundle_g,
    bundle_tensors,
    certified_files,
    generation_config,
)
from pipeline.bundle.formats import SECTION, Packed, describe_format, pack
from pipeline.bundle.metric_learner import WITHOUT_FP32, metric_learner_tensors
from pipeline.bundle.read import read_bundle
from pipeline.bundle.verify import check_tokenizer
from pipeline.errors import UserError
from pipeline.io.storage import (
    MANIFEST,
    manifest_of,
    publish_bytes,
    publish_dir,
    publish_json,
    require_free_space,
    sha256_json,
)
from pipeline.io.tensors import serialize, sha256_tensors
from pipeline.post.package.card import model_card
from pipeline.tokenizer import Tokenizer
from pldr_model.model import PLDRModel

LEARNER_NOTE = f"With `{METRIC_LEARNER}`: G_LM of a prompt can be deduced, and compared with the cached one."


def build_bundle(
    model: PLDRModel,
    g_LHKK: Tensor,
    *,
    certificate: dict[str, Any],
    tokenizer: Path,
    out: Path,
    lineage: dict[str, Any] | None = None,
    notes: Sequence[str] = (),
    uncertified: bool = False,
    packed: Packed | None = None,
    key_rank_section: dict[str, Any] | None = None,
    with_metric_learner: bool = False,
) -> dict[str, Any]:
    """Write, verify and publish the bundle folder `out`; returns {"path", "bundle_sha256", "certified", "bytes"},
    and what packed weights and low-rank keys cost in nats per token ("format_loss_difference", "key_loss_difference").

    lineage: plain values for MANIFEST.json (run, checkpoint, git commit, data fingerprint). notes: lines for the model
    card (how it was trained). uncertified: package even with a failed certificate, and mark every file; marks a passed one
    as well. packed: the weights in another format than fp32, with its cost. with_metric_learner: keep the metric learner beside
    them, in a file of its own. Raises UserError for a failed
    certificate or a format that costs too much (exit code 3), a certificate of other tensors, or a tokenizer that does not
    fit the model.
    """
    if not uncertified:
        _require_passed(certificate, packed, key_rank_section)
    _require_same_tensors(model, g_LHKK, certificate, packed)
    certified = not uncertified
    config = model.config.with_constant_g()
    weight_format = "fp32" if packed is None else packed.section["format"]
    weights = serialize(bundle_tensors(model) if packed is None else packed.tensors)
    g_lm = serialize(bundle_g(g_LHKK))
    learner = None
    if with_metric_learner:
        if packed is not None:
            raise UserError(f"with_metric_learner: {WITHOUT_FP32.format(weight_format)}")
        learner = serialize(metric_learner_tensors(model))
        notes = [*notes, LEARNER_NOTE]
    spm = Tokenizer.load(tokenizer)
    check_tokenizer(spm, config, lineage or {}, certificate["lineage"], where=tokenizer)
    if packed is not None:
        certificate = {**certificate, SECTION: packed.section}
        notes = [
            *notes,
            f"Stored as {describe_format(packed.section)}. The certificate's measures are those of the fp32 weights.",
        ]
    if key_rank_section is not None:
        certificate = _with_ranks(certificate, key_rank_section)
    require_free_space(out, 2 * (len(weights) + len(g_lm) + len(learner or b"")), "the bundle")
    with publish_dir(out) as temporary:
        publish_bytes(temporary / "model.safetensors", weights)
        publish_bytes(temporary / "g_lm.safetensors", g_lm)
        if learner is not None:
            publish_bytes(temporary / METRIC_LEARNER, learner)
        publish_bytes(temporary / "tokenizer.model", tokenizer.read_bytes())
        mark = "certified" if certified else "uncertified"
        publish_json(temporary / "certificate.json", {**certificate, "packaged": mark})
        publish_json(
            temporary / "config.json",
            {
                "schema_version": SCHEMA_VERSION,
                "model_type": "pldr",
                "certified": certified,
                "variant": model.config.g_source,
                "weight_format": weight_format,
                "model": config.to_dict(),
                **({} if key_rank_section is None else {RANKS: key_rank_section["ranks"]}),
            },
        )
        publish_json(temporary / "generation_config.json", generation_config(config, spm))
        card = model_card(
            certificate, config, certified=certified, weight_format=weight_format, lineage=lineage or {}, notes=notes
        )
        publish_bytes(temporary / "README.md", card.encode())
        manifest = {
            "schema_version": SCHEMA_VERSION,
            "kind": "pldr-bundle",
            "certified": certified,
            "files": manifest_of(temporary),
            "lineage": lineage or {},
        }
        publish_json(temporary / MANIFEST, {**manifest, "bundle_sha256": sha256_json(manifest)})
        parts = read_bundle(temporary)
    return {
        "path": str(out),
        "bundle_sha256": parts.manifest["bundle_sha256"],
        "certified": certified,
        "bytes": sum(entry["size"] for entry in parts.manifest["files"].values()),
        **({} if packed is None else {"format_loss_difference": packed.section["loss_difference"]}),
        **({} if key_rank_section is None else {"key_loss_difference": key_rank_section["loss_difference"]}),
    }


def _require_same_tensors(model: PLDRModel, g_LHKK: Tensor, certificate: dict[str, Any], packed: Packed | None) -> None:
    """Raise UserError unless the certificate is of this model's fp32 weights and G_LM, and `packed` is the same weights.

    A reader of a packed bundle cannot check this: the fp32 weights are not in it.
    """
    for name, sha256 in certified_files(model, g_LHKK).items():
        if certificate["files"][name] != sha256:
            raise UserError(f"the certificate is of a different {name}; validate this model and bundle it again")
    if packed is not None:
        weights = pack(bundle_tensors(model), packed.section["format"])
        if not packed.section["sha256"] == sha256_tensors(weights) == sha256_tensors(packed.tensors):
            raise UserError("the packed weights are of a different model than the certificate; pack this model again")


def _with_ranks(certificate: dict[str, Any], section: dict[str, Any]) -> dict[str, Any]:
    """The certificate with what low-rank keys save and cost, which its statement says too."""
    if certificate["schema_version"] != SCHEMA_OF_TODAY:
        raise UserError(
            f"a certificate of schema_version {certificate['schema_version']} has no low-rank keys; validate this model again"
        )
    certificate = {**certificate, key_rank.SECTION: section}
    return {**certificate, "statement": judged(certificate)["statement"]}


def _require_passed(certificate: dict[str, Any], packed: Packed | None, ranks: dict[str, Any] | None) -> None:
    """Raise UserError, exit code 3, unless certificate, weight format and low-rank keys have passed."""
    otherwise = "or package it as uncertified (--uncertified)"
    if certificate["verdict"] != "certified":
        names = ", ".join(failure["measure"] for failure in certificate["failed"])
        raise UserError(f"the certificate failed ({names}); apply the fixes it lists, {otherwise}", exit_code=3)
    if packed is not None and not packed.section["passed"]:
        raise UserError(
            f"{describe_format(packed.section)}: too much; use another post.weight_format, raise post.max_format_loss, "
            f"{otherwise}",
            exit_code=3,
        )
    if ranks is not None and not ranks["passed"]:
        raise UserError(
            f"{key_rank.describe(ranks, certificate['model']['head_dim'])}: too much; give post.key_rank more numbers, raise "
            f"post.max_key_loss, {otherwise}",
            exit_code=3,
        )
