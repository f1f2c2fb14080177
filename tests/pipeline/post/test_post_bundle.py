"""A bundle is whole and its own, or it is an error of one line."""

from __future__ import annotations

import contextlib
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

from pipeline.errors import UserError
from pipeline.post.bundle import FILES, build_bundle, verify_bundle
from pipeline.post.card import CERTIFIED_LINE, UNCERTIFIED_LINE
from pipeline.post.extract import extract_g
from pipeline.post.inference import Bundle
from pipeline.post.tensors import read_header, serialise
from pipeline.storage import MANIFEST, manifest_of, render_json, sha256_json

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
    whole = json.loads((bundle / MANIFEST).read_text())
    whole.pop("bundle_sha256")
    for trick in ("../outside.json", str(tmp_path / "outside.json"), "./config.json", "a/../config.json", ""):
        files = {name: entry for name, entry in whole["files"].items() if name != "config.json"}
        manifest = {**whole, "files": {**files, trick: whole["files"]["config.json"]}}
        (bundle / MANIFEST).write_bytes(render_json({**manifest, "bundle_sha256": sha256_json(manifest)}))
        assert f"{trick!r} is no file of a bundle" in refused(bundle) or "'config.json' is not listed" in refused(
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


def test_a_config_of_a_giant_is_refused_by_arithmetic(make_bundle: Make) -> None:
    bundle = make_bundle()
    model = json.loads((bundle / "config.json").read_text())["model"]
    for key, value in (("num_layers", 10**9), ("vocab_size", 10**12), ("num_heads", 10**6)):
        edit(bundle / "config.json", model={**model, key: value})
        reseal(bundle)
        assert "the weights are smaller" in refused(bundle)
    edit(bundle / "config.json", model={**model, "d_ff": 20})
    reseal(bundle)
    assert "a model of other sizes than config.json" in refused(bundle)
    certified = json.loads((bundle / "certificate.json").read_text())["model"]
    edit(bundle / "certificate.json", model={**certified, "d_ff": 20})
    reseal(bundle)
    assert (
        "model.safetensors: layers.0.feed_forward.w12.weight is F32 [84, 16], the model needs F32 [40, 16]"
        in refused(bundle)
    )
    edit(bundle / "config.json", model={**model, "nmu_heads": 2})
    reseal(bundle)
    assert "nmu_heads" in refused(bundle)


@pytest.mark.parametrize("name", ["config.json", "generation_config.json", "certificate.json", MANIFEST])
def test_an_unknown_schema_version_is_refused(make_bundle: Make, name: str) -> None:
    bundle = make_bundle()
    edit(bundle / name, schema_version=99)
    reseal(bundle)
    assert f"{name}: schema_version 99" in refused(bundle)


@pytest.mark.parametrize("name", ["config.json", "generation_config.json", "certificate.json", MANIFEST])
def test_whatever_a_careless_hand_writes_into_a_json_file_is_one_line_or_harmless(make_bundle: Make, name: str) -> None:
    """Every key of the file and (but for the certificate's many) of the objects in it, replaced by values of other kinds, the
    manifest resealed each time."""
    bundle = make_bundle()
    whole = json.loads((bundle / name).read_bytes())
    places: list[tuple[str, ...]] = [(key,) for key in whole]
    if name != "certificate.json":
        places += [(key, inner) for key, value in whole.items() if isinstance(value, dict) for inner in value]
    refusals = 0
    kinds = (None, -1.5, "x", [3], {"a": 1}, "\ud800")
    for index, place in enumerate(places):
        for nonsense in (kinds[index % 6], kinds[(index + 2) % 6], kinds[(index + 3) % 6]):
            tree = json.loads(json.dumps(whole))
            node = tree if len(place) == 1 else tree[place[0]]
            node[place[-1]] = nonsense
            (bundle / name).write_bytes(json.dumps(tree).encode())
            if name == MANIFEST:
                rest = {key: value for key, value in tree.items() if key != "bundle_sha256"}
                with contextlib.suppress(UnicodeEncodeError):
                    tree["bundle_sha256"] = sha256_json(rest) if place != ("bundle_sha256",) else nonsense
                    (bundle / name).write_bytes(render_json(tree))
            else:
                reseal(bundle)
            try:
                verify_bundle(bundle)
            except UserError as error:
                refusals += 1
                assert "\n" not in str(error)
    assert refusals > len(places)  # numbers of the certificate and words of the lineage are for people


def test_a_verdict_that_does_not_follow_from_its_checks_is_refused(
    make_bundle: Make, tiny: SimpleNamespace, text: torch.Tensor
) -> None:
    """The certificate of a model that failed, its verdict and every mark edited by hand."""
    model = tiny.make_model(gain=1.0)
    bundle = make_bundle(model=model, certificate=tiny.certify(model, text), uncertified=True)
    edit(bundle / "certificate.json", verdict="certified", failed=[], packaged="certified")
    edit(bundle / "config.json", certified=True)
    card = (bundle / "README.md").read_text()
    (bundle / "README.md").write_text(card.replace(UNCERTIFIED_LINE, CERTIFIED_LINE))
    manifest = json.loads((bundle / MANIFEST).read_text())
    edit(bundle / MANIFEST, certified=True)
    reseal(bundle)
    assert "does not name the checks that failed" in refused(bundle)
    edit(bundle / "certificate.json", checks=[])
    reseal(bundle)
    assert "checks: List should have at least 1 item" in refused(bundle)
    assert manifest["certified"] is False


def test_a_transplanted_certificate_is_refused(make_bundle: Make, tiny: SimpleNamespace, text: torch.Tensor) -> None:
    bundle = make_bundle()
    other = tiny.make_model(gain=1.0)
    for name, tensors in (
        ("g_lm.safetensors", {"g_lm": extract_g(other, text[:, :-1], "mean").g_lm}),
        ("model.safetensors", {n: t for n, t in other.state_dict().items() if ".plga." not in n}),
    ):
        whole = (bundle / name).read_bytes()
        (bundle / name).write_bytes(serialise({k: t + 0.001 for k, t in tensors.items()}))
        reseal(bundle)
        assert f"certifies another {name}" in refused(bundle)
        (bundle / name).write_bytes(whole)


def test_building_with_the_certificate_of_another_G_fails_and_leaves_nothing(
    make_bundle: Make, tiny: SimpleNamespace, certificate: dict[str, Any], tokenizer_path: Path, tmp_path: Path
) -> None:
    g_lm = torch.zeros(2, 2, 8, 8)
    with pytest.raises(UserError, match=r"certifies another g_lm\.safetensors"):
        build_bundle(
            tiny.make_model(), g_lm, certificate=certificate, tokenizer=tokenizer_path, out=tmp_path / "bundle"
        )
    assert list(tmp_path.iterdir()) == []


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
    (bundle / "g_lm.safetensors").write_bytes(serialise({"g_lm": g_lm}))
    certificate = json.loads((bundle / "certificate.json").read_text())
    files = {**certificate["files"], "g_lm.safetensors": manifest_of(bundle)["g_lm.safetensors"]["sha256"]}
    edit(bundle / "certificate.json", files=files)
    reseal(bundle)
    assert "g_lm holds NaN" in refused(bundle)
