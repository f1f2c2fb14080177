"""PLDR-LLM for transformers: a post-norm decoder whose scores are (q G_LM) k^T / sqrt(K) (arXiv 2410.16703, 2502.13502).

G_LM is folded into the query, so that any attention kernel does the rest. With g_source `constant` it is a parameter
[heads, K, K] of each layer. With `learned`, a metric learner deduces it from the whole prompt, and decoding keeps it.
"""

import torch
from torch import nn
from transformers import GenerationMixin, PreTrainedModel
from transformers import initialization as init
from transformers.cache_utils import DynamicCache
from transformers.masking_utils import create_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils import can_return_tuple
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .configuration_pldr import PldrConfig

CACHE = "cache" if hasattr(BaseModelOutputWithPast, "cache") else "past_key_values"  # renamed in transformers 5.24


def rotate(x, cos, sin):
    """Rotary positions of [B, H, S, K], pairs (i, i + K/2), in the tables' precision."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)


def eager_attention(module, query, key, value, attention_mask, scaling, **kwargs):
    scores = query @ key.transpose(2, 3) * scaling
    if attention_mask is not None:
        scores = scores + attention_mask
    weights = scores.softmax(dim=-1, dtype=torch.promote_types(query.dtype, torch.float32)).to(query.dtype)
    return (weights @ value).transpose(1, 2).contiguous(), weights


class PldrMLP(nn.Module):
    """Gated linear unit, biased: W3(silu(W1 x) * W2 x)."""

    def __init__(self, size, hidden):
        super().__init__()
        self.gate_proj = nn.Linear(size, hidden)
        self.up_proj = nn.Linear(size, hidden)
        self.down_proj = nn.Linear(hidden, size)
        self.act_fn = nn.SiLU()

    def forward(self, x):
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


class PldrResidualUnit(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.glus = nn.Sequential(*(PldrMLP(config.qk_head_dim, config.A_dff) for _ in range(config.num_denseA)))
        self.norm = nn.LayerNorm(config.qk_head_dim, eps=config.layer_norm_eps)

    def forward(self, x):
        return self.norm(x + self.glus(x))


class PldrMetricLearner(nn.Module):
    """Rotated queries [B, H, S, K] -> G_LM [B, H, K, K], in fp32 at least except for the learner itself."""

    def __init__(self, config):
        super().__init__()
        H, K = config.num_attention_heads, config.qk_head_dim
        self.density_norm = nn.LayerNorm(K, eps=config.layer_norm_eps)
        self.metric_learner = nn.Sequential(*(PldrResidualUnit(config) for _ in range(config.num_reslayerA)))
        for name in ("W", "b", "P", "a", "b_a"):
            setattr(self, name, nn.Parameter(torch.empty(H, K, K)))

    def forward(self, q):
        wide, norm = torch.promote_types(q.dtype, torch.float32), self.density_norm
        q_wide, weight, bias = q.to(wide), norm.weight.to(wide), norm.bias.to(wide)
        density = nn.functional.layer_norm(q_wide.mT @ q_wide, norm.normalized_shape, weight, bias, norm.eps)
        A = self.metric_learner(density.to(q.dtype)).to(wide)
        u = self.W.to(wide) @ A + self.b.to(wide)
        A_LM = u * nn.functional.silu(u) + 1e-9
        return self.a.to(wide) @ A_LM ** self.P.to(wide) + self.b_a.to(wide)


class PldrAttention(nn.Module):
    def __init__(self, config, layer_idx):
        super().__init__()
        D, H, K, V = config.hidden_size, config.num_attention_heads, config.qk_head_dim, config.v_head_dim
        self.config, self.layer_idx = config, layer_idx
        self.head_dim, self.qk_head_dim, self.v_head_dim = config.head_dim, K, V
        self.scaling, self.is_causal, self.num_key_value_groups = float(K) ** -0.5, True, 1
        self.q_proj = nn.Linear(D, H * K)
        self.k_proj = nn.Linear(D, H * K)
        self.v_proj = nn.Linear(D, H * V)
        self.o_proj = nn.Linear(H * V, D)
        if config.g_source == "learned":
            self.plga = PldrMetricLearner(config)
        else:
            self.g_lm = nn.Parameter(torch.empty(H, K, K))

    def energy_curvature(self, q, attention_mask, cache):
        """G_LM of this rank's heads. A learned one is deduced from the first tokens that are read, without padding."""
        if self.config.g_source == "constant":
            mesh = getattr(self.o_proj.weight, "device_mesh", None)  # tensor parallel: transformers, then vLLM
            rank = mesh.get_local_rank() if mesh is not None else getattr(self.o_proj, "tp_rank", 0)
            return self.g_lm[rank * q.shape[1] : (rank + 1) * q.shape[1]]
        if self.config._attn_implementation not in ("eager", "sdpa"):
            raise ValueError("G_LM is deduced from complete prompts: use attention 'sdpa' or 'eager', no paged cache")
        kept = getattr(cache, "g_lm", {})  # layer -> G_LM of the prompt
        if self.layer_idx not in kept or cache.get_seq_length(self.layer_idx) == 0:
            if attention_mask is not None:  # what the last query sees are the tokens that are not padding
                row = attention_mask[:, :, -1, : q.shape[2], None]
                q = q * (row if row.dtype == torch.bool else row == 0)
            kept[self.layer_idx] = self.plga(q)
            if cache is not None:
                cache.g_lm = kept
        return kept[self.layer_idx]

    def forward(self, hidden_states, position_embeddings, attention_mask=None, past_key_values=None, **kwargs):
        shape = hidden_states.shape[:-1]
        q = self.q_proj(hidden_states).view(*shape, -1, self.qk_head_dim).transpose(1, 2)
        k = self.k_proj(hidden_states).view(*shape, -1, self.qk_head_dim).transpose(1, 2)
        v = self.v_proj(hidden_states).view(*shape, -1, self.v_head_dim).transpose(1, 2)
        cos, sin = position_embeddings
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        q = q @ self.energy_curvature(q, attention_mask, past_key_values).to(q.dtype)
        if self.head_dim > min(self.qk_head_dim, self.v_head_dim):
            q, k, v = (nn.functional.pad(x, (0, self.head_dim - x.shape[-1])) for x in (q, k, v))
        if past_key_values is not None:
            k, v = past_key_values.update(k, v, self.layer_idx, kwargs=kwargs)
        attention = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention)
        heads, weights = attention(self, q, k, v, attention_mask, dropout=0.0, scaling=self.scaling, **kwargs)
        heads = heads.reshape(*shape, -1, self.head_dim)[..., : self.v_head_dim]
        return self.o_proj(heads.reshape(*shape, -1)), weights


