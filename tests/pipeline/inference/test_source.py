"""A model is the same wherever it is opened, and what is none is refused in one line."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from pipeline.bundle.extracted import save_g
from pipeline.errors import UserError
from pipeline.inference.hf.export import export_hf
from pipeline.inference.source import open_model
from pipeline.io.storage import render_json, sha256_file
from pipeline.post.extract import extract_g
from pldr_model.model import PLDRModel


def refused(*arguments: Any, **keywords: Any) -> str:
    with pytest.raises(UserError) as caught:
        open_model(*arguments, **keywords)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_run_and_its_bundle_are_one_model(
    make_bundle: Callable[..., Path], make_finished: Callable[..., Path], invariant: PLDRModel, text: torch.Tensor
) -> None:
    bundle, run = open_model(make_bundle()), open_model(make_finished(), live=True)
    assert (bundle.kind, run.kind, run.name) == ("bundle", "run", "finished")
    assert bundle.certified and run.certified and bundle.caution is None
    assert torch.equal(bundle.g_lm, run.g_lm) and bundle.live is None and run.live is not None
    assert bundle.generation == run.generation and bundle.tokenizer.sha256 == run.tokenizer.sha256
    ids_BS = text[:4, :-1]
    with torch.inference_mode():
        assert torch.equal(bundle.model(ids_BS), run.model(ids_BS))
        assert torch.equal(run.live(ids_BS), invariant(ids_BS))
    assert not bundle.model.training and not run.live.training


def test_the_hash_names_model_and_g(make_finished: Callable[..., Path], text: torch.Tensor, tiny: Any) -> None:
    path = make_finished()
    first = open_model(path).sha256
    assert open_model(path).sha256 == first
    g_lm = extract_g(tiny.make_model(seed=1), text[:, :-1], "mean")
    save_g(g_lm, Path(yaml.safe_load(path.read_text())["run_dir"]) / "g_lm")
    again = open_model(path)
    assert again.sha256 != first
    # The certificate is of another G: it says nothing of this one.
    assert again.certificate is None and not again.certified and "no certificate" in str(again.caution)


def test_a_bundle_is_called_after_its_run(make_bundle: Callable[..., Path], tmp_path: Path) -> None:
    assert open_model(make_bundle()).name == tmp_path.resolve().name
    assert open_model(make_bundle("mine")).name == "mine"


def test_an_uncertified_bundle_says_so(make_bundle: Callable[..., Path]) -> None:
    opened = open_model(make_bundle(uncertified=True))
    assert not opened.certified and "UNCERTIFIED" in str(opened.caution)


def test_live_is_there_where_asked_for(make_bundle: Callable[..., Path], make_finished: Callable[..., Path]) -> None:
    bundle, run = make_bundle(), make_finished()
    assert open_model(bundle, live=None).live is None and open_model(run, live=None).live is not None
    assert open_model(run).live is None
    assert "no metric learner" in refused(bundle, live=True)


def test_a_bundle_with_its_metric_learner_is_live(
    make_bundle: Callable[..., Path], text: torch.Tensor, tiny: Any
) -> None:
    model = tiny.make_model(gain=1.0)
    bundle = make_bundle(model=model, certificate=tiny.certify(model, text), uncertified=True, with_metric_learner=True)
    opened = open_model(bundle, live=True)
    ids_BS = text[:4, :-1]
    with torch.inference_mode():
        assert torch.equal(opened.live(ids_BS), model(ids_BS))
        assert not torch.allclose(opened.model(ids_BS), model(ids_BS))
    assert open_model(bundle).live is None


@pytest.mark.slow
def test_an_export_with_rounded_weights_is_another_model(make_bundle: Callable[..., Path], tmp_path: Path) -> None:
    opened = open_model(make_bundle())
    export_hf(opened, tmp_path / "bf16", dtype="bf16")
    rounded = open_model(tmp_path / "bf16")
    assert rounded.sha256 != opened.sha256 and not rounded.certified
    assert "UNCERTIFIED export: its weights are rounded" in str(rounded.caution)
    (tmp_path / "bf16" / "MANIFEST.json").unlink()
    assert "MANIFEST.json" in refused(tmp_path / "bf16")


def test_what_is_no_model_is_refused(
    make_bundle: Callable[..., Path], make_finished: Callable[..., Path], tmp_path: Path
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.txt").write_text("x")
    (tmp_path / "gpt").mkdir()
    (tmp_path / "gpt" / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    (tmp_path / "odd").mkdir()
    (tmp_path / "odd" / "config.json").write_text("[1, 2")
    assert "neither a bundle" in refused(tmp_path / "empty")
    assert "neither a bundle" in refused(tmp_path / "gpt")
    assert "not valid JSON" in refused(tmp_path / "odd")
    assert "not a model" in refused(tmp_path / "text.txt")
    assert "no such file or folder" in refused(tmp_path / "none")
    assert "takes overrides" in refused(make_bundle(), ["train.steps=3"])
    damaged = make_bundle("damaged")
    (damaged / "MANIFEST.json").unlink()
    assert "MANIFEST.json" in refused(damaged)
    run = Path(yaml.safe_load(make_finished().read_text())["run_dir"])
    (run / "run.json").write_text("{}")
    assert "name the run's YAML" in refused(run)


def test_a_run_without_its_parts_names_the_command(make_finished: Callable[..., Path], tmp_path: Path) -> None:
    path = make_finished()
    assert "`pldr run " in refused(path, [f"run_dir={tmp_path / 'none'}"])
    assert f"{path} run_dir={tmp_path / 'none'}`" in refused(path, [f"run_dir={tmp_path / 'none'}"])
    (tmp_path / "finished" / "g_lm").rename(tmp_path / "gone")
    assert f"`pldr extract {path}`" in refused(path)


def test_a_run_without_a_metric_learner_has_no_live_g(make_finished: Callable[..., Path], tiny: Any) -> None:
    model = tiny.make_model(config=tiny.config.sdpa_twin())
    path = make_finished(model)
    assert open_model(path, live=None).live is None
    assert "identity" in refused(path, live=True)


def test_a_run_with_another_tokenizer_is_refused(make_finished: Callable[..., Path], tokenizer_path: Path) -> None:
    path = make_finished(tokenizer_sha256=sha256_file(tokenizer_path))
    assert open_model(path).tokenizer.sha256 == sha256_file(tokenizer_path)
    config = json.loads((path.parent / "finished" / "weights" / "config.json").read_bytes())
    config["source"]["tokenizer_sha256"] = "0" * 64
    del config["digest"]
    (path.parent / "finished" / "weights" / "config.json").write_bytes(render_json(config))
    assert "not the tokenizer" in refused(path)
