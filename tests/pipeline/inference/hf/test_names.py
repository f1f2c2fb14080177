"""Our tensors under transformers' names: the same mathematics, and the same bits back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.errors import UserError
from pipeline.inference.hf.names import check_shapes, from_hf, hf_shapes, to_hf
from pipeline.inference.hf.sizes import HEAD_SIZES, hf_config, model_config
from pldr_model.config import ModelConfig
from pldr_model.model import PLDRModel, to_constant_g
from pldr_model.rope_scaling import RopeScaling

pytest.importorskip("transformers")

sizes = st.builds(
    ModelConfig,
    vocab_size=st.integers(4, 40),
    num_layers=st.integers(1, 3),
    num_heads=st.integers(1, 3),
    head_dim=st.integers(1, 20).map(lambda half: 2 * half),
    context_length=st.integers(2, 24),
    d_ff=st.none() | st.integers(1, 30),
    A_dff=st.integers(1, 9),
    num_reslayerA=st.integers(1, 3),
    num_denseA=st.integers(1, 2),
    rope_base=st.sampled_from([100.0, 10000.0, 500000.0]),
    rope_style=st.sampled_from(["interleaved", "half"]),
    layer_norm_eps=st.sampled_from([1e-6, 1e-3]),
)


def make(config: ModelConfig, *, learned: bool, seed: int) -> PLDRModel:
    """A model whose every parameter matters, in fp64."""
    torch.manual_seed(seed)
    model = PLDRModel(config).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    shape = (config.num_layers, config.num_heads, config.head_dim, config.head_dim)
    return model if learned else to_constant_g(model, torch.randn(shape).double())


def in_transformers(model: PLDRModel, *, attention: str = "sdpa") -> Any:
    from pipeline.inference.hf.modeling_pldr import PldrForCausalLM

    config = hf_config(model.config, uncertified=None, dtype="fp32")
    config._attn_implementation = attention
    theirs = PldrForCausalLM(config).double().eval()
    theirs.load_state_dict(to_hf(model.state_dict(), model.config))
    return theirs


@settings(max_examples=20, deadline=None)
@given(config=sizes, learned=st.booleans(), attention=st.sampled_from(["sdpa", "eager"]), seed=st.integers(0, 99))
def test_same_logits_in_fp64_and_the_same_bits_back(
    config: ModelConfig, learned: bool, attention: str, seed: int
) -> None:
    model = make(config, learned=learned, seed=seed)
    state = model.state_dict()
    theirs = to_hf(state, model.config)
    assert {name: tuple(tensor.shape) for name, tensor in theirs.items()} == hf_shapes(model.config)
    back = from_hf(theirs, model.config)
    assert back.keys() == state.keys() and all(torch.equal(back[name], state[name]) for name in state)

    ids = torch.randint(0, config.vocab_size, (2, config.context_length))
    with torch.no_grad():
        ours = model(ids, padded=False)
        found = in_transformers(model, attention=attention)(ids).logits
    assert found.dtype == torch.float64
    # In rare draws PLGA's powers make 1e-8 of what fp64 rounds.
    assert (found - ours).abs().max() <= 1e-6 * max(1.0, ours.abs().max().item())


SCALINGS = [
    {"type": "linear", "factor": 3.0},
    {"type": "llama3", "factor": 4.0, "original_context_length": 16, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
    {"type": "yarn", "factor": 4.0, "original_context_length": 16},
    {"type": "yarn", "factor": 4.0, "original_context_length": 16, "beta_fast": 8.0, "attention_factor": 1.25},
]


@pytest.mark.parametrize("scaling", SCALINGS, ids=lambda scaling: scaling["type"])
def test_scaled_positions_beyond_the_original_context(scaling: dict[str, Any]) -> None:
    """Our logits in fp64, and the frequencies that transformers has for these rope types."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    from pipeline.inference.hf.layers_pldr import rotary

    config = ModelConfig(
        vocab_size=40, num_layers=2, num_heads=2, head_dim=32, context_length=64, rope_scaling=RopeScaling(**scaling)
    )
    model = make(config, learned=False, seed=1)
    theirs = in_transformers(model)
    ids = torch.randint(0, 40, (1, 64))
    with torch.no_grad():
        ours = model(ids, padded=False)
        assert (theirs(ids).logits - ours).abs().max() <= 1e-12 * ours.abs().max()
    frequencies, magnitude = rotary(theirs.config, torch.float64, torch.device("cpu"))
    expected, factor = ROPE_INIT_FUNCTIONS[scaling["type"]](theirs.config, torch.device("cpu"))
    torch.testing.assert_close(frequencies.float(), expected)
    assert magnitude == pytest.approx(factor)
    assert model_config(theirs.config.to_dict(), where=Path()).rope_scaling == config.rope_scaling


@settings(max_examples=20, deadline=None)
@given(config=sizes, learned=st.booleans())
def test_the_configuration_comes_back(config: ModelConfig, learned: bool) -> None:
    model = config if learned else config.with_constant_g()
    theirs = hf_config(model, uncertified=None, dtype="fp32")
    assert theirs.head_dim == min(size for size in HEAD_SIZES if size >= config.head_dim)
    assert theirs.qk_head_dim == theirs.v_head_dim == config.head_dim
    back = model_config(theirs.to_dict(), where="config.json")
    assert back.feed_forward_size == model.feed_forward_size
    same = ("vocab_size", "num_layers", "num_heads", "head_dim", "context_length", "rope_base", "rope_style")
    assert all(getattr(back, key) == getattr(model, key) for key in (*same, "layer_norm_eps", "g_source"))
    if learned:
        assert all(getattr(back, key) == getattr(model, key) for key in ("A_dff", "num_reslayerA", "num_denseA"))


def test_missing_foreign_and_misshapen_tensors_are_named() -> None:
    config = ModelConfig(vocab_size=8, num_layers=1, num_heads=1, head_dim=4, context_length=4).with_constant_g()
    shapes = hf_shapes(config)
    name = "model.layers.0.self_attn.g_lm"
    for wrong, problem in (
        ({key: shape for key, shape in shapes.items() if key != name}, f"{name}: missing"),
        ({**shapes, name: (1, 4, 5)}, f"{name}: shape [1, 4, 5]"),
        ({**shapes, "more": (1,)}, "more: not a tensor"),
    ):
        with pytest.raises(UserError, match=problem.replace("[", r"\[")) as caught:
            check_shapes(wrong, config)
        assert "\n" not in str(caught.value)
