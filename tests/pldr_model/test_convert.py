"""Reference checkpoints in and out, bit for bit; foreign and broken files by name."""

import json
import os

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from pldr_model.config import ModelConfig
from pldr_model.convert import (
    from_reference,
    infer_config,
    load_checkpoint_file,
    save_checkpoint_file,
    to_reference,
)
from pldr_model.model import PLDRModel


@pytest.fixture(params=["tiny_f64", "padded_f64", "base_f32"])
def case(request, golden):
    config = ModelConfig.from_reference(json.loads((golden / request.param / "config.json").read_text()))
    return config, load_file(golden / request.param / "state_dict.safetensors")


def assert_bit_equal(one, other):
    assert one.keys() == other.keys()
    for key in one:
        assert one[key].dtype == other[key].dtype
        assert torch.equal(one[key], other[key]), key


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_round_trip_through_a_model_and_a_file_is_bit_equal(case, suffix, tmp_path):
    config, reference = case
    source, target = tmp_path / f"in{suffix}", tmp_path / f"out{suffix}"
    save_checkpoint_file(reference, source)
    model = PLDRModel(config).to(reference["final_layer.weight"].dtype)
    model.load_state_dict(from_reference(load_checkpoint_file(source), config))
    save_checkpoint_file(to_reference(model.state_dict(), config), target)
    assert_bit_equal(load_checkpoint_file(target), reference)


def test_a_bare_pth_is_read_like_a_wrapped_one(case, tmp_path):
    _, reference = case
    torch.save(reference, tmp_path / "bare.pth")
    assert_bit_equal(load_checkpoint_file(tmp_path / "bare.pth"), reference)


def test_sizes_are_inferred_from_shapes(case):
    config, reference = case
    inferred = infer_config(reference, context_length=config.context_length)
    assert inferred == ModelConfig.from_dict({**config.to_dict(), "dag_coefficients": [0.0, 0.0, 0.0]})


def test_v52_differs_by_its_rotary_layout(case):
    config, reference = case
    v52 = infer_config(reference, context_length=config.context_length, rope_style="half")
    ids = torch.randint(4, config.vocab_size, (1, 20))
    logits = []
    for each in (config, v52):
        model = PLDRModel(each).to(reference["final_layer.weight"].dtype)
        model.load_state_dict(from_reference(reference, each))
        logits.append(model(ids))
    assert (logits[0] - logits[1]).abs().max() > 1e-3
    assert_bit_equal(to_reference(model.state_dict(), v52), reference)


def test_a_constant_g_model_has_no_metric_learner_to_convert(case):
    config, reference = case
    constant = config.with_constant_g()
    stripped = {k: v for k, v in reference.items() if ".mha1.layernorm1." not in k and "reslayerAs" not in k}
    stripped = {k: v for k, v in stripped.items() if "plgatt_layer" not in k}
    ours = from_reference(stripped, constant)
    g_lm = torch.zeros(config.num_layers, config.num_heads, config.head_dim, config.head_dim)
    PLDRModel(constant, g_lm_LHKK=g_lm).load_state_dict({**ours, "g_lm": g_lm})
    assert_bit_equal(to_reference({**ours, "g_lm": g_lm}, constant), stripped)


def test_a_metric_learner_without_glus_is_refused_both_ways(case):
    config, reference = case
    without = ModelConfig.from_dict({**config.to_dict(), "num_denseA": 0})
    for convert in (
        lambda: from_reference(reference, without),
        lambda: to_reference(PLDRModel(without).state_dict(), without),
    ):
        with pytest.raises(ValueError, match=r"^num_denseA: 0, but every residual unit of the reference has GLUs"):
            convert()


def test_wrong_keys_and_shapes_are_named(case):
    config, reference = case
    key = "decoder.dec_layers.0.mha1.plgatt_layer.pwlst"
    missing = {k: v for k, v in reference.items() if k != key}
    with pytest.raises(ValueError, match=rf"^{key}: missing"):
        from_reference(missing, config)
    with pytest.raises(ValueError, match=r"^model\.layers\.0\.mlp: not a key of this model"):
        from_reference({**reference, "model.layers.0.mlp": torch.zeros(1)}, config)
    with pytest.raises(ValueError, match=r"^final_layer\.bias: shape \(3,\), but the configuration needs"):
        from_reference({**reference, "final_layer.bias": torch.zeros(3)}, config)
    with pytest.raises(ValueError, match="missing; this is no PLDR-LLM checkpoint"):
        infer_config({"wte.weight": torch.zeros(2, 2)}, context_length=8)
    with pytest.raises(ValueError, match=r"^embedding\.weight: missing from the state dict"):
        to_reference({}, config)


class _Bomb:
    def __reduce__(self):
        return os.mkdir, ("exploded",)


