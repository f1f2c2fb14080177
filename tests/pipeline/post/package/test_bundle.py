"""A bundle is whole and its own, or it is an error of one line."""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from pipeline.bundle.format import FILES, UNCERTIFIED_LINE
from pipeline.bundle.read import verify_bundle
from pipeline.errors import UserError
from pipeline.inference.runtime import Bundle
from pipeline.io.storage import MANIFEST, manifest_of, render_json, sha256_json
from pipeline.io.tensors import read_header, serialize
from pipeline.post.package.card import CERTIFIED_LINE

Make = Callable[..., Path]


def reseal(bundle: Path) -> None:
    """A manifest that fits whatever now lies in the folder: damage cannot do this, a careless hand can."""
    manifest = json.loads((bundle / MANIFEST).read_bytes())
    manifest.pop("bundle_sha256")
    manifest["files"] = manifest_of(bundle)
    (bundle / MANIFEST).write_bytes(render_json({**manifest, "bundle_sha256": sha256_json(manifest)}))


def edit(path: Path, **changes: Any) -> None:
    path.write_bytes(render_json({**json.loads(path.read_bytes()), **changes}))


def refused(bundle: Path) -> str:
    with pytest.raises(UserError) as caught:
        verify_bundle(bundle)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_a_certified_bundle(make_bundle: Make, tiny: SimpleNamespace) -> None:
    bundle = make_bundle()
    assert sorted(p.name for p in bundle.iterdir()) == sorted((*FILES, MANIFEST))
    result = verify_bundle(bundle)
    assert result["certified"] is True and result["verdict"] == "certified"
    names = read_header(bundle / "model.safetensors")
    assert not any("plga" in name or name == "g_lm" for name in names)
    assert read_header(bundle / "g_lm.safetensors") == {"g_lm": ("F32", (2, 2, 8, 8))}
    assert (bundle / "README.md").read_text().startswith(CERTIFIED_LINE + "\n")
    manifest = json.loads((bundle / MANIFEST).read_text())
    assert manifest["lineage"]["data_fingerprint"] == "f00d"


