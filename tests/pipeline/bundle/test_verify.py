"""A bundle whose parts do not belong together is refused, however well its manifest is resealed."""

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
from pipeline.inference.runtime import Bundle
from pipeline.io.storage import MANIFEST, manifest_of, render_json, sha256_file, sha256_json
from pipeline.io.tensors import serialize
from pipeline.post.extract import extract_g
from pipeline.post.package.card import CERTIFIED_LINE
from pldr_model.model import PLDRModel
from tests.helpers.bundles import edit, measured, measured_keys, refused, reseal

Make = Callable[..., Path]


PACKAGES = ("python", "torch", "safetensors", "sentencepiece", "pldr", "cuda", "device", "threads")
HARMLESS: dict[str, set[tuple[str, ...]]] = {
    "config.json": set(),
    "generation_config.json": set(),
    # Recorded, but not judged.
    "certificate.json": {
        ("lineage", "git_commit"),
        ("lineage", "invariance_budget"),
        *(("software", p) for p in PACKAGES),
    },
    MANIFEST: {("lineage", "git_commit")},
}


@pytest.mark.parametrize("name", ["config.json", "generation_config.json", "certificate.json", MANIFEST])
def test_any_edit_of_a_json_file_is_refused_in_one_line_or_harmless(make_bundle: Make, name: str) -> None:
    """Every key of the file and of the objects in it, replaced by values of other kinds, the manifest resealed each time. What
    is accepted must be words for people (HARMLESS)."""
    bundle = make_bundle()
    original = json.loads((bundle / name).read_bytes())
    keys: list[tuple[str, ...]] = [(key,) for key in original]
    keys += [(key, inner) for key, value in original.items() if isinstance(value, dict) for inner in value]
    accepted = set()
    kinds = (None, -1.5, "x", [3], {"a": 1}, "\ud800")
    for index, key_path in enumerate(keys):
        for nonsense in (kinds[index % 6], kinds[(index + 2) % 6], kinds[(index + 3) % 6]):
            tree = json.loads(json.dumps(original))
            node = tree if len(key_path) == 1 else tree[key_path[0]]
            node[key_path[-1]] = nonsense
            (bundle / name).write_bytes(json.dumps(tree).encode())
            if name == MANIFEST:
                rest = {key: value for key, value in tree.items() if key != "bundle_sha256"}
                with contextlib.suppress(UnicodeEncodeError):
                    tree["bundle_sha256"] = sha256_json(rest) if key_path != ("bundle_sha256",) else nonsense
                    (bundle / name).write_bytes(render_json(tree))
            else:
                reseal(bundle)
            if tree == original:
                continue
            try:
                verify_bundle(bundle)
            except UserError as error:
                assert "\n" not in str(error)
            else:
                accepted.add(key_path)
    assert accepted <= HARMLESS[name], accepted - HARMLESS[name]


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
    assert "does not match this model and tokenizer.model" in refused(bundle)
    (bundle / "tokenizer.model").write_bytes(b"not a model")
    reseal(bundle)
    assert "not a SentencePiece model" in refused(bundle)
    shutil.copy(larger_tokenizer, bundle / "tokenizer.model")
    reseal(bundle)
    assert "tokenizer.model: 56 pieces, but the model's vocabulary is 48" in refused(bundle)
    with pytest.raises(UserError, match="56 pieces, but the model's vocabulary is 48"):
        make_bundle("larger", tokenizer=larger_tokenizer)
    with pytest.raises(UserError, match="not the tokenizer that the model was trained with"):
        make_bundle("other", lineage={"tokenizer_sha256": "0" * 64})


def test_a_judgment_of_packed_weights_beside_fp32_ones_is_refused(make_bundle: Make) -> None:
    bundle, section = make_bundle(), {"loss_fp32": 5.0, "loss": 5.01, "loss_difference": 0.01, "kl": 0.0, "prompts": 8}
    section |= {"format": "int8", "sha256": "3" * 64, "prompts_sha256": "4" * 64, "bytes": 1, "bytes_fp32": 4}
    section |= {"top1_agreement": 0.5, "max_loss_difference": 0.1, "passed": True}
    edit(bundle / "certificate.json", weight_format=section)
    reseal(bundle)
    assert "it judges int8 weights, and these are fp32" in refused(bundle)


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


