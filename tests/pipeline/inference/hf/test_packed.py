"""int8 exports: the values of an int8 bundle, packed in the memory of stock transformers, and the same answers."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from pipeline.bundle.formats import SCALE, pack
from pipeline.errors import ConfigError, UserError
from pipeline.inference.hf.aligned import save_aligned
from pipeline.inference.hf.expectation import expect
from pipeline.inference.hf.export import export_hf
from pipeline.inference.hf.load import build, read_export
from pipeline.inference.hf.names import check_shapes, from_hf, to_hf
from pipeline.inference.hf.packed import (
    EMBEDDING,
    OUTPUT,
    VALUES,
    filled_size,
    from_packed,
    holds_integers,
    is_packed,
    to_packed,
    unpacked_shapes,
)
from pipeline.inference.hf.selfcheck import check_export, held_bytes
from pipeline.inference.hf.weights import weights_of
from pipeline.inference.opened import OpenModel
from pipeline.inference.source import open_model
from pipeline.io.tensors import read_header
from pldr_model.config import ModelConfig
from pldr_model.generation import generate
from pldr_model.model import PLDRModel
from tests.helpers.bundles import measured
from tests.helpers.exports import edit, refused, write_bundle
from tests.pipeline.inference.hf.test_names import make

pytest.importorskip("transformers")


@pytest.mark.parametrize("pack_output", [False, True])
@pytest.mark.parametrize("style", ["interleaved", "half"])
def test_values_and_scales_are_those_of_a_bundle(style: Any, pack_output: bool) -> None:
    """Each moves with its row; what fills up is zero and comes off again."""
    config = ModelConfig(
        vocab_size=40, num_layers=2, num_heads=2, head_dim=8, context_length=8, d_ff=70, rope_style=style
    )
    model = make(config, learned=False, seed=0).float()
    state = pack(model.state_dict(), "int8")
    packed = to_packed(to_hf(state, model.config), pack_output=pack_output)

    for name, values in state.items():
        if values.dtype == torch.int8:
            exact = values.double() * state[name + SCALE].double()[:, None]
            if name == "output.weight" and not pack_output:
                exact = exact.float().double()
            found = from_hf(from_packed(packed, model.config, torch.float64), model.config)[name]
            assert torch.equal(found, exact), name

    q_proj = packed["model.layers.0.self_attn.q_proj" + VALUES]
    rows = [0, 2, 4, 6, 1, 3, 5, 7] if style == "interleaved" else list(range(8))
    assert torch.equal(q_proj[:8], state["layers.0.attention.qkv.weight"][rows])

    size = filled_size(model.config)
    assert size == 128 and packed["model.layers.1.mlp.up_proj" + VALUES].shape == (128, 16)
    assert packed["model.layers.1.mlp.up_proj" + VALUES][70:].abs().max() == 0
    assert packed["model.layers.1.mlp.down_proj" + VALUES].shape == (16, 128)
    assert all(tensor.shape[1] % 16 == 0 for name, tensor in packed.items() if name.endswith(VALUES))
    assert (OUTPUT in packed) is not pack_output and packed[EMBEDDING].dtype == torch.int8
    integers = {name for name, tensor in packed.items() if tensor.dtype == torch.int8}
    assert is_packed(packed) and integers == set(filter(holds_integers, packed))
    check_shapes(
        unpacked_shapes({name: tuple(t.shape) for name, t in packed.items()}, model.config, size), model.config
    )


def test_int8_matrices_are_aligned_in_the_file(tmp_path: Path) -> None:
    tensors = {
        "a": torch.ones(3, dtype=torch.int8),
        "b": torch.arange(96, dtype=torch.int8).view(6, 16),
        "c": torch.rand(5),
        "d": torch.arange(32, dtype=torch.int8).view(2, 16),
        "e": torch.rand(2, 2),
    }
    file = tmp_path / "x.safetensors"
    save_aligned(tensors, file, {"format": "pt", "z": '{"quoted": "\u00e9"}'})
    found = load_file(file)
    assert found.keys() == tensors.keys() and all(torch.equal(found[name], tensors[name]) for name in tensors)
    header_length = int.from_bytes(file.read_bytes()[:8], "little")
    header = json.loads(file.read_bytes()[8 : 8 + header_length])
    assert all((8 + header_length + header[name]["data_offsets"][0]) % 16 == 0 for name in "bd")
    first = file.read_bytes()
    save_aligned(tensors, file, {"z": '{"quoted": "\u00e9"}', "format": "pt"})
    assert file.read_bytes() == first and read_header(file).keys() == tensors.keys()


def test_what_cannot_be_packed_is_refused(opened: OpenModel) -> None:
    narrow = make(
        ModelConfig(vocab_size=40, num_layers=1, num_heads=3, head_dim=8, context_length=8), learned=False, seed=0
    )
    with pytest.raises(UserError, match="width 24 is no multiple of 16"):
        weights_of(opened, narrow, "int8")
    with pytest.raises(ConfigError, match="--pack-output: packs the output layer of --dtype int8"):
        weights_of(opened, opened.model, "bf16", pack_output=True)
    learned = make(
        ModelConfig(vocab_size=40, num_layers=1, num_heads=2, head_dim=8, context_length=8), learned=True, seed=0
    )
    with pytest.raises(ConfigError, match="a metric learner is not packed"):
        weights_of(opened, learned, "int8")


def test_torchao_is_named_where_it_is_missing(opened: OpenModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchao", None)
    with pytest.raises(UserError, match=r"torchao is not installed; pip install 'pldr\[hf-int8\]'"):
        weights_of(opened, opened.model, "int8")


def test_parts_that_do_not_fit_are_named(opened: OpenModel) -> None:
    packed = to_packed(to_hf(pack(opened.model.state_dict(), "int8"), opened.model.config), pack_output=True)
    shapes = {name: tuple(tensor.shape) for name, tensor in packed.items()}
    size = filled_size(opened.model.config)
    for part in ("lm_head._weight_scale", "lm_head._weight_zero_point", "model.embed_tokens.scale"):
        with pytest.raises(UserError, match=part):
            unpacked_shapes({**shapes, part: (1, 1)}, opened.model.config, size)


@pytest.fixture(scope="module")
def int8_bundle(
    invariant: PLDRModel,
    text: torch.Tensor,
    certificate: dict[str, Any],
    tokenizer_path: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> OpenModel:
    packed = measured(invariant, text, "int8")
    folder = tmp_path_factory.mktemp("int8") / "bundle"
    return open_model(write_bundle(folder, invariant, text, certificate, tokenizer_path, packed=packed))


def test_an_int8_bundle_and_its_fp32_weights_give_the_same_file(
    int8_bundle: OpenModel, opened: OpenModel, tmp_path: Path, unchecked: None
) -> None:
    pytest.importorskip("torchao")
    manifest = export_hf(int8_bundle, tmp_path / "bundle", dtype="int8")
    fp32 = weights_of(opened, opened.model, "int8").tensors
    found = load_file(tmp_path / "bundle" / "model.safetensors")
    assert found.keys() == fp32.keys() and all(torch.equal(found[name], fp32[name]) for name in found)
    assert int8_bundle.certificate is not None
    assert manifest["weight_format"] == int8_bundle.certificate["weight_format"] and not manifest["certified"]
    card = (tmp_path / "bundle" / "README.md").read_text()
    assert "rounded to int8" in card and "held-out loss" in card and "--dtype float32" in card
    parts = read_export(tmp_path / "bundle")
    state = int8_bundle.model.state_dict()
    assert parts.config == int8_bundle.model.config and all(torch.equal(parts.weights[n], state[n]) for n in state)
    again = open_model(tmp_path / "bundle")
    assert again.rounded and "weights are rounded" in str(again.caution)


def test_fp32_weights_of_an_int8_bundle_are_not_called_certified(
    int8_bundle: OpenModel, tmp_path: Path, unchecked: None
) -> None:
    manifest = export_hf(int8_bundle, tmp_path / "out")
    assert not manifest["certified"] and "made of a bundle with int8 weights" in manifest["uncertified"]
    assert manifest["rounded"] and manifest["weight_format"]["format"] == "int8"
    assert "held-out loss" in (tmp_path / "out" / "README.md").read_text()


@pytest.fixture(scope="module")
def written_int8(int8_bundle: OpenModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With the output layer, in several files, and checked."""
    pytest.importorskip("torchao")
    folder = tmp_path_factory.mktemp("int8") / "export"
    export_hf(int8_bundle, folder, dtype="int8", pack_output=True, shard_size="2KB")
    return folder