def test_two_builds_are_byte_identical_and_name_no_folder_and_no_time(
    make_bundle: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = make_bundle("one")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(time, "time", lambda: 4e9)
    monkeypatch.setenv("TZ", "Asia/Tokyo")
    second = make_bundle("elsewhere/two")
    for name in (*FILES, MANIFEST):
        whole = (first / name).read_bytes()
        assert whole == (second / name).read_bytes(), name
        assert str(tmp_path).encode() not in whole and str(Path.home()).encode() + b"/" not in whole


def test_building_again_replaces_the_older_one(make_bundle: Make) -> None:
    before = verify_bundle(make_bundle(notes=["one"]))["bundle_sha256"]
    after = verify_bundle(make_bundle(notes=["two"]))["bundle_sha256"]
    assert before != after


@pytest.mark.parametrize("name", [*FILES, MANIFEST])
def test_any_changed_byte_is_noticed(make_bundle: Make, name: str) -> None:
    path = make_bundle() / name
    whole = path.read_bytes()
    offsets = {0, 1, 7, 8, len(whole) // 3, len(whole) // 2, len(whole) - 2, len(whole) - 1}
    offsets |= {int(hashlib.sha256(f"{name}{i}".encode()).hexdigest(), 16) % len(whole) for i in range(12)}
    for offset in sorted(offsets):
        for flip in (0x01, 0x20, 0x80):
            path.write_bytes(whole[:offset] + bytes([whole[offset] ^ flip]) + whole[offset + 1 :])
            assert name in refused(path.parent)
    for damaged in (b"", whole[:-1], whole + b"\n", whole + b" "):
        path.write_bytes(damaged)
        assert name in refused(path.parent)
    path.write_bytes(whole)
    verify_bundle(path.parent)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_every_single_byte_of_every_file_counts(make_bundle: Make) -> None:
    """Each byte in turn (every 13th of the tokenizer, which is large), one of its bits turned over."""
    bundle = make_bundle()
    for name in (*FILES, MANIFEST):
        path = bundle / name
        whole = bytearray(path.read_bytes())
        with open(path, "r+b") as stream:
            for offset in range(0, len(whole), 13 if name == "tokenizer.model" else 1):
                stream.seek(offset)
                stream.write(bytes([whole[offset] ^ (1 << offset % 8)]))
                stream.flush()
                assert name in refused(bundle), offset
                stream.seek(offset)
                stream.write(whole[offset : offset + 1])
                stream.flush()
    verify_bundle(bundle)


@pytest.mark.parametrize("name", [*FILES, MANIFEST])
def test_a_missing_file_is_named(make_bundle: Make, name: str) -> None:
    bundle = make_bundle()
    (bundle / name).unlink()
    assert name in refused(bundle)


def test_a_failed_certificate_packs_only_as_uncertified_and_every_file_says_so(
    make_bundle: Make, tiny: SimpleNamespace, text: torch.Tensor
) -> None:
    model = tiny.make_model(gain=1.0)
    certificate = tiny.certify(model, text)
    with pytest.raises(UserError, match="relative_deviation_g") as caught:
        make_bundle(model=model, certificate=certificate)
    assert caught.value.exit_code == 3
    bundle = make_bundle(model=model, certificate=certificate, uncertified=True)
    assert verify_bundle(bundle)["certified"] is False
    assert json.loads((bundle / MANIFEST).read_text())["certified"] is False
    assert json.loads((bundle / "config.json").read_text())["certified"] is False
    assert json.loads((bundle / "certificate.json").read_text())["packaged"] == "uncertified"
    assert (bundle / "README.md").read_text().startswith(UNCERTIFIED_LINE + "\n")
    with pytest.warns(UserWarning, match="UNCERTIFIED bundle .*relative_deviation_g"):
        Bundle.load(bundle)


def test_uncertified_marks_a_passed_certificate_too_and_marks_that_disagree_are_refused(make_bundle: Make) -> None:
    bundle = make_bundle(uncertified=True)
    with pytest.warns(UserWarning, match="UNCERTIFIED"):
        Bundle.load(bundle)
    edit(bundle / "config.json", certified=True)
    reseal(bundle)
    assert "disagree" in refused(bundle)


def test_a_tokenizer_that_does_not_fit_is_refused(make_bundle: Make, larger_tokenizer: Path) -> None:
    bundle = make_bundle()
    record = json.loads((bundle / "generation_config.json").read_text())
    edit(bundle / "generation_config.json", tokenizer={**record["tokenizer"], "vocab_size": 7})
    reseal(bundle)
    assert "not that of this model and tokenizer.model" in refused(bundle)
    (bundle / "tokenizer.model").write_bytes(b"not a model")
    reseal(bundle)
    assert "not a SentencePiece model" in refused(bundle)
    shutil.copy(larger_tokenizer, bundle / "tokenizer.model")
    reseal(bundle)
    assert "tokenizer.model: 56 pieces, the model's vocabulary is 48" in refused(bundle)
    with pytest.raises(UserError, match="56 pieces, the model's vocabulary is 48"):
        make_bundle("larger", tokenizer=larger_tokenizer)
    with pytest.raises(UserError, match="not the tokenizer that the model was trained with"):
        make_bundle("other", lineage={"tokenizer_sha256": "0" * 64})


def test_nan_weights_are_refused(make_bundle: Make, invariant: Any) -> None:
    bundle = make_bundle()
    g_lm = torch.full((2, 2, 8, 8), float("nan"))
    (bundle / "g_lm.safetensors").write_bytes(serialize({"g_lm": g_lm}))
    certificate = json.loads((bundle / "certificate.json").read_text())
    files = {**certificate["files"], "g_lm.safetensors": manifest_of(bundle)["g_lm.safetensors"]["sha256"]}
    edit(bundle / "certificate.json", files=files)
    reseal(bundle)
    assert "g_lm holds NaN" in refused(bundle)
