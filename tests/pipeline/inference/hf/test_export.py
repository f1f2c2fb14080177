"""An export says what it is, replaces nothing of others, and is not written when it cannot be right."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from launch.cli import main
from pipeline.bundle.weights import load_weights
from pipeline.inference.hf.export import export_hf
from pipeline.inference.hf.load import build, read_export
from pipeline.inference.opened import OpenModel
from pipeline.inference.source import open_model
from tests.helpers.exports import FILES, refused

pytest.importorskip("transformers")


def test_a_certified_bundle_is_written_checked_and_marked(written: Path, opened: OpenModel) -> None:
    assert {path.name for path in written.iterdir()} == FILES
    assert len({path.stat().st_mode for path in written.iterdir()}) == 1  # whoever reads one reads all
    manifest = read_export(written).manifest
    assert manifest["kind"] == "pldr-hf-export" and manifest["certified"] is True
    assert manifest["bundle_sha256"] == opened.sha256 and manifest["files"].keys() == FILES - {"MANIFEST.json"}
    check = manifest["selfcheck"]
    assert check["logits"]["difference"] <= 1e-5 * max(1, check["logits"]["largest"])
    assert check["greedy"]["prompts"] == check["greedy"]["equal"] == 20 and check["greedy"]["tokens"] > 100
    assert check["tokenizer"]["texts"] > 1000 and check["tokenizer"]["other_ids"] <= check["tokenizer"]["texts"] / 1000
    config, card = json.loads((written / "config.json").read_bytes()), (written / "README.md").read_text()
    assert config["uncertified"] is None and config["bos_token_id"] is None and config["head_dim"] == 32
    assert "certified: G_LM may be cached" in card and "UNCERTIFIED" not in card
    assert opened.certificate is not None and opened.certificate["statement"] in card
    assert "greedy tokens: equal for 20 of 20 prompts" in card
    assert json.loads((written / "certificate.json").read_bytes()) == opened.certificate


def test_a_model_in_memory_is_the_same(opened: OpenModel, written: Path) -> None:
    model, tokenizer = build(opened)
    state = load_file(written / "model.safetensors")
    assert model.state_dict().keys() == state.keys()
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert tokenizer("the lazy dog")["input_ids"] == opened.tokenizer.encode("the lazy dog")


def test_uncertified_and_rounded_exports_are_marked(
    opened: OpenModel, bundle: Path, make_bundle: Callable[..., Path], certificate: dict[str, Any], tmp_path: Path,
    unchecked: None,
) -> None:  # fmt: skip
    doubtful = open_model(make_bundle(uncertified=True))
    for source, settings in ((doubtful, {}), (opened, {"dtype": "bf16"}), (opened, {"dtype": "fp16"})):
        manifest = export_hf(source, tmp_path / "out", **settings)
        card = (tmp_path / "out" / "README.md").read_text()
        heading = next(line for line in card.splitlines() if line.startswith("#"))
        assert manifest["certified"] is False and "UNCERTIFIED" in heading
        assert json.loads((tmp_path / "out" / "config.json").read_bytes())["uncertified"] in heading
        assert ("not about this directory" in card) == bool(settings)
        assert not open_model(tmp_path / "out").certified


def test_rounded_weights_stay_uncertified_when_they_are_exported_again(
    opened: OpenModel, tmp_path: Path, unchecked: None
) -> None:
    """As fp32 they are not those of the certificate either, and no card says so."""
    export_hf(opened, tmp_path / "bf16", dtype="bf16")
    for source, target in (("bf16", "again"), ("again", "third")):
        rounded = open_model(tmp_path / source)
        assert "weights are rounded" in str(rounded.caution)
        manifest = export_hf(rounded, tmp_path / target)
        card = (tmp_path / target / "README.md").read_text()
        assert (
            not manifest["certified"] and manifest["dtype"] == "fp32" and "rounded weights" in manifest["uncertified"]
        )
        assert "and not about this directory" in card


def test_nothing_is_written_among_verified_files(
    opened: OpenModel, bundle: Path, export: Path, unchecked: None
) -> None:
    for target in (bundle / "hf", bundle / "a" / "b", export / "hf"):
        assert "name another folder" in refused(lambda target=target: export_hf(opened, target))
        assert not target.exists()
    assert main(["import", "hf", str(export), str(bundle)]) == 1  # its files have the names of a bundle's
    assert open_model(bundle).certified
    export_hf(opened, export)  # an export itself is replaced


def test_a_disk_that_is_full_is_one_line(
    opened: OpenModel, tmp_path: Path, unchecked: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import PreTrainedTokenizerFast

    def full(*_: Any, **__: Any) -> None:
        raise Exception("No space left on device (os error 28)")  # what `tokenizers` raises

    monkeypatch.setattr(PreTrainedTokenizerFast, "save_pretrained", full)
    message = refused(lambda: export_hf(opened, tmp_path / "out"))
    assert "the tokenizer cannot be written (No space left" in message and not list(tmp_path.iterdir())


def test_numbers_that_fp16_cannot_hold_are_refused(opened: OpenModel, tmp_path: Path) -> None:
    bias = opened.model.output.bias
    with torch.no_grad():
        kept, bias[5] = bias[5].item(), 1e6
        message = refused(lambda: export_hf(opened, tmp_path / "out", dtype="fp16"))
        bias[5] = kept
    assert "lm_head.bias" in message and not (tmp_path / "out").exists()


@pytest.mark.parametrize(("value", "problem"), [(float("nan"), "lm_head.weight holds NaN"), (3e38, "NaN or infinite")])
def test_a_model_without_finite_logits_is_refused(
    opened: OpenModel, tmp_path: Path, value: float, problem: str
) -> None:
    weight = opened.model.output.weight
    with torch.no_grad():
        kept = weight[5].clone()
        weight[5] = value
        message = refused(lambda: export_hf(opened, tmp_path / "out"))
        weight[5] = kept
    assert problem in message and not list(tmp_path.iterdir())


def test_shards(opened: OpenModel, tmp_path: Path, unchecked: None) -> None:
    import transformers

    export_hf(opened, tmp_path / "out", shard_size="20KB")
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_bytes())
    files = sorted((tmp_path / "out").glob("model-*.safetensors"))
    assert len(files) > 1 and {path.name for path in files} == set(index["weight_map"].values())
    state = opened.model.state_dict()
    weights = read_export(tmp_path / "out").weights
    assert all(torch.equal(weights[name], state[name]) for name in state)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=True)
    assert torch.equal(model.lm_head.weight, state["output.weight"])


@pytest.mark.parametrize("size", ["", "5", "0GB", "-1GB", "5TB", "1e3MB", "GB"])
def test_what_is_no_size_is_refused(opened: OpenModel, tmp_path: Path, size: str) -> None:
    assert "--shard-size" in refused(lambda: export_hf(opened, tmp_path / "out", shard_size=size))


def test_only_an_export_or_an_empty_folder_is_replaced(opened: OpenModel, tmp_path: Path, unchecked: None) -> None:
    mine = tmp_path / "mine"
    mine.mkdir()
    export_hf(opened, mine)
    export_hf(opened, mine)
    (tmp_path / "link").symlink_to(mine)
    (tmp_path / "file").touch()
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / "thesis.tex").touch()
    for name in ("link", "file", "work"):
        assert "name" in refused(lambda name=name: export_hf(opened, tmp_path / name))
    assert (tmp_path / "work" / "thesis.tex").exists()


def test_a_bundle_has_no_metric_learner_to_export(opened: OpenModel, tmp_path: Path) -> None:
    assert "--live" in refused(lambda: export_hf(opened, tmp_path / "out", live=True))


def test_a_live_export_says_what_it_is_and_comes_back(
    opened: OpenModel, tiny: Any, tmp_path: Path, unchecked: None
) -> None:
    learned = replace(opened, live=tiny.make_model(gain=1.0))
    manifest = export_hf(learned, tmp_path / "out", live=True)
    card = (tmp_path / "out" / "README.md").read_text()
    assert manifest["certified"] is False and manifest["live"] is True
    assert "UNCERTIFIED: with its metric learner" in card and "not vLLM" in card and "vllm serve" not in card
    assert main(["import", "hf", str(tmp_path / "out"), str(tmp_path / "folder")]) == 0
    model = load_weights(tmp_path / "folder")[0]
    assert learned.live is not None and model.config == learned.live.config
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in learned.live.state_dict().items())
    assert not (tmp_path / "folder" / "g_lm.safetensors").exists()
