"""Configuration of a PLDR-LLM (arXiv 2410.16703, 2502.13502) for transformers."""

from transformers import PreTrainedConfig


class PldrConfig(PreTrainedConfig):
    """Sizes of a PLDR-LLM.

    head_dim: the size of a head in the KV-cache and in the attention kernel. Queries, keys and values are filled up to it with
        zeros, because some kernels (vLLM on a CPU) take a few sizes only. The real sizes are qk_head_dim and v_head_dim.
    g_source: `constant`: the energy-curvature tensor G_LM of each head is a parameter. `learned`: the metric learner deduces it
        from the prompt; it is kept for decoding.
    uncertified: why an export is not certified. One that is says so in its MANIFEST.json, which a later training does not copy.
    source_rope_style: how the checkpoint that this was exported from paired the dimensions of a head. Here it is always
        half-split; who reads the weights back needs it.
    source_intermediate_size: the size of the gated linear units without the zeros that they are filled up with.
    packed_embedding: the vectors of tokens are int8, with a scale each.
    key_ranks: of each layer, how many numbers of a key the cache holds, for attention `sdpa` and `eager`; others fill them up
        to head_dim. None: qk_head_dim.
    transformers_only: why vLLM cannot run this export.
    """

    model_type = "pldr"
    base_model_tp_plan = {
        "layers.*.self_attn.q_proj": "colwise",
        "layers.*.self_attn.k_proj": "colwise",
        "layers.*.self_attn.v_proj": "colwise",
        "layers.*.self_attn.o_proj": "rowwise",
        "layers.*.mlp.gate_proj": "colwise",
        "layers.*.mlp.up_proj": "colwise",
        "layers.*.mlp.down_proj": "rowwise",
    }

    vocab_size: int = 32000
    hidden_size: int = 896
    intermediate_size: int = 2389
    num_hidden_layers: int = 5
    num_attention_heads: int = 14
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    qk_head_dim: int | None = None
    v_head_dim: int | None = None
    max_position_embeddings: int = 1024
    rope_parameters: dict | None = None
    layer_norm_eps: float = 1e-6
    g_source: str = "constant"
    A_dff: int = 170
    num_reslayerA: int = 8
    num_denseA: int = 2
    source_rope_style: str = "half"
    source_intermediate_size: int | None = None
    packed_embedding: bool = False
    key_ranks: list[int] | None = None
    transformers_only: str | None = None
    uncertified: str | None = None
    initializer_range: float = 0.02
    use_cache: bool = True
    tie_word_embeddings: bool = False
    pad_token_id: int | None = 0
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = 3

    def __post_init__(self, **kwargs):
        heads = self.num_attention_heads
        self.num_key_value_heads = self.num_key_value_heads or heads
        self.qk_head_dim = self.qk_head_dim or self.hidden_size // heads
        self.v_head_dim = self.v_head_dim or self.qk_head_dim
        self.head_dim = self.head_dim or max(self.qk_head_dim, self.v_head_dim)
        self.rope_parameters = self.rope_parameters or {"rope_type": "default", "rope_theta": 10000.0}
        super().__post_init__(**kwargs)
        if self.num_key_value_heads != heads:
            raise ValueError("a PLDR-LLM has as many key-value heads as heads")
        if self.rope_parameters["rope_type"] not in ("default", "linear", "llama3", "yarn"):
            raise ValueError(f"rope_type: {self.rope_parameters['rope_type']!r}; known: default, linear, llama3, yarn")
        if self.head_dim < max(self.qk_head_dim, self.v_head_dim):
            raise ValueError(f"head_dim: {self.head_dim} is less than qk_head_dim or v_head_dim")
        if self.g_source not in ("constant", "learned"):
            raise ValueError(f"g_source: {self.g_source!r} is neither 'constant' nor 'learned'")