class PldrDecoderLayer(GradientCheckpointingLayer):
    def __init__(self, config, layer_idx):
        super().__init__()
        self.self_attn = PldrAttention(config, layer_idx)
        self.attention_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = PldrMLP(config.hidden_size, config.intermediate_size)
        self.mlp_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, hidden_states, **kwargs):
        hidden_states = self.attention_norm(self.self_attn(hidden_states, **kwargs)[0] + hidden_states)
        return self.mlp_norm(self.mlp(hidden_states) + hidden_states)


class PldrPreTrainedModel(PreTrainedModel):
    config_class = PldrConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["PldrDecoderLayer"]  # noqa: RUF012
    _supports_sdpa = _supports_flash_attn = _supports_flex_attn = _supports_attention_backend = True
    _can_compile_fullgraph = True
    _can_record_outputs = {"hidden_states": PldrDecoderLayer, "attentions": PldrAttention}  # noqa: RUF012

    def _init_weights(self, module):
        super()._init_weights(module)
        if isinstance(module, PldrMetricLearner):
            for name, parameter in module.named_parameters(recurse=False):
                (init.zeros_ if name in ("b", "b_a") else init.xavier_normal_)(parameter)
        if isinstance(module, PldrAttention) and hasattr(module, "g_lm"):
            init.copy_(module.g_lm, torch.eye(module.qk_head_dim).expand_as(module.g_lm))


class PldrModel(PldrPreTrainedModel):
    def __init__(self, config):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.embed_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.layers = nn.ModuleList(PldrDecoderLayer(config, i) for i in range(config.num_hidden_layers))
        self.gradient_checkpointing = False
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs
    def forward(self, input_ids=None, attention_mask=None, position_ids=None, past_key_values=None, inputs_embeds=None,
                use_cache=None, cache=None, **kwargs):  # fmt: skip
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give either input_ids or inputs_embeds")
        inputs_embeds = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        cache = past_key_values if cache is None else cache
        if use_cache and cache is None:
            cache = DynamicCache(config=self.config)
        if position_ids is None:
            past = 0 if cache is None else cache.get_seq_length()
            position_ids = (torch.arange(inputs_embeds.shape[1], device=inputs_embeds.device) + past)[None]
        mask = create_causal_mask(
            self.config, inputs_embeds, attention_mask, position_ids=position_ids, **{CACHE: cache}
        )
        hidden_states = self.embed_norm(inputs_embeds * self.config.hidden_size**0.5)
        rope = self.rotary_tables(position_ids, torch.promote_types(hidden_states.dtype, torch.float32))
        for layer in self.layers[: self.config.num_hidden_layers]:
            hidden_states = layer(hidden_states, position_embeddings=rope, attention_mask=mask, past_key_values=cache,
                                  position_ids=position_ids, use_cache=use_cache, **kwargs)  # fmt: skip
        return BaseModelOutputWithPast(last_hidden_state=hidden_states, **{CACHE: cache})

    def rotary_tables(self, position_ids, dtype):
        """Cosines and sines [B, 1, S, K/2]. Made anew for each pass: a stored buffer is cast with the model, and is wrong."""
        K, base = self.config.qk_head_dim, self.config.rope_parameters["rope_theta"]
        exponents = torch.arange(0, K, 2, dtype=dtype, device=position_ids.device) / K
        angles = position_ids[:, None, :, None].to(dtype) * (1.0 / base**exponents)
        return angles.cos(), angles.sin()


class PldrForCausalLM(PldrPreTrainedModel, GenerationMixin):
    _tp_plan = {"lm_head": "colwise_gather_output"}  # noqa: RUF012
    _pp_plan = {"lm_head": (["hidden_states"], ["logits"])}  # noqa: RUF012

    def __init__(self, config):
        super().__init__(config)
        self.model = PldrModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size)
        self.post_init()

    @can_return_tuple
    def forward(self, input_ids=None, labels=None, logits_to_keep=0, **kwargs):
        outputs = self.model(input_ids, **kwargs)
        keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, keep])
        loss = None if labels is None else self.loss_function(logits, labels, self.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(loss=loss, logits=logits, hidden_states=outputs.hidden_states,
                                      attentions=outputs.attentions, **{CACHE: getattr(outputs, CACHE)})  # fmt: skip
