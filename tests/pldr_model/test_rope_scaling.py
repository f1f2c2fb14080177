"""Scaled rotary frequencies: those of transformers, in the full and the cached pass, in files and in their checks."""

import json
import math
from dataclasses import replace

import pytest
import torch

from pldr_model.config import ModelConfig
from pldr_model.generation import generate
from pldr_model.layers import rope_frequencies, rope_magnitude, rope_tables
from pldr_model.model import PLDRModel
from pldr_model.rope_scaling import RopeScaling

DOUBLE = {"dtype": torch.float64, "device": torch.device("cpu")}
CONFIG = ModelConfig(vocab_size=61, num_layers=2, num_heads=2, head_dim=16, context_length=64, A_dff=8, num_reslayerA=1)
LLAMA3 = {"type": "llama3", "factor": 8.0, "original_context_length": 32, "low_freq_factor": 1, "high_freq_factor": 4.0}
YARN = {"type": "yarn", "factor": 4.0, "original_context_length": 32}
SCALINGS = [
    {"type": "linear", "factor": 4.0},
    LLAMA3,
    {**LLAMA3, "factor": 2, "original_context_length": 8192},
    YARN,
    {**YARN, "original_context_length": 4096, "beta_fast": 16, "beta_slow": 2.5},
    {**YARN, "factor": 2, "original_context_length": 2_000_000},  # every pair is fast
    {**YARN, "original_context_length": 4},  # every pair is slow
    {**YARN, "attention_factor": 0.5},
]


@pytest.mark.parametrize("scaling", SCALINGS, ids=str)
@pytest.mark.parametrize(("head_dim", "base"), [(16, 10000.0), (64, 10000.0), (128, 500000.0)])
def test_frequencies_are_those_of_transformers(scaling, head_dim, base, monkeypatch):
    utils = pytest.importorskip("transformers.modeling_rope_utils")
    from transformers import LlamaConfig

    config = replace(CONFIG, head_dim=head_dim, rope_base=base, rope_scaling=RopeScaling.from_dict(scaling))
    names = {"type": "rope_type", "original_context_length": "original_max_position_embeddings"}
    theirs = {names.get(key, key): value for key, value in scaling.items()}
    with monkeypatch.context() as patch:  # transformers names its precision `torch.float`: here in fp64
        patch.setattr(torch, "float", torch.float64)
        patch.setattr(torch, "float32", torch.float64)
        other = LlamaConfig(head_dim=head_dim, rope_parameters={"rope_theta": base, **theirs})
        expected, magnitude = utils.ROPE_INIT_FUNCTIONS[scaling["type"]](other, device=torch.device("cpu"))
    assert expected.dtype == torch.float64
    found = rope_frequencies(config, **DOUBLE)
    torch.testing.assert_close(found, expected, rtol=1e-14, atol=0)
    assert rope_magnitude(config) == pytest.approx(magnitude, rel=1e-15)
    cos, sin = rope_tables(config, 9, **DOUBLE)
    angles = torch.arange(9, dtype=torch.float64)[:, None] * expected
    torch.testing.assert_close(cos, angles.cos() * magnitude, rtol=0, atol=1e-12)
    torch.testing.assert_close(sin, angles.sin() * magnitude, rtol=0, atol=1e-12)


def test_without_scaling_tables_are_what_they_were():
    for dtype in (torch.float32, torch.float64):
        exponents = torch.arange(0, 16, 2, dtype=dtype) / 16
        angles = torch.outer(torch.arange(40, dtype=dtype), 1.0 / 10000.0**exponents)
        cos, sin = rope_tables(CONFIG, 40, dtype=dtype, device=torch.device("cpu"))
        assert torch.equal(cos, angles.cos()) and torch.equal(sin, angles.sin())


@pytest.mark.parametrize("style", ["interleaved", "half"])
@pytest.mark.parametrize("scaling", [SCALINGS[0], LLAMA3, YARN], ids=lambda scaling: scaling["type"])
def test_a_model_with_scaling_reads_with_a_cache_what_it_reads_without(scaling, style):
    torch.manual_seed(0)
    config = replace(CONFIG, rope_style=style, g_source="constant")
    scaled = PLDRModel(replace(config, rope_scaling=scaling)).double().eval()
    plain = PLDRModel(config).double().eval()
    plain.load_state_dict(scaled.state_dict())
    ids = torch.randint(4, 61, (1, 40), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        assert not torch.allclose(scaled(ids), plain(ids), atol=1e-6)
    prompts = [ids[0, :5].tolist(), ids[0, :17].tolist()]
    with_cache, without = (generate(scaled, prompts, max_new_tokens=30, use_cache=use) for use in (True, False))
    assert with_cache == without


def test_linear_scaling_is_a_slower_clock():
    slow = rope_tables(replace(CONFIG, rope_scaling=RopeScaling(type="linear", factor=2)), 33, **DOUBLE)
    torch.testing.assert_close(slow.cos[::2], rope_tables(CONFIG, 17, **DOUBLE).cos, rtol=0, atol=1e-14)


def test_it_is_in_files_only_where_it_is():
    assert "rope_scaling" not in CONFIG.to_dict()
    for scaling in SCALINGS:
        config = replace(CONFIG, rope_scaling=scaling)
        written = json.loads(json.dumps(config.to_dict()))
        assert written["rope_scaling"] == scaling and ModelConfig.from_dict(written) == config and hash(config)
    for same in ({**YARN, "beta_fast": None}, RopeScaling(**YARN)):  # as a run's configuration is stored
        assert ModelConfig.from_dict({**CONFIG.to_dict(), "rope_scaling": same}) == replace(CONFIG, rope_scaling=YARN)
    assert replace(CONFIG, rope_scaling=YARN).sdpa_twin().rope_scaling == RopeScaling(**YARN)


@pytest.mark.parametrize(
    ("scaling", "message"),
    [
        ({"type": "dynamic", "factor": 2}, "rope_scaling.type: 'dynamic' is not one of linear, llama3, yarn"),
        ({"type": "linear"}, "rope_scaling.factor: missing"),
        ({"rope_type": "linear", "factor": 2}, "rope_scaling.rope_type: unknown key; did you mean 'type'?"),
        ({"type": "linear", "factor": 0.5}, "rope_scaling.factor: 0.5 must be at least 1"),
        ({"type": "linear", "factor": True}, "rope_scaling.factor: True must be a positive number"),
        ({"type": "linear", "factor": math.inf}, "rope_scaling.factor: inf must be a positive number"),
        ({"type": "linear", "factor": 2, "beta_fast": 3}, "rope_scaling.beta_fast: not a key of type 'linear'"),
        ({"type": "yarn", "factor": 2}, "rope_scaling.original_context_length: missing; type 'yarn' needs it"),
        ({**YARN, "original_context_length": 32.5}, "original_context_length: 32.5 must be a positive integer"),
        ({**YARN, "beta_slow": 64}, "rope_scaling.beta_fast: 32 must be larger than beta_slow 64"),
        ({**LLAMA3, "high_freq_factor": 1}, "high_freq_factor: 1 must be larger than low_freq_factor 1"),
        (2.0, "rope_scaling: 2.0 must be null or"),
    ],
)
def test_bad_values_are_rejected_by_name(scaling, message):
    with pytest.raises(ValueError) as caught:
        replace(CONFIG, rope_scaling=scaling)
    assert message in str(caught.value) and "\n" not in str(caught.value)
    with pytest.raises(ValueError, match="rope_base: 1.0 must be over 1"):
        replace(CONFIG, rope_scaling=YARN, rope_base=1.0)
