"""Configuration: rejects what cannot run, counts what will."""

import json

import pytest

from pldr_model.config import ModelConfig
from pldr_model.model import PLDRModel

PAPER_110M = {"vocab_size": 32000, "num_layers": 5, "num_heads": 14, "head_dim": 64, "context_length": 1024}
SMALL = {"vocab_size": 61, "num_layers": 2, "num_heads": 2, "head_dim": 8, "context_length": 48}


def test_paper_size_has_the_published_parameter_count():
    config = ModelConfig(**PAPER_110M)
    assert config.num_parameters()["total"] == 109_689_362
    assert (config.d_model, config.feed_forward_size) == (896, 2389)


@pytest.mark.parametrize("num_denseA", [0, 1])
@pytest.mark.parametrize("g_source", ["learned", "constant", "identity", "random"])
def test_counts_are_those_of_the_model(g_source, num_denseA):
    config = ModelConfig(**SMALL, g_source=g_source, A_dff=11, num_reslayerA=3, num_denseA=num_denseA, d_ff=50)
    counts = config.num_parameters()
    model = PLDRModel(config)
    assert counts["total"] == sum(p.numel() for p in model.parameters())
    assert counts["total"] == sum(count for part, count in counts.items() if part != "total")
    units = sum(p.numel() for name, p in model.named_parameters() if ".metric_learner." in name)
    assert counts["metric_learner"] == units


def test_flops_of_the_paper_size_by_hand():
    """Per token, forward: linear layers, attention over the whole context, PLGA amortized over it, output."""
    config, D, K, S = ModelConfig(**PAPER_110M), 896, 64, 1024
    layer = 2 * (4 * D * D + 3 * D * 2389) + 4 * S * D + 2 * (2 * K * D)
    layer += 2 * 14 * K * (8 * 2 * 3 * K * 170) / S + 2 * 14 * (2 * K**3) / S
    expected = 5 * layer + 2 * D * 32000
    assert config.flops_per_token(training=False) == pytest.approx(expected)
    assert config.flops_per_token(training=True) == pytest.approx(3 * expected)
    twin, constant = config.sdpa_twin(), ModelConfig(**PAPER_110M, g_source="constant")
    assert twin.flops_per_token(training=False) < expected
    # A constant G costs the product q G and nothing else, and 64 x 64 numbers a head.
    of_twin = twin.flops_per_token(training=True)
    assert constant.flops_per_token(training=True) - of_twin == pytest.approx(3 * 5 * 2 * K * D)
    assert constant.num_parameters()["total"] == twin.num_parameters()["total"] + 5 * 14 * K * K
    assert constant.num_parameters()["constant_g"] == 5 * 14 * K * K
    without_glus = ModelConfig(**PAPER_110M, num_denseA=0).flops_per_token(training=False)
    assert expected - without_glus == pytest.approx(5 * 2 * 14 * K * (8 * 2 * 3 * K * 170) / S)


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ({"num_heads": 0}, "num_heads"),
        ({"num_layers": 2.5}, "num_layers"),
        ({"vocab_size": "61"}, "vocab_size"),
        ({"num_layers": True}, "num_layers"),
        ({"num_denseA": -1}, "num_denseA"),
        ({"num_reslayerA": 0}, "num_reslayerA"),
        ({"head_dim": 7}, "head_dim"),
        ({"d_ff": 0}, "d_ff"),
        ({"rope_style": "spiral"}, "rope_style"),
        ({"rope_base": 0.0}, "rope_base"),
        ({"layer_norm_eps": float("nan")}, "layer_norm_eps"),
        ({"g_source": "learnt"}, "g_source"),
        ({"g_start": "zero"}, "g_start"),
        ({"g_start": "identity", "g_source": "constant"}, "g_start"),
        ({"g_file": "g.safetensors"}, "g_file"),
        ({"dag_coefficients": (0.1, 0.0)}, "dag_coefficients"),
        ({"dag_coefficients": (0.1, -1.0, 0.0)}, "dag_coefficients"),
        ({"dag_coefficients": 0.1}, "dag_coefficients"),
        ({"dag_coefficients": ["a", 0, 0]}, "dag_coefficients"),
        ({"g_file": 3, "g_source": "file"}, "g_file"),
        ({"dag_coefficients": (0.1, 0.0, 0.0), "g_source": "identity"}, "dag_coefficients"),
        ({"eos_id": 61}, "eos_id"),
        ({"pad_id": -1}, "pad_id"),
    ],
)
def test_bad_values_are_rejected_by_name(change, key):
    with pytest.raises(ValueError, match=rf"^{key}: "):
        ModelConfig(**{**SMALL, **change})


def test_dictionary_round_trip_through_json():
    config = ModelConfig(**SMALL, dag_coefficients=(0.1, 0.0, 0.2), rope_style="half")
    assert ModelConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_unknown_key_names_the_nearest_and_missing_key_is_named():
    with pytest.raises(ValueError, match=r"^num_head: .*did you mean 'num_heads'"):
        ModelConfig.from_dict({**SMALL, "num_head": 3})
    with pytest.raises(ValueError, match=r"^head_dim: missing"):
        ModelConfig.from_dict({key: value for key, value in SMALL.items() if key != "head_dim"})


def test_variants_keep_the_sizes():
    config = ModelConfig(**SMALL, dag_coefficients=(0.1, 0.1, 0.1), A_dff=9, g_start="identity")
    for variant, g_source in ((config.sdpa_twin(), "identity"), (config.with_constant_g(), "file")):
        assert variant.g_source == g_source
        assert variant.A_dff == 9
        assert variant.num_parameters()["metric_learner"] == variant.num_parameters()["plga"] == 0
        assert variant.num_parameters()["attention"] == config.num_parameters()["attention"]


def test_reads_the_reference_names(golden):
    config = ModelConfig.from_reference(json.loads((golden / "padded_f64" / "config.json").read_text()))
    assert (config.d_ff, config.context_length, config.num_denseA) == (42, 48, 1)
    assert config.dag_coefficients == (0.05, 0.02, 0.03)


def test_reads_the_transformers_port():
    port = {
        "model_type": "pldrllm",
        "vocab_size": 32000,
        "hidden_size": 896,
        "intermediate_size": 2389,
        "num_hidden_layers": 5,
        "num_attention_heads": 14,
        "head_dim": 64,
        "max_position_embeddings": 1024,
        "rope_theta": 10000.0,
        "reference_rope": False,
        "custom_G_type": None,
        "cache_first_G": True,
        "torch_dtype": "float32",
    }
    config = ModelConfig.from_transformers(port)
    assert config.num_parameters()["total"] == 109_689_362
    assert (config.rope_style, config.g_source) == ("half", "learned")
    assert ModelConfig.from_transformers({**port, "custom_G_type": "external"}).g_source == "file"
    assert ModelConfig.from_transformers({**port, "reference_rope": True}).rope_style == "interleaved"
    with pytest.raises(ValueError, match=r"^hidden_size: 897"):
        ModelConfig.from_transformers({**port, "hidden_size": 897})
    with pytest.raises(ValueError, match=r"^model_type: 'llama'"):
        ModelConfig.from_transformers({**port, "model_type": "llama"})
