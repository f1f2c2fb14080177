"""A bundle whose parts do not belong together is refused, however well its manifest is sealed."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from pipeline.bundle.format import UNCERTIFIED_LINE
from pipeline.bundle.read import verify_bundle
from pipeline.errors import UserError
from pipeline.io.storage import MANIFEST, manifest_of, render_json, sha256_file, sha256_json
from pipeline.io.tensors import serialize
from pipeline.post.extract import extract_g
from pipeline.post.package.bundle import build_bundle
from pipeline.post.package.card import CERTIFIED_LINE
from pipeline.post.package.measured_formats import pack_measured

Make = Callable[..., Path]
PACKAGES = ("python", "torch", "safetensors", "sentencepiece", "pldr", "cuda", "device", "threads")
HARMLESS: dict[str, set[tuple[str, ...]]] = {
    "config.json": set(),
    "generation_config.json": set(),
    # What the validator was told, and nothing is judged by.
    "certificate.json": {
        ("lineage", "git_commit"),
        ("lineage", "invariance_budget"),
        *(("software", p) for p in PACKAGES),
    },
    MANIFEST: {("lineage", "git_commit")},
}


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


@pytest.mark.parametrize("name", ["config.json", "generation_config.json", "certificate.json", MANIFEST])
def test_whatever_a_careless_hand_writes_into_a_json_file_is_one_line_or_harmless(make_bundle: Make, name: str) -> None:
    """Every key of the file and of the objects in it, replaced by values of other kinds, the manifest resealed each time. What
    is accepted must be words for people (HARMLESS)."""
    bundle = make_bundle()
    whole = json.loads((bundle / name).read_bytes())
    places: list[tuple[str, ...]] = [(key,) for key in whole]
    places += [(key, inner) for key, value in whole.items() if isinstance(value, dict) for inner in value]
    accepted = set()
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
            if tree == whole:
                continue
            try:
                verify_bundle(bundle)
            except UserError as error:
                assert "\n" not in str(error)
            else:
                accepted.add(place)
    assert accepted <= HARMLESS[name], accepted - HARMLESS[name]


@pytest.mark.parametrize("name", ["config.json", "generation_config.json", "certificate.json", MANIFEST])
def test_an_unknown_schema_version_is_refused(make_bundle: Make, name: str) -> None:
    bundle = make_bundle()
    edit(bundle / name, schema_version=99)
    reseal(bundle)
    assert f"{name}: schema_version 99" in refused(bundle)


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
    assert "checks: not all of them" in refused(bundle)
    assert manifest["certified"] is False


def test_a_config_of_a_giant_is_refused_by_arithmetic(make_bundle: Make, tiny: SimpleNamespace) -> None:
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
    assert "num_parameters is not that of its model" in refused(bundle)
    num = replace(tiny.config, d_ff=20).num_parameters()["total"]
    edit(bundle / "certificate.json", model={**certified, "d_ff": 20, "num_parameters": num})
    reseal(bundle)
    assert (
        "model.safetensors: layers.0.feed_forward.w12.weight is F32 [84, 16], the model needs F32 [40, 16]"
        in refused(bundle)
    )
    edit(bundle / "config.json", model={**model, "nmu_heads": 2})
    reseal(bundle)
    assert "nmu_heads" in refused(bundle)


def test_a_transplanted_certificate_is_refused(make_bundle: Make, tiny: SimpleNamespace, text: torch.Tensor) -> None:
    bundle = make_bundle()
    other = tiny.make_model(gain=1.0)
    for name, tensors in (
        ("g_lm.safetensors", {"g_lm": extract_g(other, text[:, :-1], "mean").g_lm}),
        ("model.safetensors", {n: t for n, t in other.state_dict().items() if ".plga." not in n}),
    ):
        whole = (bundle / name).read_bytes()
        (bundle / name).write_bytes(serialize({k: t + 0.001 for k, t in tensors.items()}))
        reseal(bundle)
        assert f"certifies another {name}" in refused(bundle)
        (bundle / name).write_bytes(whole)


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
    with pytest.raises(UserError, match=r"certifies another model\.safetensors; validate this model"):
        make_bundle(model=other, packed=packed)
    if packed is not None:
        with pytest.raises(UserError, match="packed weights are of another model"):
            make_bundle(packed=packed)


@pytest.mark.parametrize(
    ("lineage", "message"),
    [
        ({"checkpoint": "step-999999"}, "lineage: checkpoint is 'step-999999', the certificate's is 'step-000007'"),
        ({"step": 8}, "lineage: step is 8, the certificate's is 7"),
        ({"tokenizer_sha256": None}, "no tokenizer_sha256"),
        ({"tokenizer_sha256": "0" * 64}, "not the tokenizer that the model was trained with"),
    ],
)
def test_a_lineage_that_contradicts_the_certificate_is_refused(
    make_bundle: Make, tiny: SimpleNamespace, tokenizer_path: Path, lineage: dict[str, Any], message: str
) -> None:
    whole = {**tiny.lineage, "tokenizer_sha256": sha256_file(tokenizer_path)}
    with pytest.raises(UserError) as caught:
        make_bundle(lineage={**whole, **lineage})
    assert message in str(caught.value) and "\n" not in str(caught.value)
    bundle = make_bundle(lineage={**whole, "git_commit": "1a7e"})  # the code went on
    assert verify_bundle(bundle)["certified"] is True
    edit(bundle / MANIFEST, lineage={**whole, **lineage})
    reseal(bundle)
    assert message in refused(bundle)


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


def test_the_certificates_tokenizer_counts_too(
    make_bundle: Make, tiny: SimpleNamespace, invariant: Any, text: torch.Tensor
) -> None:
    other = tiny.certify(invariant, text, lineage={**tiny.lineage, "tokenizer_sha256": "0" * 64})
    with pytest.raises(UserError, match="not the tokenizer that the model was trained with"):
        make_bundle(certificate=other, lineage={}, uncertified=True)


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


def test_building_with_the_certificate_of_another_G_fails_and_leaves_nothing(
    make_bundle: Make, tiny: SimpleNamespace, certificate: dict[str, Any], tokenizer_path: Path, tmp_path: Path
) -> None:
    g_lm = torch.zeros(2, 2, 8, 8)
    with pytest.raises(UserError, match=r"certifies another g_lm\.safetensors"):
        build_bundle(
            tiny.make_model(), g_lm, certificate=certificate, tokenizer=tokenizer_path, out=tmp_path / "bundle"
        )
    assert list(tmp_path.iterdir()) == []
