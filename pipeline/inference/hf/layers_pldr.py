"""PLDR-LLM for transformers: layers, and the metric learner, which most exports do not have."""

import math

import torch
from torch import nn


def rotary(config, dtype, device):
    """Radians per position of each pair [K/2], and what rotating multiplies norms by: transformers' rope types, in `dtype`."""
    rope, K = config.rope_parameters, config.qk_head_dim
    kind, theta, factor = rope["rope_type"], rope["rope_theta"], rope.get("factor", 1.0)
    plain, length = (
        1.0 / theta ** (torch.arange(0, K, 2, dtype=dtype, device=device) / K),
        rope.get("original_max_position_embeddings"),
    )
    if kind in ("default", "linear"):
        return plain / factor, 1.0
    if kind == "llama3":
        low, high = rope["low_freq_factor"], rope["high_freq_factor"]
        kept, magnitude = ((plain * (length / (2 * math.pi)) - low) / (high - low)).clamp(0, 1), 1.0
    else:  # yarn
        first, last = (K * math.log(length / (times * 2 * math.pi)) / (2 * math.log(theta))
                       for times in (rope.get("beta_fast") or 32, rope.get("beta_slow") or 1))  # fmt: skip
        first, last = max(math.floor(first), 0), min(math.ceil(last), K - 1)
        pairs = torch.arange(K // 2, dtype=dtype, device=device)
        kept = 1 - ((pairs - first) / (last - first or 0.001)).clamp(0, 1)
        magnitude = rope.get("attention_factor") or 0.1 * math.log(factor) + 1.0
    return plain / factor * (1 - kept) + plain * kept, magnitude


class PackedEmbedding(nn.Module):
    """Vectors of tokens as int8, with a scale each."""

    def __init__(self, count, size):
        super().__init__()
        self.register_buffer("weight", torch.zeros(count, size, dtype=torch.int8))
        self.register_buffer("scale", torch.ones(count, 1))

    def forward(self, ids):
        return self.weight[ids] * self.scale[ids]


class PldrMLP(nn.Module):
    """Gated linear unit, biased: W3(silu(W1 x) * W2 x)."""

    def __init__(self, size, hidden):
        super().__init__()
        self.gate_proj, self.up_proj = nn.Linear(size, hidden), nn.Linear(size, hidden)
        self.down_proj, self.act_fn = nn.Linear(hidden, size), nn.SiLU()

    def forward(self, x):
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


class PldrMetricLearner(nn.Module):
    """Rotated queries [B, H, S, K] of a prompt -> its G_LM [B, H, K, K]; density matrix and power law in fp32 at least."""

    def __init__(self, config):
        super().__init__()
        H, K, eps = config.num_attention_heads, config.qk_head_dim, config.layer_norm_eps
        self.density_norm = nn.LayerNorm(K, eps=eps)
        self.metric_learner = nn.ModuleList()
        for _ in range(config.num_reslayerA):
            glus = nn.Sequential(*(PldrMLP(K, config.A_dff) for _ in range(config.num_denseA)))
            self.metric_learner.append(nn.ModuleDict({"glus": glus, "norm": nn.LayerNorm(K, eps=eps)}))
        for name in ("W", "b", "P", "a", "b_a"):
            setattr(self, name, nn.Parameter(torch.empty(H, K, K)))

    def forward(self, q):
        wide, norm = torch.promote_types(q.dtype, torch.float32), self.density_norm
        density, weight, bias = q.to(wide).mT @ q.to(wide), norm.weight.to(wide), norm.bias.to(wide)
        A = nn.functional.layer_norm(density, norm.normalized_shape, weight, bias, norm.eps).to(q.dtype)
        for unit in self.metric_learner:
            A = unit["norm"](A + unit["glus"](A) if len(unit["glus"]) else A)
        u = self.W.to(wide) @ A.to(wide) + self.b.to(wide)
        A_LM = u * nn.functional.silu(u) + 1e-9
        return self.a.to(wide) @ A_LM ** self.P.to(wide) + self.b_a.to(wide)