def test_a_config_of_a_huge_model_is_refused_by_arithmetic(make_bundle: Make, tiny: SimpleNamespace) -> None:
    bundle = make_bundle()
    model = json.loads((bundle / "config.json").read_text())["model"]
    for key, value in (("num_layers", 10**9), ("vocab_size", 10**12), ("num_heads", 10**6)):
        edit(bundle / "config.json", model={**model, key: value})
        reseal(bundle)
        assert "the weights are smaller" in refused(bundle)
    edit(bundle / "config.json", model={**model, "d_ff": 20})
    reseal(bundle)
    assert "a model of different sizes than config.json" in refused(bundle)
    certified = json.loads((bundle / "certificate.json").read_text())["model"]
    edit(bundle / "certificate.json", model={**certified, "d_ff": 20})
    reseal(bundle)
    assert "num_parameters does not match its model" in refused(bundle)
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
        original = (bundle / name).read_bytes()
        (bundle / name).write_bytes(serialize({k: t + 0.001 for k, t in tensors.items()}))
        reseal(bundle)
        assert f"certifies a different {name}" in refused(bundle)
        (bundle / name).write_bytes(original)


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
    original = {**tiny.lineage, "tokenizer_sha256": sha256_file(tokenizer_path)}
    with pytest.raises(UserError) as caught:
        make_bundle(lineage={**original, **lineage})
    assert message in str(caught.value) and "\n" not in str(caught.value)
    bundle = make_bundle(lineage={**original, "git_commit": "1a7e"})  # the code may change
    assert verify_bundle(bundle)["certified"] is True
    edit(bundle / MANIFEST, lineage={**original, **lineage})
    reseal(bundle)
    assert message in refused(bundle)


def test_ranks_of_keys_are_those_that_were_measured(
    make_bundle: Make, invariant: PLDRModel, text: torch.Tensor
) -> None:
    section = measured_keys(invariant, text, [[6, 7], [8, 6]])
    bundle = make_bundle(key_rank_section=section)
    config, certificate = (json.loads((bundle / f"{name}.json").read_text()) for name in ("config", "certificate"))
    ours = "it holds no measurement of these key ranks and weights"
    for file, changes, message in (
        ("config", {"key_ranks": [[7, 6], [8, 6]]}, ours),
        ("config", {"key_ranks": None}, ours),
        ("config", {"key_ranks": [[8, 9], [8, 8]]}, "config.json: key_ranks: rank 9 is not a whole number from 1 to 8"),
        ("config", {"key_ranks": [[8, 3]]}, "config.json: key_ranks: not the ranks of 2 layers of 2 heads"),
        ("config", {"key_ranks": "all"}, "config.json: key_ranks: not the ranks"),
        ("certificate", {"key_rank": None}, "statement"),
        ("certificate", {"key_rank": {**section, "sha256": "0" * 64}}, ours),
        ("certificate", {"key_rank": {**section, "ranks": [[6, 7], [8, 5]]}}, "numbers_per_key"),
    ):
        edit(bundle / f"{file}.json", **changes)
        reseal(bundle)
        assert message in refused(bundle)
        for name, values in (("config", config), ("certificate", certificate)):
            edit(bundle / f"{name}.json", **values)
    reseal(bundle)
    assert verify_bundle(bundle)["numbers_per_key"] == 6.75


def test_the_section_has_to_be_about_these_weights(make_bundle: Make, invariant: PLDRModel, text: torch.Tensor) -> None:
    bundle = make_bundle(packed=measured(invariant, text, "int8"))
    certificate = json.loads((bundle / "certificate.json").read_text())
    section = certificate["weight_format"]
    for changed, message in (
        (None, "it holds no measurement of these int8 weights"),
        ({**section, "sha256": "0" * 64}, "it holds no measurement of these int8 weights"),
        ({**section, "format": "bf16"}, "it holds no measurement of these int8 weights"),
        ({**section, "loss_difference": 3.0}, "is not that of the losses"),
        ({**section, "loss": section["loss_fp32"] + 3.0, "loss_difference": 3.0}, "contradicts passed=True"),
        ({**section, "loss_difference": "x"}, "loss_difference: Input should be a valid number"),
    ):
        edit(bundle / "certificate.json", weight_format=changed)
        reseal(bundle)
        with pytest.raises(UserError, match=message):
            verify_bundle(bundle)
    edit(bundle / "certificate.json", weight_format=section)
    reseal(bundle)
    for weight_format, message in (
        ("int2", "not one of fp32, bf16, int8, int4"),
        ("fp32", "a different model.safetensors|smaller"),
    ):
        edit(bundle / "config.json", weight_format=weight_format)
        reseal(bundle)
        with pytest.raises(UserError, match=message):
            verify_bundle(bundle)


def test_scales_that_are_not_finite_are_refused(make_bundle: Make, invariant: PLDRModel, text: torch.Tensor) -> None:
    packed = measured(invariant, text, "int8")
    bundle = make_bundle(packed=packed)
    tensors = {name: t.clone() for name, t in packed.tensors.items()}
    tensors["output.weight.scale"][3] = float("inf")
    (bundle / "model.safetensors").write_bytes(serialize(tensors))
    sha256 = manifest_of(bundle)["model.safetensors"]["sha256"]
    edit(bundle / "certificate.json", weight_format={**packed.section, "sha256": sha256})
    reseal(bundle)
    with pytest.raises(UserError, match=r"output\.weight\.scale holds NaN or infinity"):
        verify_bundle(bundle)
