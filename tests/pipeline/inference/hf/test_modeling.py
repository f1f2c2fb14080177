"""The code that travels with an export: what transformers and vLLM look for in it, and what a learned G does."""

from __future__ import annotations

import ast
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
import torch

from pldr_model.config import ModelConfig
from pldr_model.generation import generate
from tests.pipeline.inference.hf.test_names import in_transformers, make

pytest.importorskip("transformers")
CODE = files("pipeline.inference.hf") / "modeling_pldr.py"
CONFIG = ModelConfig(
    vocab_size=40, num_layers=2, num_heads=2, head_dim=8, context_length=24, A_dff=6, num_reslayerA=2, num_denseA=1
)


def test_it_is_short_stands_alone_and_has_what_others_parse() -> None:
    source = CODE.read_text()
    assert len(source.splitlines()) <= 200
    layers = (files("pipeline.inference.hf") / "layers_pldr.py").read_text()
    assert source.count("ALL_ATTENTION_FUNCTIONS.get_interface(") == 1
    for name in ("_supports_sdpa", "_supports_flash_attn", "_supports_flex_attn", "_supports_attention_backend"):
        assert name in source
    nodes = [node for text in (source, layers) for node in ast.walk(ast.parse(text))]
    modules = {node.module for node in nodes if isinstance(node, ast.ImportFrom)} | {
        alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names
    }
    allowed = {"math", "torch", "transformers", "configuration_pldr", "layers_pldr"}
    assert {module.partition(".")[0] for module in modules} == allowed


@pytest.mark.parametrize("learned", [False, True])
def test_its_modules_are_what_back_ends_expect(learned: bool) -> None:
    model = in_transformers(make(CONFIG, learned=learned, seed=0))
    names = dict(model.named_modules())
    assert not any(name.split(".")[-1] == "attn" for name in names)
    assert not list(model.named_buffers())  # nothing that a cast or a load could spoil
    for index, layer in enumerate(model.model.layers):
        attention = layer.self_attn
        assert isinstance(attention.scaling, float) and attention.is_causal and attention.num_key_value_groups == 1
        assert type(attention.layer_idx) is int and attention.layer_idx == index
        if not learned:
            assert isinstance(attention.g_lm, torch.nn.Parameter)


def test_new_weights_are_drawn() -> None:
    from pipeline.inference.hf.modeling_pldr import PldrForCausalLM

    for learned in (False, True):
        config = in_transformers(make(CONFIG, learned=learned, seed=0)).config
        attention = PldrForCausalLM(config).model.layers[0].self_attn
        if learned:
            assert attention.plga.b.abs().max() == 0 and attention.plga.W.std() > 0
        else:
            assert torch.equal(attention.g_lm, torch.eye(8).expand(2, 8, 8))


def decode(model: Any, prompt: list[int], count: int, **settings: Any) -> list[int]:
    ids = torch.tensor([prompt])
    out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, do_sample=False, **settings)
    return out[0, len(prompt) :].tolist()


@pytest.mark.parametrize(("style", "glus"), [("interleaved", 1), ("half", 1), ("half", 0)])
def test_a_learned_g_is_that_of_the_prompt_and_is_kept(style: Any, glus: int) -> None:
    """The model is not invariant: its G differs from prompt to prompt, so that keeping another one would be seen."""
    config = ModelConfig(**{**CONFIG.to_dict(), "rope_style": style, "num_denseA": glus})
    ours = make(config, learned=True, seed=3)
    theirs = in_transformers(ours)
    prompts = [[7, 8, 9, 30, 12], [5], [11, 12, 13]]
    expected = generate(ours, prompts, max_new_tokens=10, eos_id=3)
    other_g = generate(ours, prompts[:1], max_new_tokens=10, g_lm=ours.compute_g(torch.tensor([prompts[2]]))[:, 0])
    assert expected[0] != other_g[0]
    assert [decode(theirs, prompt, 10) for prompt in prompts] == expected
    assert decode(theirs, prompts[0], 10, num_beams=1, cache_implementation="static") == expected[0]


def test_a_batch_with_padding_deduces_each_prompts_own_g() -> None:
    ours = make(CONFIG, learned=True, seed=3)
    prompts = [[7, 8, 9, 30, 12], [5], [11, 12, 13]]
    expected = generate(ours, prompts, max_new_tokens=8, eos_id=None)
    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    for attention in ("sdpa", "eager"):
        theirs = in_transformers(ours, attention=attention)
        theirs.generation_config.eos_token_id = None
        out = theirs.generate(ids, attention_mask=mask, max_new_tokens=8, do_sample=False)
        assert out[:, width:].tolist() == expected


def test_a_learned_g_refuses_what_splits_prompts() -> None:
    theirs = in_transformers(make(CONFIG, learned=True, seed=0))
    theirs.config._attn_implementation = "flash_attention_2"
    with pytest.raises(ValueError, match="complete prompt"):
        theirs(torch.tensor([[5, 6]]))


def test_what_save_pretrained_writes_loads(tmp_path: Path) -> None:
    import transformers

    ours = make(CONFIG, learned=False, seed=0)
    theirs = in_transformers(ours)
    theirs.register_for_auto_class("AutoModelForCausalLM")
    theirs.save_pretrained(tmp_path)
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, trust_remote_code=True)
    ids = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        assert torch.equal(again.double()(ids).logits, theirs.double()(ids).logits)
