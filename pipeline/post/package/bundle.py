"""The bundle: a folder that serves a model with KV-cache and G-cache, and proves that it may. Stage `bundle`.

    config.json             ModelConfig of the constant-G model, and whether it is certified
    model.safetensors       weights without the metric learner: fp32, bf16 or int8 (weight_format.py)
    g_lm.safetensors        the cached G_LM [L,H,K,K]
    tokenizer.model         SentencePiece
    generation_config.json  how prompts are encoded, ids
    certificate.json        docs/certificate.md
    README.md               model card
    MANIFEST.json           sha256 and size of every file, lineage, and a digest of itself

Decisions. Written beside, verified as a reader would, then renamed: a bundle is whole or absent. No time of day anywhere:
the same inputs give the same bytes. `MANIFEST.json` is in canonical form and holds its own digest, so that one changed byte
anywhere is an error; this protects against damage and mix-ups, not against a forger, who would sign. Loading runs no
code from the folder and unpickles nothing; sizes are checked against headers before anything is allocated.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from pipeline.bundle.certificate.schema import read_certificate
from pipeline.bundle.formats import SECTION, Packed, describe_format, pack, packed_shapes, unpack
from pipeline.bundle.verify import (
    FILES,
    SCHEMA_VERSION,
    check_certificate,
    check_certified_model,
    check_folder,
    check_lineage,
    check_tokenizer,
    generation_config,
    read_config,
    read_manifest,
)
from pipeline.config.post import WeightFormat
from pipeline.errors import UserError
from pipeline.io.storage import (
    MANIFEST,
    manifest_of,
    publish_bytes,
    publish_dir,
    publish_json,
    read_json,
    require_free_space,
    sha256_json,
    verify_manifest,
)
from pipeline.io.tensors import load_tensors, serialise, sha256_tensors
from pipeline.post.certificate.build import bundle_g, bundle_tensors, certified_files
from pipeline.post.package.card import model_card
from pipeline.post.weights import state_shapes
from pipeline.tokenizer import Tokenizer
from pldr_model.config import ModelConfig
from pldr_model.model import PLDRModel, g_shape


class BundleParts(NamedTuple):
    """A verified bundle's contents; `weights` unpacked to fp32."""

    config: ModelConfig
    weight_format: WeightFormat
    weights: dict[str, Tensor]
    g_lm: Tensor
    tokenizer: Tokenizer
    generation: dict[str, Any]
    certificate: dict[str, Any]
    manifest: dict[str, Any]


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
) -> dict[str, Any]:
    """Write, verify and publish the bundle folder `out`; returns {"path", "bundle_sha256", "certified", "bytes"}.

    lineage: plain values for MANIFEST.json (run, checkpoint, git commit, data fingerprint). notes: lines for the model
    card (how it was trained). uncertified: package a failed certificate all the same, marked everywhere; marks a passed
    one as well. packed: the weights in another format than fp32, with what that costs. Raises UserError for a failed
    certificate or a format that costs too much (exit code 3), a certificate of other tensors, or a tokenizer that does not
    fit the model.
    """
    if not uncertified:
        _require_passed(certificate, packed)
    _require_same_tensors(model, g_LHKK, certificate, packed)
    certified = not uncertified
    config = model.config.with_constant_g()
    weight_format = "fp32" if packed is None else packed.section["format"]
    weights = serialise(bundle_tensors(model) if packed is None else packed.tensors)
    g_lm = serialise(bundle_g(g_LHKK))
    spm = Tokenizer.load(tokenizer)
    check_tokenizer(spm, config, lineage or {}, certificate["lineage"], where=tokenizer)
    if packed is not None:
        certificate = {**certificate, SECTION: packed.section}
        notes = [
            *notes,
            f"Stored as {describe_format(packed.section)}. The certificate's measures are of the fp32 weights.",
        ]
    require_free_space(out, 2 * (len(weights) + len(g_lm)), "the bundle")
    with publish_dir(out) as temporary:
        publish_bytes(temporary / "model.safetensors", weights)
        publish_bytes(temporary / "g_lm.safetensors", g_lm)
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
    }


