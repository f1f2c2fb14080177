"""What a reader checks before it trusts any file of a bundle. Each check raises UserError, one line: file, problem, fix.

No size that a file claims is allocated, and no path that a file names is opened: the names are those of format.py.
"""

from __future__ import annotations

import stat
from pathlib import Path
from typing import Any

from pipeline.bundle.certificate import key_rank
from pipeline.bundle.certificate.verdict import plain
from pipeline.bundle.format import (
    FILES,
    MAX_SMALL,
    METRIC_LEARNER,
    RANKS,
    SCHEMA_VERSION,
    UNCERTIFIED_LINE,
    parse_model,
)
from pipeline.bundle.formats import BYTES, FORMATS, SECTION, check_section
from pipeline.config.post import WeightFormat
from pipeline.errors import UserError
from pipeline.io.storage import MANIFEST, read_json, render_json, sha256_json
from pipeline.tokenizer import Tokenizer
from pldr_model.config import ModelConfig


def read_manifest(path: Path) -> dict[str, Any]:
    """MANIFEST.json, checked to be byte for byte as it was written."""
    file = path / MANIFEST
    if not file.is_file() or file.is_symlink():
        raise UserError(f"{file}: missing; this folder is not a bundle, or is incomplete: make it again")
    if file.stat().st_size > MAX_SMALL:
        raise UserError(f"{file}: {file.stat().st_size} bytes, too large: damaged; make the bundle again")
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
        # Rendered again, the manifest must be the same bytes: not even a space may change.
        same = manifest["bundle_sha256"] == sha256_json(rest) and render_json(manifest) == file.read_bytes()
    except ValueError:  # NaN, or half a surrogate pair, which we never write
        same = False
    if not same:
        raise UserError(f"{file}: differs from its own bundle_sha256: damaged; make the bundle again")
    assert isinstance(manifest, dict)
    return manifest


def check_folder(path: Path, manifest: dict[str, Any]) -> None:
    """The folder holds exactly the files of a bundle, all of them plain files; the metric learner's may be missing."""
    listed = set(manifest["files"]) - {METRIC_LEARNER}
    for name in sorted(listed ^ set(FILES)):
        problem = "not a file of a bundle" if name in listed else "not listed"
        raise UserError(f"{path / MANIFEST}: {name!r} is {problem}; make the bundle again")
    for entry in sorted(path.iterdir()):
        if entry.name not in (*manifest["files"], MANIFEST):
            raise UserError(f"{entry}: not a file of this bundle (not in {MANIFEST}); remove it")
        if not stat.S_ISREG(entry.lstat().st_mode):
            raise UserError(f"{entry}: a link or folder in place of a plain file; copy the file itself here")
    for name in FILES:
        if not name.endswith(".safetensors") and (path / name).is_file() and (path / name).stat().st_size > MAX_SMALL:
            raise UserError(f"{path / name}: too large for this file: damaged; make the bundle again")


def read_config(path: Path, manifest: dict[str, Any], record: dict[str, Any]) -> tuple[ModelConfig, WeightFormat]:
    """The model and the weight format that config.json names."""
    file = path / "config.json"
    weight_format = record.get("weight_format", "fp32")  # bundles from before the key existed are fp32
    if weight_format not in FORMATS:
        raise UserError(
            f"{file}: weight_format {weight_format!r} is not one of {', '.join(FORMATS)}; make the bundle again"
        )
    if record.get("model_type") != "pldr":
        raise UserError(
            f"{file}: model_type {record.get('model_type')!r}, this program reads 'pldr'; make the bundle again"
        )
    config = parse_model(record.get("model"), where=file)
    if config.g_source != "file" or config.g_file is not None:
        raise UserError(
            f"{file}: g_source {config.g_source!r}, but the G_LM of a bundle comes from a file; make the bundle again"
        )
    data_bytes = round(BYTES[weight_format] * config.num_parameters()["total"])
    if manifest["files"]["model.safetensors"]["size"] < data_bytes:  # before the shapes of a huge model are computed
        raise UserError(
            f"{file}: describes a model of {data_bytes} bytes, but the weights are smaller; make the bundle again"
        )
    ranks = record.get(RANKS)  # a bundle whose keys are full has none
    if ranks is not None and (wrong := key_rank.wrong_ranks(ranks, config.to_dict())):
        raise UserError(f"{file}: {RANKS}: {wrong}; make the bundle again")
    return config, weight_format


