"""Building a bundle: what is in it, byte for byte the same every time, and what is not packaged."""

from __future__ import annotations

import json
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
from pipeline.io.storage import MANIFEST
from pipeline.io.tensors import read_header
from pipeline.post.extract import extract_g
from pipeline.post.package.bundle import build_bundle
from pipeline.post.package.card import CERTIFIED_LINE
from pipeline.post.package.measured_formats import pack_measured

Make = Callable[..., Path]


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
        original = (first / name).read_bytes()
        assert original == (second / name).read_bytes(), name
        assert str(tmp_path).encode() not in original and str(Path.home()).encode() + b"/" not in original


def test_building_again_replaces_the_older_one(make_bundle: Make) -> None:
    before = verify_bundle(make_bundle(notes=["one"]))["bundle_sha256"]
    after = verify_bundle(make_bundle(notes=["two"]))["bundle_sha256"]
    assert before != after


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


@pytest.mark.parametrize("weight_format", ["fp32", "bf16", "int8"])
def test_building_with_the_certificate_of_another_model_fails_in_every_format(
    make_bundle: Make, tiny: SimpleNamespace, text: torch.Tensor, weight_format: str
) -> None:
    """The other model's G_LM is the same: only its weights tell them apart, and a packed bundle holds no fp32 ones."""
    other = tiny.make_model()
    with torch.no_grad():
        other.layers[0].attention.output.weight.zero_()
    g_lm = extract_g(other, text[:, :-1], "mean").g_lm
    packed = None
    if weight_format != "fp32":
        packed = pack_measured(other, g_lm, text, weight_format, max_loss_difference=0.01, max_prompts=16)
    with pytest.raises(UserError, match=r"is of a different model\.safetensors; validate this model"):
        make_bundle(model=other, packed=packed)
    if packed is not None:
        with pytest.raises(UserError, match="packed weights are of a different model"):
            make_bundle(packed=packed)


def test_the_certificates_tokenizer_counts_too(
    make_bundle: Make, tiny: SimpleNamespace, invariant: Any, text: torch.Tensor
) -> None:
    other = tiny.certify(invariant, text, lineage={**tiny.lineage, "tokenizer_sha256": "0" * 64})
    with pytest.raises(UserError, match="not the tokenizer that the model was trained with"):
        make_bundle(certificate=other, lineage={}, uncertified=True)


def test_building_with_the_certificate_of_another_G_fails_and_leaves_nothing(
    make_bundle: Make, tiny: SimpleNamespace, certificate: dict[str, Any], tokenizer_path: Path, tmp_path: Path
) -> None:
    g_lm = torch.zeros(2, 2, 8, 8)
    with pytest.raises(UserError, match=r"is of a different g_lm\.safetensors"):
        build_bundle(
            tiny.make_model(), g_lm, certificate=certificate, tokenizer=tokenizer_path, out=tmp_path / "bundle"
        )
    assert list(tmp_path.iterdir()) == []
