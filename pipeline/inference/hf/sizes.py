"""Our `ModelConfig` <-> the `config.json` of an export."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

from pipeline.errors import UserError
from pldr_model.config import ModelConfig, RopeStyle
from pldr_model.rope_scaling import RopeScaling

# Sizes of a head that vLLM's attention kernel for CPUs takes (0.32); heads are filled up with zeros to the next one.
HEAD_SIZES = (32, 48, 64, 80, 96, 112, 128, 160, 192, 224, 256, 512)
DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16", "int8": "float32"}  # of what is not packed
RENAMED = {"type": "rope_type", "original_context_length": "original_max_position_embeddings"}  # of RopeScaling
AUTO_MAP = {
    "AutoConfig": "configuration_pldr.PldrConfig",
    "AutoModel": "modeling_pldr.PldrModel",
    "AutoModelForCausalLM": "modeling_pldr.PldrForCausalLM",
}


def hf_config(
    config: ModelConfig, *, uncertified: str | None, dtype: str, more: Mapping[str, Any] | None = None
) -> Any:
    """The `PldrConfig` of a model with a constant G (g_source `file`) or a metric learner (`learned`). more: other keys."""
    from pipeline.inference.hf.configuration_pldr import PldrConfig

    K = config.head_dim
    learned = config.g_source == "learned"
    sizes = {key: getattr(config, key) for key in ("A_dff", "num_reslayerA", "num_denseA")} if learned else {}
    values = dict(
        vocab_size=config.vocab_size,
        hidden_size=config.d_model,
        intermediate_size=config.feed_forward_size,
        num_hidden_layers=config.num_layers,
        num_attention_heads=config.num_heads,
        head_dim=next((size for size in HEAD_SIZES if size >= K), K),
        qk_head_dim=K,
        v_head_dim=K,
        max_position_embeddings=config.context_length,
        rope_parameters=_rope_parameters(config),
        layer_norm_eps=config.layer_norm_eps,
        g_source="learned" if learned else "constant",
        source_rope_style=config.rope_style,
        uncertified=uncertified,
        pad_token_id=config.pad_id,
        eos_token_id=config.eos_id,
        architectures=["PldrForCausalLM"],
        auto_map=AUTO_MAP,
        dtype=DTYPES[dtype],
        **sizes,
    )
    return PldrConfig(**{**values, **(more or {})})


def _rope_parameters(config: ModelConfig) -> dict[str, Any]:
    scaling = {} if config.rope_scaling is None else config.rope_scaling.to_dict()
    named = {RENAMED.get(key, key): value for key, value in scaling.items()}
    return {"rope_type": "default", "rope_theta": config.rope_base, **named}


def _rope_scaling(parameters: Mapping[str, Any]) -> RopeScaling | None:
    ours = {theirs: key for key, theirs in RENAMED.items()}
    named = {ours.get(key, key): value for key, value in parameters.items() if key != "rope_theta"}
    if named.get("type", "default") == "default":
        return None
    try:
        return RopeScaling.from_dict(named)
    except ValueError as error:
        raise ValueError(f"rope_parameters: {error}") from None


def model_config(values: Mapping[str, Any], *, where: Path) -> ModelConfig:
    """The model that the `config.json` of an export describes, or one that `save_pretrained` wrote of it.

    Raises UserError naming the file and the key.
    """
    try:
        style: RopeStyle = values.get("source_rope_style", "half")
        if style not in get_args(RopeStyle):
            raise ValueError(f"source_rope_style: {style!r} is not one of {', '.join(get_args(RopeStyle))}")
        if values.get("g_source", "constant") not in ("constant", "learned"):
            raise ValueError(f"g_source: {values['g_source']!r} is neither 'constant' nor 'learned'")
        if values.get("tie_word_embeddings"):
            raise ValueError("tie_word_embeddings: true, but this model has an output layer of its own")
        config = ModelConfig(
            vocab_size=values["vocab_size"],
            num_layers=values["num_hidden_layers"],
            num_heads=values["num_attention_heads"],
            head_dim=values["qk_head_dim"],
            context_length=values["max_position_embeddings"],
            d_ff=values.get("source_intermediate_size") or values["intermediate_size"],
            rope_base=values["rope_parameters"]["rope_theta"],
            rope_style=style,
            rope_scaling=_rope_scaling(values["rope_parameters"]),
            layer_norm_eps=values["layer_norm_eps"],
            pad_id=values["pad_token_id"],
            eos_id=values["eos_token_id"],
        )
        if values.get("v_head_dim", values["qk_head_dim"]) != values["qk_head_dim"]:
            raise ValueError(f"v_head_dim: {values['v_head_dim']} is not qk_head_dim = {values['qk_head_dim']}")
        if values.get("hidden_size", config.d_model) != config.d_model:
            raise ValueError(f"hidden_size: {values['hidden_size']} is not heads * qk_head_dim = {config.d_model}")
        if values.get("g_source") == "learned":
            return replace(config, **{key: values[key] for key in ("A_dff", "num_reslayerA", "num_denseA")})
        return config.with_constant_g()
    except KeyError as error:
        raise UserError(f"{where}: {error.args[0]} is missing; export the model again") from None
    except (ValueError, TypeError, AttributeError) as error:
        raise UserError(f"{where}: {error}; export the model again") from None