def check_certificate(
    path: Path, manifest: dict[str, Any], record: dict[str, Any], certificate: dict[str, Any]
) -> None:
    """The certificate (certificate/schema.py has checked its schema and verdict) is of these tensors, and every mark agrees."""
    where = path / "certificate.json"
    weight_format, stored = record.get("weight_format", "fp32"), manifest["files"]["model.safetensors"]["sha256"]
    packed_ok = check_section(certificate.get(SECTION), weight_format=weight_format, sha256=stored, where=str(where))
    ranks_ok = key_rank.check_section(
        certificate.get(key_rank.SECTION), ranks=record.get(RANKS), sha256=stored, where=str(where)
    )
    for name, sha256 in certificate["files"].items():
        packed = name == "model.safetensors" and weight_format != "fp32"  # then `files` names the fp32 weights
        if not packed and manifest["files"][name]["sha256"] != sha256:
            raise UserError(f"{where}: it certifies a different {name}; validate this model and bundle it again")
    certified = manifest["certified"]
    first_line = (path / "README.md").read_text(encoding="utf-8", errors="replace").partition("\n")[0]
    passed = certificate["verdict"] == "certified" and packed_ok and ranks_ok
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


def check_certified_model(
    where: Path, config: ModelConfig, record: dict[str, Any], certificate: dict[str, Any]
) -> None:
    """config.json describes the certified model, with a fixed G_LM."""
    values = {key: value for key, value in certificate["model"].items() if key != "num_parameters"}
    measured = parse_model(values, where=where)
    if certificate["model"].get("num_parameters") != measured.num_parameters()["total"]:
        raise UserError(f"{where}: num_parameters does not match its model; validate this model again")
    if measured.with_constant_g() != config or measured.g_source != record.get("variant"):
        raise UserError(f"{where}: it certifies a model of different sizes than config.json; validate this model again")


def check_lineage(path: Path, manifest: dict[str, Any], certificate: dict[str, Any]) -> None:
    """Manifest and certificate name the same origin, and a certified bundle names its tokenizer. The commit may differ, as code
    may change between validating and bundling. A certificate's budget is None where there is no metric learner."""
    ours, theirs = plain(manifest["lineage"]), certificate["lineage"]  # a certificate's numbers are rounded
    for key in sorted(ours.keys() & theirs.keys() - {"git_commit", "invariance_budget"}):
        if ours[key] != theirs[key]:
            raise UserError(
                f"{path / MANIFEST}: lineage: {key} is {ours[key]!r}, the certificate's is {theirs[key]!r}; "
                "make the bundle again"
            )
    if manifest["certified"] and ours.get("tokenizer_sha256") is None:
        raise UserError(
            f"{path / MANIFEST}: lineage: no tokenizer_sha256, so the tokenizer of a certified model is unknown; "
            "train with a recorded one, or package the model as uncertified (--uncertified)"
        )


def check_tokenizer(tokenizer: Tokenizer, config: ModelConfig, *lineages: dict[str, Any], where: Path) -> None:
    """It is the tokenizer that the lineages name, where they do, and has no more pieces than the model."""
    if tokenizer.vocab_size > config.vocab_size:
        raise UserError(
            f"{where}: {tokenizer.vocab_size} pieces, but the model's vocabulary is {config.vocab_size}; "
            "use the tokenizer that the model was trained with"
        )
    for lineage in lineages:
        if lineage.get("tokenizer_sha256") not in (None, tokenizer.sha256):
            raise UserError(
                f"{where}: not the tokenizer that the model was trained with (tokenizer_sha256 in the lineage); use that one"
            )
