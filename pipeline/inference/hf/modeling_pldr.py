"""PLDR-LLM for transformers: a post-norm decoder whose scores are (q G_LM) k^T / sqrt(K) (arXiv 2410.16703, 2502.13502).

G_LM is folded into the query, so that any attention kernel does the rest. With g_source `constant` it is a parameter
[heads, K, K] of each layer. With `learned` a metric learner deduces it from the prompt, and decoding keeps it.
"""

import torch
from torch import nn
from transformers import Cache, DynamicCache, GenerationMixin, PreTrainedModel, initialization
from transformers.masking_utils import create_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils.generic import can_return_tuple, merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .configuration_pldr import PldrConfig
from .layers_pldr import PackedEmbedding, PldrMetricLearner, PldrMLP, rotary

CACHE = "cache" if hasattr(BaseModelOutputWithPast, "cache") else "past_key_values"  # renamed in transformers 5.24


def rotate(x, cos, sin):
    """Rotary positions of [B, H, S, K]: pairs (i, i + K/2), in the precision of the tables [B, 1, S, K/2]."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)


def eager_attention(module, query, key, value, attention_mask, scaling, **kwargs):
    scores = query @ key.transpose(2, 3) * scaling + (0.0 if attention_mask is None else attention_mask)
    weights = scores.softmax(dim=-1, dtype=torch.promote_types(query.dtype, torch.float32)).to(query.dtype)
    return (weights @ value).transpose(1, 2).contiguous(), weights


class PldrAttention(nn.Module):
    def __init__(self, config, layer_idx):
        super().__init__()
        D, H, K, V = config.hidden_size, config.num_attention_heads, config.qk_head_dim, config.v_head_dim
        self.config, self.layer_idx = config, layer_idx
        self.head_dim, self.qk_head_dim, self.v_head_dim = config.head_dim, K, V
        self.scaling, self.is_causal, self.num_key_value_groups = float(K) ** -0.5, True, 1
        self.q_proj, self.k_proj = nn.Linear(D, H * K), nn.Linear(D, H * K)
        self.v_proj, self.o_proj = nn.Linear(D, H * V), nn.Linear(H * V, D)
        if config.g_source == "learned":
            self.plga = PldrMetricLearner(config)
        else:
            size = config.key_ranks[layer_idx] if config.key_ranks else K
            self.g_lm = nn.Parameter(torch.empty(H, K, size))
        self.key_factor = nn.Parameter(torch.empty(H, K, size)) if config.key_ranks else None

    def own_heads(self, x, parameter):
        """x times the parameter of the heads of this rank."""
        mesh = getattr(self.o_proj.weight, "device_mesh", None)  # tensor parallel in transformers; else in vLLM
        rank = getattr(self.o_proj, "tp_rank", 0) if mesh is None else mesh.get_local_rank()
        return x @ parameter[rank * x.shape[1] : (rank + 1) * x.shape[1]].to(x.dtype)

    def energy_curvature(self, q, attention_mask, cache):
        """A learned G_LM, deduced from the first tokens read, without padding."""
        if self.config._attn_implementation not in ("eager", "sdpa"):
            raise ValueError("G_LM is deduced from a complete prompt: use attention 'sdpa' or 'eager', no paged cache")
        kept = getattr(cache, "g_lm", {})  # layer -> G_LM of the prompt
        if self.layer_idx not in kept or cache.get_seq_length(self.layer_idx) == 0:
            if attention_mask is not None:  # the last query sees all tokens that are not padding
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
        q, k = rotate(q, *position_embeddings), rotate(k, *position_embeddings)
        if self.config.g_source == "learned":
            q = q @ self.energy_curvature(q, attention_mask, past_key_values).to(q.dtype)
        else:
            q = self.own_heads(q, self.g_lm)
        k = k if self.key_factor is None else self.own_heads(k, self.key_factor)
        # Kernels and caches of one size: zeros change no score and are cut off below.
        own_sizes = self.config._attn_implementation in ("eager", "sdpa") and isinstance(past_key_values, Cache | None)
        if not own_sizes:
            q, k, v = (nn.functional.pad(x, (0, self.head_dim - x.shape[-1])) for x in (q, k, v))
        size = v.shape[-1]
        if past_key_values is not None:
            k, v = past_key_values.update(k, v, self.layer_idx, kwargs=kwargs)
        attention = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention)
        heads, weights = attention(self, q, k, v, attention_mask, dropout=0.0, scaling=self.scaling, **kwargs)
        return self.o_proj(heads.reshape(*shape, -1, size)[..., : self.v_head_dim].flatten(-2)), weights


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
    config_class, base_model_prefix = PldrConfig, "model"
    _no_split_modules = ["PldrDecoderLayer"]
    _supports_sdpa = _supports_flash_attn = _supports_flex_attn = _supports_attention_backend = True
    _can_compile_fullgraph = supports_gradient_checkpointing = True
    _can_record_outputs = {"hidden_states": PldrDecoderLayer, "attentions": PldrAttention}

    def _init_weights(self, module):
        super()._init_weights(module)
        if isinstance(module, PldrMetricLearner):
            for name, parameter in module.named_parameters(recurse=False):
                (initialization.zeros_ if name in ("b", "b_a") else initialization.xavier_normal_)(parameter)
        elif hasattr(module, "g_lm"):
            for factor in (module.g_lm, module.key_factor):
                if factor is not None:
                    initialization.copy_(factor, torch.eye(*factor.shape[1:]).expand_as(factor))


class PldrModel(PldrPreTrainedModel):
    def __init__(self, config):
        super().__init__(config)
        if config._attn_implementation == "vllm" and config.transformers_only:
            raise ValueError(f"not for vLLM: {config.transformers_only}")
        table = PackedEmbedding if config.packed_embedding else nn.Embedding
        self.embed_tokens = table(config.vocab_size, config.hidden_size)
        self.embed_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.layers = nn.ModuleList(PldrDecoderLayer(config, i) for i in range(config.num_hidden_layers))
        self.gradient_checkpointing = False
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs
    def forward(self, input_ids=None, attention_mask=None, position_ids=None, past_key_values=None,
                inputs_embeds=None, use_cache=None, cache=None, **kwargs):  # fmt: skip
        x = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        cache = past_key_values if cache is None else cache
        cache = DynamicCache(config=self.config) if cache is None and use_cache else cache
        if position_ids is None:
            past = 0 if cache is None else cache.get_seq_length()
            position_ids = torch.arange(x.shape[1], device=x.device)[None] + past
        mask = create_causal_mask(self.config, x, attention_mask, position_ids=position_ids, **{CACHE: cache})
        # Made anew for each pass: a buffer would be cast with the model, and bf16 cannot count to 300.
        wide = torch.promote_types(x.dtype, torch.float32)
        frequencies, magnitude = rotary(self.config, wide, x.device)
        angles = position_ids[:, None, :, None].to(wide) * frequencies
        tables = (angles.cos() * magnitude, angles.sin() * magnitude)
        kwargs.update(position_ids=position_ids, position_embeddings=tables)
        x = self.embed_norm(x * self.config.hidden_size**0.5)
        for layer in self.layers:
            x = layer(x, attention_mask=mask, past_key_values=cache, **kwargs)
        return BaseModelOutputWithPast(last_hidden_state=x, **{CACHE: cache})


class PldrForCausalLM(PldrPreTrainedModel, GenerationMixin):
    _tp_plan = {"lm_head": "colwise_gather_output"}

    def __init__(self, config):
        super().__init__(config)
        self.model = PldrModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size)
        self._can_compile_fullgraph = config.g_source == "constant"  # a learned one is kept in the cache
        self.post_init()

    @can_return_tuple
    def forward(self, input_ids=None, attention_mask=None, position_ids=None, past_key_values=None, inputs_embeds=None,
                labels=None, use_cache=None, cache=None, logits_to_keep=0, **kwargs):  # fmt: skip
        outputs = self.model(input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids,
                             past_key_values=past_key_values, inputs_embeds=inputs_embeds, use_cache=use_cache,
                             cache=cache, **kwargs)  # fmt: skip
        keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, keep])
        loss = None if labels is None else self.loss_function(logits, labels, self.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(loss=loss, logits=logits, hidden_states=outputs.hidden_states,
                                      attentions=outputs.attentions, **{CACHE: outputs.get(CACHE)})  # fmt: skip
