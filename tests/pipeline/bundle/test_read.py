"""A bundle is complete and undamaged, or reading it is an error of one line."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.bundle.format import FILES
from pipeline.bundle.read import verify_bundle
from pipeline.inference.runtime import Bundle
from pipeline.io.storage import MANIFEST, manifest_of, render_json, sha256_json
from pipeline.io.tensors import serialize
from tests.helpers.bundles import edit, refused, reseal

Make = Callable[..., Path]


@pytest.mark.parametrize("name", [*FILES, MANIFEST])
def test_any_changed_byte_is_noticed(make_bundle: Make, name: str) -> None:
    path = make_bundle() / name
    original = path.read_bytes()
    offsets = {0, 1, 7, 8, len(original) // 3, len(original) // 2, len(original) - 2, len(original) - 1}
    offsets |= {int(hashlib.sha256(f"{name}{i}".encode()).hexdigest(), 16) % len(original) for i in range(12)}
    for offset in sorted(offsets):
        for flip in (0x01, 0x20, 0x80):
            path.write_bytes(original[:offset] + bytes([original[offset] ^ flip]) + original[offset + 1 :])
            assert name in refused(path.parent)
    for damaged in (b"", original[:-1], original + b"\n", original + b" "):
        path.write_bytes(damaged)
        assert name in refused(path.parent)
    path.write_bytes(original)
    verify_bundle(path.parent)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_every_single_byte_of_every_file_counts(make_bundle: Make) -> None:
    """Each byte in turn (every 13th of the tokenizer, which is large), one of its bits turned over."""
    bundle = make_bundle()
    for name in (*FILES, MANIFEST):
        path = bundle / name
        original = bytearray(path.read_bytes())
        with open(path, "r+b") as stream:
            for offset in range(0, len(original), 13 if name == "tokenizer.model" else 1):
                stream.seek(offset)
                stream.write(bytes([original[offset] ^ (1 << offset % 8)]))
                stream.flush()
                assert name in refused(bundle), offset
                stream.seek(offset)
                stream.write(original[offset : offset + 1])
                stream.flush()
    verify_bundle(bundle)


@pytest.mark.parametrize("name", [*FILES, MANIFEST])
def test_a_missing_file_is_named(make_bundle: Make, name: str) -> None:
    bundle = make_bundle()
    (bundle / name).unlink()
    assert name in refused(bundle)


def test_extra_files_links_and_path_tricks_are_refused(make_bundle: Make, tmp_path: Path) -> None:
    bundle = make_bundle()
    (bundle / "model.pkl").write_bytes(b"cos\nsystem\n(S'touch pwned'\ntR.")
    assert "model.pkl" in refused(bundle)
    reseal(bundle)  # even when the manifest lists it
    assert "model.pkl" in refused(bundle)
    (bundle / "model.pkl").unlink()
    reseal(bundle)
    shutil.move(bundle / "config.json", tmp_path / "outside.json")
    (bundle / "config.json").symlink_to(tmp_path / "outside.json")
    assert "config.json: a link" in refused(bundle)
    (bundle / "config.json").unlink()
    original = json.loads((bundle / MANIFEST).read_text())
    original.pop("bundle_sha256")
    for trick in ("../outside.json", str(tmp_path / "outside.json"), "./config.json", "a/../config.json", ""):
        files = {name: entry for name, entry in original["files"].items() if name != "config.json"}
        manifest = {**original, "files": {**files, trick: original["files"]["config.json"]}}
        (bundle / MANIFEST).write_bytes(render_json({**manifest, "bundle_sha256": sha256_json(manifest)}))
        assert f"{trick!r} is not a file of a bundle" in refused(bundle) or "'config.json' is not listed" in refused(
            bundle
        )
    assert "no such bundle" in refused(tmp_path / "nowhere")


def test_a_header_that_claims_10_GB_is_refused_before_anything_is_allocated(make_bundle: Make) -> None:
    bundle = make_bundle()
    header = {"g_lm": {"dtype": "F32", "shape": [2, 2, 25000, 25000], "data_offsets": [0, 10_000_000_000]}}
    raw = json.dumps(header).encode()
    (bundle / "g_lm.safetensors").write_bytes(len(raw).to_bytes(8, "little") + raw + b"\0" * 64)
    certificate = json.loads((bundle / "certificate.json").read_text())
    files = {**certificate["files"], "g_lm.safetensors": manifest_of(bundle)["g_lm.safetensors"]["sha256"]}
    edit(bundle / "certificate.json", files=files)
    reseal(bundle)
    assert "header is damaged" in refused(bundle)


def test_nan_weights_are_refused(make_bundle: Make, invariant: Any) -> None:
    bundle = make_bundle()
    g_lm = torch.full((2, 2, 8, 8), float("nan"))
    (bundle / "g_lm.safetensors").write_bytes(serialize({"g_lm": g_lm}))
    certificate = json.loads((bundle / "certificate.json").read_text())
    files = {**certificate["files"], "g_lm.safetensors": manifest_of(bundle)["g_lm.safetensors"]["sha256"]}
    edit(bundle / "certificate.json", files=files)
    reseal(bundle)
    assert "g_lm holds NaN" in refused(bundle)


@pytest.mark.parametrize("name", ["config.json", "generation_config.json", "certificate.json", MANIFEST])
def test_an_unknown_schema_version_is_refused(make_bundle: Make, name: str) -> None:
    bundle = make_bundle()
    edit(bundle / name, schema_version=99)
    reseal(bundle)
    assert f"{name}: schema_version 99" in refused(bundle)


def test_a_bundle_of_the_old_schema_is_verified_and_generates(old_files: Path) -> None:
    """Written by commit 160ea30, whose certificates are of schema 3."""
    bundle = old_files / "bundle"
    assert json.loads((bundle / "certificate.json").read_bytes())["schema_version"] == 3
    result = verify_bundle(bundle)
    assert result["certified"] is True and result["tier"] == "at round-off"
    loaded = Bundle.load(bundle)
    assert loaded.certificate["schema_version"] == 4 and len(loaded.generate(["the "], max_new_tokens=4)) == 1
    certificate = json.loads((bundle / "certificate.json").read_bytes())
    certificate["checks"][2]["value"] = 0.5
    edit(bundle / "certificate.json", checks=certificate["checks"])
    reseal(bundle)
    assert "value 0.5 does not follow from the measures" in refused(bundle)