def load(folder: Path, **settings: Any) -> Any:
    import transformers

    return transformers.AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, **settings).eval()


@pytest.mark.slow
def test_stock_transformers_keeps_it_packed_and_gives_our_tokens(written_int8: Path, int8_bundle: OpenModel) -> None:
    from torchao.quantization import Int8Tensor

    check = json.loads((written_int8 / "MANIFEST.json").read_bytes())["selfcheck"]
    assert check["exact"] < 1e-12 and check["greedy"]["equal"] == 20 and len(list(written_int8.glob("model-*"))) > 3
    model = load(written_int8)
    linear = [module for module in model.modules() if isinstance(module, torch.nn.Linear)]
    assert len(linear) == 2 * 7 + 1 and all(isinstance(module.weight, Int8Tensor) for module in linear)
    assert model.model.embed_tokens.weight.dtype == torch.int8
    assert all(module.weight.qdata.data_ptr() % 16 == 0 for module in linear), "as torch.compile's kernel needs it"
    assert held_bytes(model) == check["held_bytes"] == check["stored_bytes"] < 0.5 * held_bytes(build(int8_bundle)[0])

    prompts = [[7, 8, 9, 30, 12], [5], [11, 12, 13]]
    expected = generate(int8_bundle.model, prompts, max_new_tokens=10, eos_id=3)
    for cache in ("dynamic", "static"):
        for prompt, ids in zip(prompts, expected, strict=True):
            out = model.generate(torch.tensor([prompt]), max_new_tokens=10, do_sample=False, cache_implementation=cache)
            assert out[0, len(prompt) :].tolist() == ids


