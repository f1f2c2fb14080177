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

import stat
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from pipeline.config import WeightFormat
from pipeline.errors import UserError
from pipeline.post.card import UNCERTIFIED_LINE, model_card
from pipeline.post.certificate import bundle_g, bundle_tensors
from pipeline.post.schema import read_certificate
from pipeline.post.tensors import load_tensors, serialise
from pipeline.post.weight_format import (
    BYTES,
    FORMATS,
    SECTION,
    Packed,
    check_section,
    describe_format,
    packed_shapes,
    unpack,
)
from pipeline.post.weights import parse_model, state_shapes
from pipeline.storage import (
    MANIFEST,
    manifest_of,
    publish_bytes,
    publish_dir,
    publish_json,
    read_json,
    render_json,
    require_free_space,
    sha256_json,
    verify_manifest,
)
from pipeline.tokenizer import Tokenizer
from pldr_model.config import ModelConfig
from pldr_model.model import PLDRModel, g_shape

SCHEMA_VERSION = 1
FILES = (
    "README.md",
    "certificate.json",
    "config.json",
    "g_lm.safetensors",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.model",
)
MAX_SMALL = 64 << 20  # bytes of a file that holds no tensors


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
    certified = not uncertified
    config = model.config.with_constant_g()
    weight_format = "fp32" if packed is None else packed.section["format"]
    weights = serialise(bundle_tensors(model) if packed is None else packed.tensors)
    g_lm = serialise(bundle_g(g_LHKK))
    spm = Tokenizer.load(tokenizer)
    _check_tokenizer(spm, config, lineage or {}, where=tokenizer)
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
        publish_json(temporary / "generation_config.json", _generation_config(config, spm))
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
    manifest = _read_manifest(path)
    _check_folder(path, manifest)
    verify_manifest(path, manifest["files"])
    record = read_json(path / "config.json", schema_version=SCHEMA_VERSION)
    generation = read_json(path / "generation_config.json", schema_version=SCHEMA_VERSION)
    certificate = read_certificate(path / "certificate.json")
    config, weight_format = _read_config(path, manifest, record)
    _check_certificate(path, manifest, record, certificate)
    _check_certified_model(path / "certificate.json", config, record, certificate)
    shapes, dtypes = packed_shapes(
        {name: shape for name, shape in state_shapes(config).items() if name != "g_lm"}, weight_format
    )
    weights = unpack(load_tensors(path / "model.safetensors", shapes, dtypes=dtypes))
    g_lm = load_tensors(path / "g_lm.safetensors", {"g_lm": g_shape(config)})["g_lm"]
    tokenizer = Tokenizer.load(path / "tokenizer.model")
    _check_tokenizer(tokenizer, config, manifest["lineage"], where=path / "tokenizer.model")
    if generation != _generation_config(config, tokenizer):
        raise UserError(
            f"{path / 'generation_config.json'}: not that of this model and tokenizer.model; make the bundle again"
        )
    return BundleParts(config, weight_format, weights, g_lm, tokenizer, generation, certificate, manifest)


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


def _read_manifest(path: Path) -> dict[str, Any]:
    """MANIFEST.json, byte for byte as it was written."""
    file = path / MANIFEST
    if not file.is_file() or file.is_symlink():
        raise UserError(f"{file}: missing; this folder is no bundle, or was cut short: make it again")
    if file.stat().st_size > MAX_SMALL:
        raise UserError(f"{file}: {file.stat().st_size} bytes: damaged; make the bundle again")
    manifest = read_json(file, schema_version=SCHEMA_VERSION)
    rest = {key: value for key, value in manifest.items() if key != "bundle_sha256"}
    files = manifest.get("files")
    well_formed = (
        manifest.get("kind") == "pldr-bundle"
        and manifest.keys() == {"schema_version", "kind", "certified", "files", "lineage", "bundle_sha256"}
        and isinstance(manifest["certified"], bool)
        and isinstance(manifest["lineage"], dict)
        and isinstance(files, dict)
        and all(isinstance(entry, dict) and entry.keys() == {"sha256", "size"} for entry in files.values())
    )
    if not well_formed:
        raise UserError(f"{file}: not the manifest of a bundle; make the bundle again")
    try:
        # Rendered anew, the manifest must be the same bytes: none is free to change, not even a space.
        same = manifest["bundle_sha256"] == sha256_json(rest) and render_json(manifest) == file.read_bytes()
    except ValueError:  # NaN, or half a surrogate pair: nothing that we write
        same = False
    if not same:
        raise UserError(f"{file}: differs from its own bundle_sha256: damaged; make the bundle again")
    assert isinstance(manifest, dict)
    return manifest


def _check_folder(path: Path, manifest: dict[str, Any]) -> None:
    """Exactly the files of a bundle, plain files, in the folder itself."""
    listed = set(manifest["files"])
    for name in sorted(listed ^ set(FILES)):
        raise UserError(f"{path / MANIFEST}: {name!r} is {'no file of a bundle' if name in listed else 'not listed'}")
    for entry in sorted(path.iterdir()):
        if entry.name not in (*FILES, MANIFEST):
            raise UserError(f"{entry}: no file of this bundle (not in {MANIFEST}); remove it")
        if not stat.S_ISREG(entry.lstat().st_mode):
            raise UserError(f"{entry}: a link or folder where a plain file belongs; copy the file itself here")
    for name in FILES:
        if not name.endswith(".safetensors") and (path / name).is_file() and (path / name).stat().st_size > MAX_SMALL:
            raise UserError(f"{path / name}: too large for what it is: damaged; make the bundle again")