def verify_bundle(path: str | Path) -> dict[str, Any]:
    """Check everything a reader relies on; returns {"path", "bundle_sha256", "certified", "verdict", "tier",
    "weight_format", "files"}.

    Raises UserError, one line, for whatever is missing, extra, changed, too large, or does not belong together.
    """
    parts = read_bundle(Path(path))
    return {
        "path": str(path),
        "bundle_sha256": parts.manifest["bundle_sha256"],
        "certified": parts.manifest["certified"],
        "verdict": parts.certificate["verdict"],
        "tier": parts.certificate["tier"],
        "weight_format": parts.weight_format,
        "files": len(FILES) + 1,
    }


def read_bundle(path: Path) -> BundleParts:
    """Verify a bundle and read it. Raises UserError as `verify_bundle` does."""
    if not path.is_dir():
        raise UserError(f"{path}: no such bundle folder; make one with `pldr bundle CONFIG`")
    manifest = read_manifest(path)
    check_folder(path, manifest)
    verify_manifest(path, manifest["files"])
    record = read_json(path / "config.json", schema_version=SCHEMA_VERSION)
    generation = read_json(path / "generation_config.json", schema_version=SCHEMA_VERSION)
    certificate = read_certificate(path / "certificate.json")
    config, weight_format = read_config(path, manifest, record)
    check_certificate(path, manifest, record, certificate)
    check_certified_model(path / "certificate.json", config, record, certificate)
    shapes, dtypes = packed_shapes(
        {name: shape for name, shape in state_shapes(config).items() if name != "g_lm"}, weight_format
    )
    weights = unpack(load_tensors(path / "model.safetensors", shapes, dtypes=dtypes))
    g_lm = load_tensors(path / "g_lm.safetensors", {"g_lm": g_shape(config)})["g_lm"]
    tokenizer = Tokenizer.load(path / "tokenizer.model")
    check_lineage(path, manifest, certificate)
    check_tokenizer(tokenizer, config, manifest["lineage"], certificate["lineage"], where=path / "tokenizer.model")
    if generation != generation_config(config, tokenizer):
        raise UserError(
            f"{path / 'generation_config.json'}: not that of this model and tokenizer.model; make the bundle again"
        )
    return BundleParts(config, weight_format, weights, g_lm, tokenizer, generation, certificate, manifest)


def _require_same_tensors(model: PLDRModel, g_LHKK: Tensor, certificate: dict[str, Any], packed: Packed | None) -> None:
    """Raise UserError unless the certificate is of this model's fp32 weights and G_LM, and `packed` is the same weights.

    A reader of a bf16 or int8 bundle cannot check this: the fp32 weights are not in it.
    """
    for name, sha256 in certified_files(model, g_LHKK).items():
        if certificate["files"][name] != sha256:
            raise UserError(f"the certificate certifies another {name}; validate this model and bundle it again")
    if packed is not None:
        weights = pack(bundle_tensors(model), packed.section["format"])
        if not packed.section["sha256"] == sha256_tensors(weights) == sha256_tensors(packed.tensors):
            raise UserError("the packed weights are of another model than the certificate; pack this model's again")


def _require_passed(certificate: dict[str, Any], packed: Packed | None) -> None:
    """Raise UserError, exit code 3, unless everything that a certified bundle needs has passed."""
    mend = "or package it marked as uncertified (--uncertified)"
    if certificate["verdict"] != "certified":
        names = ", ".join(failure["measure"] for failure in certificate["failed"])
        raise UserError(f"the certificate failed ({names}); mend what it says, {mend}", exit_code=3)
    if packed is not None and not packed.section["passed"]:
        raise UserError(
            f"{describe_format(packed.section)}: too much; use another post.weight_format, raise post.max_format_loss, {mend}",
            exit_code=3,
        )
