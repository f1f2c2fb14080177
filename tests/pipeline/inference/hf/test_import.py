"""An export comes back bit for bit; what is damaged or foreign is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from launch.cli import main
from pipeline.bundle.weights import load_weights
from pipeline.inference.hf.export import export_hf
from pipeline.inference.hf.imported import read_directory
from pipeline.inference.hf.load import read_export
from pipeline.inference.opened import OpenModel
from pipeline.inference.source import open_model
from pldr_model.config import ModelConfig
from pldr_model.convert import from_reference
from tests.helpers.exports import FILES, edit, refused

pytest.importorskip("transformers")
GOLDEN = Path(__file__).resolve().parents[3] / "golden" / "tiny_f64"


def test_it_comes_back_bit_for_bit(written: Path, opened: OpenModel, tmp_path: Path) -> None:
    parts = read_export(written)
    state = opened.model.state_dict()
    assert parts.config == opened.config and parts.tokenizer.sha256 == opened.tokenizer.sha256
    assert parts.weights.keys() == state.keys() and all(torch.equal(parts.weights[name], state[name]) for name in state)
    assert main(["import", "hf", str(written), str(tmp_path / "folder")]) == 0
    model, source = load_weights(tmp_path / "folder")
    assert all(torch.equal(model.state_dict()[name], state[name]) for name in state)
    assert torch.equal(load_file(tmp_path / "folder" / "g_lm.safetensors")["g_lm"], opened.g_lm)
    assert source == {"imported_from": "written", "sha256": opened.sha256}
    again = open_model(written)
    assert again.certified and again.kind == "hf" and torch.equal(again.g_lm, opened.g_lm)


def test_weights_that_are_no_floating_point_numbers_are_refused(export: Path) -> None:
    (export / "MANIFEST.json").unlink()
    tensors = load_file(export / "model.safetensors")
    save_file({name: tensor.to(torch.int32) for name, tensor in tensors.items()}, export / "model.safetensors")
    assert "floating-point" in refused(lambda: read_directory(export))


def test_rounded_weights_come_back_as_they_were_written(opened: OpenModel, tmp_path: Path, unchecked: None) -> None:
    export_hf(opened, tmp_path / "out", dtype="bf16")
    assert {tensor.dtype for tensor in load_file(tmp_path / "out" / "model.safetensors").values()} == {torch.bfloat16}
    state = opened.model.state_dict()
    weights = read_export(tmp_path / "out").weights
    assert all(torch.equal(weights[name], state[name].bfloat16().float()) for name in state)


@pytest.mark.parametrize("name", sorted(FILES - {"MANIFEST.json"}))
def test_a_changed_byte_is_found(export: Path, name: str) -> None:
    data = bytearray((export / name).read_bytes())
    data[len(data) // 2] ^= 1
    (export / name).write_bytes(bytes(data))
    assert f"{name}: sha256 differs" in refused(lambda: read_export(export))
    (export / name).unlink()
    assert f"{name}: missing" in refused(lambda: read_export(export))


def test_a_changed_manifest_is_found(export: Path) -> None:
    edit(export / "MANIFEST.json", certified=False)
    assert "MANIFEST.json" in refused(lambda: read_export(export))


def saved_again(export: Path, **changes: Any) -> Path:
    """As `save_pretrained` leaves it: without our manifest."""
    (export / "MANIFEST.json").unlink()
    if changes:
        edit(export / "config.json", **changes)
    return export


def test_what_save_pretrained_writes_is_imported(export: Path, opened: OpenModel, tmp_path: Path) -> None:
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(export, trust_remote_code=True)
    model.save_pretrained(tmp_path / "again", max_shard_size="20KB")
    assert main(["import", "hf", str(tmp_path / "again"), str(tmp_path / "folder")]) == 0
    loaded = load_weights(tmp_path / "folder")[0].state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in opened.model.state_dict().items())


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"model_type": "llama"}, "model_type 'llama'"),
        ({"num_hidden_layers": 3}, "larger model"),
        ({"num_hidden_layers": 10**12}, "larger model"),
        ({"num_hidden_layers": 1}, "not a tensor"),
        ({"qk_head_dim": 7}, "odd"),
        ({"qk_head_dim": None}, "head_dim"),
        ({"vocab_size": "48"}, "vocab_size"),
        ({"rope_parameters": None}, "config.json"),
        ({"source_rope_style": "spiral"}, "source_rope_style"),
        ({"g_source": "guessed"}, "g_source"),
        ({"rope_parameters": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}}, "'dynamic'"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 2.0}}, "original_context_length"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings"),
        ({"hidden_size": 20}, "hidden_size"),
        ({"v_head_dim": 4}, "v_head_dim"),
    ],
)
def test_a_configuration_of_another_model_is_refused(
    export: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path, changes: dict[str, Any], problem: str
) -> None:
    code = main(["import", "hf", str(saved_again(export, **changes)), str(tmp_path / "folder")])
    errors = capsys.readouterr().err
    assert code != 0 and problem in errors and errors.count("\n") == 1 and not (tmp_path / "folder").exists()


def make_port(folder: Path, **changes: Any) -> ModelConfig:
    """The golden reference model as the published transformers port stores it, in three files."""
    state = {name: tensor.float() for name, tensor in load_file(GOLDEN / "state_dict.safetensors").items()}
    golden = json.loads((GOLDEN / "config.json").read_bytes())
    folder.mkdir()
    renamed = {"dff": "intermediate_size", "num_layers": "num_hidden_layers", "num_heads": "num_attention_heads",
               "max_seq_len": "max_position_embeddings", "d_model": "hidden_size", "rope_base": "rope_theta"}  # fmt: skip
    values = {renamed.get(key, key): value for key, value in golden.items() if key != "rope_style"}
    values |= {"model_type": "pldrllm", "reference_rope": True, "custom_G_type": None, "cache_first_G": False}
    (folder / "config.json").write_text(json.dumps({**values, **changes}))
    names = sorted(state)
    files = {name: f"model-0000{i % 3 + 1}-of-00003.safetensors" for i, name in enumerate(names)}
    for file in set(files.values()):
        save_file({name: state[name] for name in names if files[name] == file}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}))
    return ModelConfig.from_transformers(values)


def test_the_published_ports_checkpoints_are_read(tmp_path: Path) -> None:
    config = make_port(tmp_path / "port")
    assert main(["import", "hf", str(tmp_path / "port"), str(tmp_path / "folder")]) == 0
    model, source = load_weights(tmp_path / "folder")
    state = {name: tensor.float() for name, tensor in load_file(GOLDEN / "state_dict.safetensors").items()}
    expected = from_reference(state, config)
    assert model.config == config and source["imported_from"] == "port"
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in expected.items())
    assert not (tmp_path / "folder" / "g_lm.safetensors").exists()


@pytest.mark.parametrize(
    ("where", "problem"),
    [
        ({"decoder.embedding.weight": "../port/model-00001-of-00003.safetensors"}, "same folder"),
        ({"decoder.embedding.weight": "/etc/passwd"}, "same folder"),
        ({"decoder.embedding.weight": "weights.bin"}, "no safetensors"),
        ({"decoder.embedding.weight": "other.safetensors"}, "missing"),
        ({"decoder.embedding.weight": "model-00001-of-00003.safetensors"}, "does not list decoder.embedding.weight"),
        ({"more": "model-00001-of-00003.safetensors"}, "does not hold"),
        ({"more": 7}, "weight_map"),
    ],
)
def test_an_index_that_points_elsewhere_is_refused(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, where: dict[str, Any], problem: str
) -> None:
    make_port(tmp_path / "port")
    index = tmp_path / "port" / "model.safetensors.index.json"
    files = json.loads(index.read_bytes())["weight_map"]
    index.write_text(json.dumps({"weight_map": {**files, **where}}))
    assert main(["import", "hf", str(tmp_path / "port"), str(tmp_path / "folder")]) != 0
    errors = capsys.readouterr().err
    assert problem in errors and errors.count("\n") == 1 and not (tmp_path / "folder").exists()


def test_foreign_directories_are_refused_in_one_line(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, bundle: Path
) -> None:
    make_port(tmp_path / "external", custom_G_type="external")
    make_port(tmp_path / "huge", num_hidden_layers=10**12)
    make_port(tmp_path / "pickle")
    for path in (tmp_path / "pickle").glob("*.safetensors*"):
        path.unlink()
    (tmp_path / "pickle" / "pytorch_model.bin").write_bytes(b"\x80")
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "config.json").write_text("{")
    problems = {
        "external": "external",
        "huge": "larger model",
        "pickle": "no pickle",
        "empty": "config.json",
        "broken": "JSON",
        "absent": "config.json",
    }
    for name, problem in problems.items():
        assert main(["import", "hf", str(tmp_path / name), str(tmp_path / "folder")]) != 0
        errors = capsys.readouterr().err
        assert problem in errors and errors.count("\n") == 1, name
    assert main(["import", "hf", str(bundle), str(tmp_path / "folder")]) != 0
    assert "a bundle" in capsys.readouterr().err
    assert not (tmp_path / "folder").exists()