def _read_config(path: Path, manifest: dict[str, Any], record: dict[str, Any]) -> tuple[ModelConfig, WeightFormat]:
    """The model and the weight format that config.json names."""
    file = path / "config.json"
    weight_format = record.get("weight_format", "fp32")  # bundles of before it existed are fp32
    if weight_format not in FORMATS:
        raise UserError(f"{file}: weight_format {weight_format!r} is not one of {', '.join(FORMATS)}")
    config = parse_model(record.get("model"), where=file)
    if config.g_source != "file" or config.g_file is not None:
        raise UserError(f"{file}: g_source {config.g_source!r}: a bundle's model has a given G_LM")
    data_bytes = BYTES[weight_format] * config.num_parameters()["total"]
    if manifest["files"]["model.safetensors"]["size"] < data_bytes:  # before a giant's shapes are even worked out
        raise UserError(f"{file}: describes a model of {data_bytes} bytes, the weights are smaller")
    return config, weight_format


def _check_certificate(
    path: Path, manifest: dict[str, Any], record: dict[str, Any], certificate: dict[str, Any]
) -> None:
    """The certificate is of these very tensors, its verdict follows from its checks, and every mark says the same."""
    where = path / "certificate.json"
    files, checks, failed = (certificate.get(key) for key in ("files", "checks", "failed"))
    words = [certificate.get(key) for key in ("verdict", "tier", "statement")]
    well_formed = all(isinstance(word, str) for word in words) and all(
        isinstance(entries, list) and all(isinstance(e, dict) and isinstance(e.get("measure"), str) for e in entries)
        for entries in (checks, failed)
    )
    if not well_formed:
        raise UserError(f"{where}: its verdict or its checks are damaged; validate again")
    if not isinstance(files, dict) or set(files) != {"model.safetensors", "g_lm.safetensors"}:
        raise UserError(f"{where}: does not say which files it certifies; validate again")
    weight_format, stored = record.get("weight_format", "fp32"), manifest["files"]["model.safetensors"]["sha256"]
    packed_ok = weight_format == "fp32" or check_section(
        certificate.get(SECTION), weight_format=weight_format, sha256=stored, where=str(where)
    )
    for name, sha256 in files.items():
        packed = name == "model.safetensors" and weight_format != "fp32"  # then `files` names the fp32 weights
        if not packed and manifest["files"][name]["sha256"] != sha256:
            raise UserError(f"{where}: it certifies another {name}; validate this model and bundle it again")
    certified = manifest["certified"]
    first_line = (path / "README.md").read_text(encoding="utf-8", errors="replace").partition("\n")[0]
    passed = certificate["verdict"] == "certified" and failed == [] and packed_ok
    passed = passed and bool(checks) and all(check.get("passed") is True for check in checks or [])
    if (
        certified is not record.get("certified")
        or certificate.get("packaged") != ("certified" if certified else "uncertified")
        or certified is not (first_line != UNCERTIFIED_LINE)
        or (certified and not passed)
    ):
        raise UserError(
            f"{path}: {MANIFEST}, config.json, README.md and certificate.json disagree on whether it is certified; "
            "make the bundle again"
        )


def _check_certified_model(
    where: Path, config: ModelConfig, record: dict[str, Any], certificate: dict[str, Any]
) -> None:
    """config.json describes the certified model, with its G_LM given."""
    model = certificate.get("model")
    values = {k: v for k, v in model.items() if k != "num_parameters"} if isinstance(model, dict) else None
    measured = parse_model(values, where=where)
    if measured.with_constant_g() != config or measured.g_source != record.get("variant"):
        raise UserError(f"{where}: it certifies a model of other sizes than config.json; validate this model again")


def _check_tokenizer(tokenizer: Tokenizer, config: ModelConfig, lineage: dict[str, Any], *, where: Path) -> None:
    """It is the one that the model was trained with, as far as the lineage knows it, and has no more pieces than the model."""
    if lineage.get("tokenizer_sha256") not in (None, tokenizer.sha256):
        raise UserError(f"{where}: not the tokenizer that the model was trained with (tokenizer_sha256 of the lineage)")
    if tokenizer.vocab_size > config.vocab_size:
        raise UserError(
            f"{where}: {tokenizer.vocab_size} pieces, the model's vocabulary is {config.vocab_size}; "
            "use the tokenizer that the model was trained with"
        )


def _generation_config(config: ModelConfig, tokenizer: Tokenizer) -> dict[str, Any]:
    """Prompts are encoded as training text is: no bos (documents were joined by eos alone), nothing put before them."""
    return {
        "schema_version": SCHEMA_VERSION,
        "prompt_prefix_ids": [],
        "context_length": config.context_length,
        "pad_id": config.pad_id,
        "bos_id": config.bos_id,
        "eos_id": config.eos_id,
        "tokenizer": {"sha256": tokenizer.sha256, "vocab_size": tokenizer.vocab_size},
    }