@pytest.mark.slow
def test_transformers_cannot_save_it_again(written_int8: Path, tmp_path: Path) -> None:
    """When this fails, transformers has learned it: docs/export.md says that it cannot."""
    with pytest.raises(NotImplementedError):
        load(written_int8).save_pretrained(tmp_path / "again")


COMPILED = """
import sys, torch, transformers
model = transformers.AutoModelForCausalLM.from_pretrained(
    sys.argv[1], trust_remote_code=True, dtype=torch.bfloat16).eval()
ids = torch.tensor([[5, 6, 7, 8, 9]])
with torch.inference_mode():
    plain, compiled = model(ids).logits, torch.compile(model)(ids).logits
print("DIFFERENCE", float((plain - compiled).abs().max()), float(plain.abs().max()))
"""


@pytest.mark.slow
def test_compiled_in_bf16_it_gives_the_same(written_int8: Path) -> None:
    """The kernel that torch.compile takes gives garbage, or ends the process, where columns are no multiple of 16 or weights
    are not at a multiple of 16 bytes."""
    done = subprocess.run([sys.executable, "-c", COMPILED, written_int8], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    difference, largest = map(float, done.stdout.split("DIFFERENCE")[1].split())
    assert difference <= 0.05 * max(1.0, largest)


@pytest.mark.slow
def test_weights_that_would_be_unpacked_are_found(int8_bundle: OpenModel, tmp_path: Path) -> None:
    """A config.json without its quantization: transformers draws the weights anew, and says so in a warning only."""
    pytest.importorskip("torchao")
    export_hf(int8_bundle, tmp_path / "out", dtype="int8")
    edit(tmp_path / "out" / "config.json", quantization_config=None)
    weights = weights_of(int8_bundle, int8_bundle.model, "int8")
    wide = weights.as_model(torch.float64)
    expected, logits = expect(int8_bundle.model, int8_bundle.tokenizer, seed="x", texts=["a"], wide=wide)
    message = refused(lambda: check_export(tmp_path / "out", expected, logits, stored_bytes=weights.nbytes))
    assert "differs from the model" in message or "does not work" in message