def test_nothing_in_a_pth_is_executed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"model_state_dict": {"a": _Bomb()}}, "bomb.pth")
    with pytest.raises(ValueError, match=r"bomb\.pth: not a checkpoint of plain tensors"):
        load_checkpoint_file("bomb.pth")
    assert not (tmp_path / "exploded").exists()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.pth", b"", "not a checkpoint of plain tensors"),
        ("b.pth", b"not a zip file at all", "not a checkpoint of plain tensors"),
        ("c.safetensors", b"\xff" * 100, "not a readable safetensors file"),
        ("d.safetensors", b"", "not a readable safetensors file"),
    ],
)
def test_broken_files_are_named(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=rf"{name}: {message}"):
        load_checkpoint_file(tmp_path / name)


def test_files_of_something_else_are_named(tmp_path):
    path = tmp_path / "x.pth"
    torch.save({"model_state_dict": {"epoch": 3}}, path)
    with pytest.raises(ValueError, match=r"x\.pth: 'epoch' is a int, not a tensor"):
        load_checkpoint_file(path)
    torch.save(torch.zeros(3), path)
    with pytest.raises(ValueError, match=r"x\.pth: holds a Tensor, not a state dictionary"):
        load_checkpoint_file(path)
    with pytest.raises(FileNotFoundError, match=r"none\.pth: no such checkpoint file"):
        load_checkpoint_file(tmp_path / "none.pth")
    with pytest.raises(ValueError, match=r"unknown suffix '\.bin'"):
        save_checkpoint_file({}, tmp_path / "x.bin")


def test_truncated_checkpoints_are_named(case, tmp_path):
    _, reference = case
    for suffix in (".pth", ".safetensors"):
        path = tmp_path / f"cut{suffix}"
        save_checkpoint_file(reference, path)
        path.write_bytes(path.read_bytes()[:-1000])
        with pytest.raises(ValueError, match="cut"):
            load_checkpoint_file(path)


def test_a_changed_number_in_a_pth_is_found(case, tmp_path):
    _, reference = case
    path = tmp_path / "x.pth"
    save_checkpoint_file(reference, path)
    data, numbers = path.read_bytes(), max(reference.values(), key=torch.numel).numpy().tobytes()
    at = data.index(numbers) + len(numbers) // 2
    path.write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
    with pytest.raises(ValueError, match="x.pth: not a checkpoint of plain tensors"):
        load_checkpoint_file(path)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@settings(max_examples=80, deadline=None)
@given(data=st.data(), zipped=st.booleans())
def test_damaged_pth_files_are_read_or_refused_in_one_line(tmp_path_factory, data, zipped):
    path = tmp_path_factory.mktemp("damaged") / "x.pth"
    torch.save(
        {"model_state_dict": {"a": torch.ones(3), "b": torch.zeros(2, 2)}}, path, _use_new_zipfile_serialization=zipped
    )
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 8))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(content[: data.draw(st.integers(0, len(content)))] if data.draw(st.booleans()) else content)
    try:
        state = load_checkpoint_file(path)
    except ValueError as error:
        assert str(path) in str(error)
        assert "\n" not in str(error)
    else:
        assert all(isinstance(tensor, torch.Tensor) for tensor in state.values())


def test_half_precision_and_shared_storage_survive(tmp_path):
    state = {"a": torch.randn(4, 6, dtype=torch.bfloat16).T, "b": torch.arange(3.0)[1:]}
    for suffix in (".pth", ".safetensors"):
        save_checkpoint_file(state, tmp_path / f"x{suffix}")
        assert_bit_equal(load_checkpoint_file(tmp_path / f"x{suffix}"), state)
    save_file({"a": torch.zeros(1)}, tmp_path / "y.safetensors")
    assert load_checkpoint_file(tmp_path / "y.safetensors").keys() == {"a"}


def test_weights_that_the_model_does_not_know_are_not_left_out(case):
    config, reference = case
    ours = from_reference(reference, config)
    for name in ("layers.0.attention.lora.weight", "layers.99.attention.qkv.weight", "x.g_lm", "adapter"):
        with pytest.raises(ValueError, match=rf"{name}: not a weight of this model \(1 unknown in all\)"):
            to_reference({**ours, name: torch.ones(2, 2)}, config)
    renamed = {("base." if name == "output.bias" else "") + name: tensor for name, tensor in ours.items()}
    with pytest.raises(ValueError, match=r"output\.bias: missing from the state dict; there is 'base\.output\.bias'"):
        to_reference(renamed, config)
    with pytest.raises(ValueError, match=r"output\.weight: shape .*, but the configuration needs"):
        to_reference({**ours, "output.weight": ours["output.weight"][1:]}, config)
