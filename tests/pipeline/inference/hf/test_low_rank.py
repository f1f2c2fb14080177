"""Low-rank keys in stock transformers: a smaller cache, and our logits and tokens."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.inference.hf.export import export_hf
from pipeline.inference.hf.load import read_export
from pipeline.inference.hf.sizes import hf_config
from pipeline.inference.hf.weights import Weights, weights_of
from pipeline.inference.opened import OpenModel
from pldr_model.config import ModelConfig
from pldr_model.decode.low_rank import truncate_g
from pldr_model.generation import generate
from pldr_model.model import PLDRModel
from tests.pipeline.inference.hf.test_names import make

transformers = pytest.importorskip("transformers")
RANKS = torch.tensor([[3, 5], [8, 2], [1, 4]])
LARGEST = [5, 8, 4]
PROMPTS = [[7, 8, 9, 30, 12], [5], [11, 12, 13]]


def truncated(model: PLDRModel, ranks: torch.Tensor) -> PLDRModel:
    """The model that decodes with G_LM of these ranks."""
    state = model.state_dict()
    model.load_state_dict({**state, "g_lm": truncate_g(state["g_lm"], ranks)})
    return model


@pytest.fixture(scope="module")
def weights(opened: OpenModel) -> Weights:
    config = ModelConfig(vocab_size=40, num_layers=3, num_heads=2, head_dim=8, context_length=24)
    model = truncated(make(config, learned=False, seed=3), RANKS)
    weights = weights_of(replace(opened, key_ranks=RANKS), model.float(), "fp32")
    written = weights.as_model(torch.float32).constant_g()
    torch.testing.assert_close(written, model.constant_g(), atol=1e-5, rtol=1e-5)
    return weights


def in_transformers(weights: Weights, attention: str = "sdpa") -> Any:
    from pipeline.inference.hf.modeling_pldr import PldrForCausalLM

    config = hf_config(weights.model, uncertified=None, dtype="fp32", more=weights.keys)
    config._attn_implementation = attention
    theirs = PldrForCausalLM(config).eval()
    theirs.load_state_dict(weights.tensors)
    theirs.generation_config.eos_token_id = 3
    return theirs


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_same_logits_in_fp64(weights: Weights, attention: str) -> None:
    ids = torch.randint(0, 40, (2, 24))
    with torch.no_grad():
        ours = weights.as_model(torch.float64)(ids, padded=False)
        theirs = in_transformers(weights, attention).double()(ids).logits
    assert (ours - theirs).abs().max() <= 1e-12 * ours.abs().max()


def test_caches_are_smaller_and_tokens_the_same(weights: Weights) -> None:
    theirs, ours = in_transformers(weights), weights.as_model(torch.float32)
    expected = generate(ours, PROMPTS, max_new_tokens=10, eos_id=3)
    settings: list[dict[str, Any]] = [{}, {"cache_implementation": "static"}, {"prompt_lookup_num_tokens": 2}]
    for prompt, ids in zip(PROMPTS, expected, strict=True):
        for more in settings:
            out = theirs.generate(torch.tensor([prompt]), max_new_tokens=10, do_sample=False, **more)
            assert out[0, len(prompt) :].tolist() == ids
    for cache in (
        transformers.DynamicCache(config=theirs.config),
        transformers.StaticCache(config=theirs.config, max_cache_len=24),
    ):
        theirs(torch.tensor(PROMPTS[:1]), past_key_values=cache, use_cache=True)
        assert [layer.keys.shape[-1] for layer in cache.layers] == LARGEST
        assert [layer.values.shape[-1] for layer in cache.layers] == [8, 8, 8]


def test_a_paged_cache_holds_full_keys_and_gives_the_same(weights: Weights) -> None:
    theirs, ours = in_transformers(weights), weights.as_model(torch.float32)
    results = theirs.generate_batch(
        PROMPTS,
        generation_config=transformers.GenerationConfig(max_new_tokens=10, do_sample=False, eos_token_id=3),
        continuous_batching_config=transformers.ContinuousBatchingConfig(
            page_size=16, num_blocks=16, max_batch_tokens=64
        ),
    )
    expected = generate(ours, PROMPTS, max_new_tokens=10, eos_id=3)
    assert [result.generated_tokens for result in results.values()] == expected


def test_an_export_says_its_ranks_and_comes_back(opened: OpenModel, tmp_path: Path, unchecked: None) -> None:
    ranks = torch.tensor([[3, 2]] * opened.config.num_layers)
    model = truncated(PLDRModel(opened.config, g_lm_LHKK=opened.g_lm), ranks)
    model.load_state_dict({**opened.model.state_dict(), "g_lm": model.constant_g()})
    manifest = export_hf(replace(opened, held=model, key_ranks=ranks), tmp_path / "out")
    assert manifest["key_ranks"] == [3] * opened.config.num_layers
    assert "3, 3 of 8 numbers of a key" in (tmp_path / "out" / "README.md").read_text()
    found = read_export(tmp_path / "out").weights
    torch.testing.assert_close(found["g_lm"], model.constant_g(), atol=1e-6, rtol=1e-5)


@pytest.mark.slow
def test_it_checks_itself(opened: OpenModel, tmp_path: Path) -> None:
    ranks = torch.tensor([[3, 2]] * opened.config.num_layers)
    model = truncated(PLDRModel(opened.config, g_lm_LHKK=opened.g_lm), ranks)
    model.load_state_dict({**opened.model.state_dict(), "g_lm": model.constant_g()})
    check = export_hf(replace(opened, held=model.eval(), key_ranks=ranks), tmp_path / "out")["selfcheck"]
    assert check["greedy"]["equal"] == 20 and check["exact"] < 1e-10
