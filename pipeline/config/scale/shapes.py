"""The sizes of a model's parameters, one by one: ZeRO 3 treats small ones in another way. Without torch."""

from __future__ import annotations

from pldr_model.config import ModelConfig


def parameter_sizes(model: ModelConfig) -> list[int]:
    """Elements of each trainable parameter, in no order. tests/pipeline/config/scale/ compares them with the model's own."""
    D, F, V, K = model.d_model, model.feed_forward_size, model.vocab_size, model.head_dim
    layer = [3 * D * D, 3 * D, D * D, D]  # attention
    layer += [2 * F * D, 2 * F, F * D, D]  # feed-forward
    layer += [D] * 4  # norms
    g = model.num_heads * K * K
    if model.g_source == "learned":
        glu = [2 * model.A_dff * K, 2 * model.A_dff, K * model.A_dff, K]
        layer += [g] * 5 + [K, K] + (glu * model.num_denseA + [K, K]) * model.num_reslayerA
    elif model.g_source == "constant":
        layer += [g] if model.g_rank is None else [model.num_heads * K * model.g_rank] * 2
    return [V * D, D, D, *layer * model.num_layers, V * D, V]
