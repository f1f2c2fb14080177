"""Sizes and variants of a PLDR-LLM.

Background: the papers describe a family: v510, v510-DAG, v510G, v510Gi, v52, and SDPA as the special case G = I.
Decision: one frozen dataclass spans the family, so that a variant is a value and never another class. Its
constructor rejects what cannot run, with the key's name, so that nothing fails an hour into a run.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Literal, get_args

from pldr_model.rope_scaling import RopeScaling

RopeStyle = Literal["interleaved", "half"]
GSource = Literal["learned", "constant", "identity", "random", "file"]
GStart = Literal["paper", "identity"]
GConstraint = Literal["none", "low_rank", "rotary", "nonrotary"]  # of a constant G (pldr_model/constant_g.py)
ActivationCheckpointing = Literal["none", "layer", "metric_learner"]  # what the backward pass computes again
# Rows of a chunk of logits (pldr_model/linear_cross_entropy.py). CPU: fewer make slow products, more leave its caches
# (docs/speed.md). GPU: not measured; products are large enough to fill one.
CHUNK_ROWS = {"cpu": 256, "cuda": 2048}
# Elements from which training computes a gated product again in the backward pass. Its time beside autograd's (CPU seconds of
# one thread, 2026-11-29): 0.6 to 1.06 above, 1.1 to 1.4 below.
LEAN_FROM = 2**19
GFrom = Literal["own", "batch", "neighbor"]  # whose learned G a sequence of a batch gets (PLDRModel.forward)
DecayOn = Literal["units", "norms", "glus"]  # what of the residual units has the metric learner's weight decay

# Reference implementation's hyperparameter names (and the golden cases' config.json) -> ours.
_REFERENCE_NAMES = {"dff": "d_ff", "max_seq_len": "context_length"}
_REFERENCE_IGNORED = {"d_model", "dtype"}
# The transformers port's config fields -> ours.
_TRANSFORMERS_NAMES = {
    "vocab_size": "vocab_size",
    "intermediate_size": "d_ff",
    "num_hidden_layers": "num_layers",
    "num_attention_heads": "num_heads",
    "head_dim": "head_dim",
    "max_position_embeddings": "context_length",
    "rope_theta": "rope_base",
    "num_reslayerA": "num_reslayerA",
    "num_denseA": "num_denseA",
    "A_dff": "A_dff",
    "layer_norm_eps": "layer_norm_eps",
    "pad_token_id": "pad_id",
    "bos_token_id": "bos_id",
    "eos_token_id": "eos_id",
}
_CUSTOM_G_TYPES: dict[str | None, GSource] = {
    None: "learned",
    "identity": "identity",
    "random": "random",
    "external": "file",
}
# Keys that are later than the first files on disk (`to_dict`), and the keys of G in a model that has another one.
ADDED_KEYS = ("rope_scaling", "g_constraint", "g_rank")
_WITHOUT_G: dict[str, Any] = {
    **{"g_start": "paper", "g_constraint": "none", "g_rank": None},
    **{"g_file": None, "dag_coefficients": (0.0, 0.0, 0.0)},
}


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Every number that fixes the mathematics of a model. Errors: ValueError that names the key."""

    vocab_size: int
    """Number of token ids, V."""
    num_layers: int
    """Decoder layers, L."""
    num_heads: int
    """Attention heads, H."""
    head_dim: int
    """Size of a head, K = d_k; even, because RoPE rotates pairs. d_model is num_heads * head_dim."""
    context_length: int
    """Longest sequence, S, in tokens."""
    d_ff: int | None = None
    """Hidden size of the feed-forward GLU; None: floor(8 * d_model / 3)."""
    A_dff: int = 170
    """Hidden size of the metric learner's GLUs (170 = floor(8 * 64 / 3) in the papers)."""
    num_reslayerA: int = 8
    """Residual units of the metric learner."""
    num_denseA: int = 2
    """GLUs in a residual unit; 0: none, a unit is `LN(x)`."""
    rope_base: float = 10000.0
    """Base of the rotary frequencies."""
    rope_style: RopeStyle = "interleaved"
    """`interleaved` rotates (x0,x1),(x2,x3),… (v51); `half` rotates (x0,x_{K/2}),… (v52)."""
    rope_scaling: RopeScaling | None = None
    """Rotary frequencies that were changed for a longer context: `{type: linear | llama3 | yarn, factor, ...}`."""
    layer_norm_eps: float = 1e-6
    """Epsilon of every LayerNorm."""
    g_source: GSource = "learned"
    """Where G_LM comes from: `learned` (metric learner, v510), `constant` (a trained parameter [H,K,K] of each layer
    that starts at the identity, no metric learner), `identity` (SDPA), or a fixed tensor that is `random` (v510G) or from a
    `file` (v510G, v510Gi)."""
    g_start: GStart = "paper"
    """With g_source `learned`, where training starts: `paper` (b_a = 0) or `identity` (b_a = I and a scaled by 0.1, so
    that G_LM is near the identity and the model near its SDPA twin)."""
    g_constraint: GConstraint = "none"
    """With g_source `constant`, which matrices G_LM can be: `none` (all), `low_rank` (I + U V^T of rank g_rank), `rotary`
    (those that commute with RoPE: plain attention in another parametrization), or `nonrotary` (I + what is orthogonal to
    those)."""
    g_rank: int | None = None
    """With g_constraint `low_rank`: the rank of U V^T, 1 to head_dim."""
    g_file: str | None = None
    """safetensors file of a constant G_LM [L,H,K,K], for g_source `file`; None: G is handed to the model."""
    g_seed: int = 0
    """Seed of a random G_LM."""
    dag_coefficients: tuple[float, float, float] = (0.0, 0.0, 0.0)
    """Weights of the DAG regularizer on A_LM, A_P, G_LM; 0: that term is not computed."""
    pad_id: int = 0
    """Id of padding."""
    unk_id: int = 1
    """Id of the unknown piece."""
    bos_id: int = 2
    """Id of a document's beginning."""
    eos_id: int = 3
    """Id of a document's end."""

    def __post_init__(self) -> None:
        if isinstance(self.dag_coefficients, list):  # as JSON and YAML have it
            object.__setattr__(self, "dag_coefficients", tuple(self.dag_coefficients))
        if self.rope_scaling is not None and not isinstance(self.rope_scaling, RopeScaling):
            object.__setattr__(self, "rope_scaling", _read_rope_scaling(self.rope_scaling))
        sizes = ["vocab_size", "num_layers", "num_heads", "head_dim", "context_length", "A_dff"]
        sizes += ["num_reslayerA"] + (["d_ff"] if self.d_ff is not None else [])
        for key in sizes:
            _require_int(key, getattr(self, key), at_least=1)
        _require_int("num_denseA", self.num_denseA, at_least=0)
        if self.head_dim % 2:
            raise ValueError(f"head_dim: {self.head_dim} is odd; RoPE rotates pairs, give an even size")
        for key in ("rope_base", "layer_norm_eps"):
            value = getattr(self, key)
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < float("inf"):
                raise ValueError(f"{key}: {value!r} must be a positive number")
        choices = {"rope_style": get_args(RopeStyle), "g_source": get_args(GSource), "g_start": get_args(GStart)}
        choices |= {"g_constraint": get_args(GConstraint)}
        for key, allowed in choices.items():
            if getattr(self, key) not in allowed:
                raise ValueError(f"{key}: {getattr(self, key)!r} is not one of {', '.join(allowed)}")
        if self.g_file is not None and not isinstance(self.g_file, str):
            raise ValueError(f"g_file: {self.g_file!r} must be a path")
        if self.g_file is not None and self.g_source != "file":
            raise ValueError(f"g_file: only read with g_source 'file', not {self.g_source!r}; drop one of the two")
        if self.g_start != "paper" and self.g_source != "learned":
            raise ValueError(f"g_start: only read with g_source 'learned', not {self.g_source!r}; drop it")
        self._check_g_constraint()
        if self.rope_scaling is not None and self.rope_scaling.type == "yarn" and self.rope_base <= 1:
            raise ValueError(f"rope_base: {self.rope_base} must be over 1 for rope_scaling of type 'yarn'")
        _require_int("g_seed", self.g_seed, at_least=0)
        self._check_dag_coefficients()
        for key in ("pad_id", "unk_id", "bos_id", "eos_id"):
            _require_int(key, getattr(self, key), at_least=0)
            if getattr(self, key) >= self.vocab_size:
                raise ValueError(f"{key}: {getattr(self, key)} is outside the vocabulary of {self.vocab_size}")

    def _check_g_constraint(self) -> None:
        if self.g_constraint != "none" and self.g_source != "constant":
            raise ValueError(f"g_constraint: only read with g_source 'constant', not {self.g_source!r}; drop it")
        if self.g_constraint != "low_rank" and self.g_rank is not None:
            raise ValueError(f"g_rank: only read with g_constraint 'low_rank', not {self.g_constraint!r}; drop it")
        if self.g_constraint == "low_rank":
            _require_int("g_rank", self.g_rank, at_least=1)
            if self.g_rank is not None and self.g_rank > self.head_dim:
                raise ValueError(f"g_rank: {self.g_rank} is over the head_dim of {self.head_dim}")

    def _check_dag_coefficients(self) -> None:
        values = self.dag_coefficients
        numbers = isinstance(values, tuple) and [
            v for v in values if isinstance(v, int | float) and not isinstance(v, bool) and 0 <= v < float("inf")
        ]
        if not numbers or len(numbers) != 3 or len(values) != 3:
            raise ValueError(f"dag_coefficients: {values!r} must be three numbers >= 0 (for A_LM, A_P, G_LM)")
        if any(values) and self.g_source != "learned":
            raise ValueError(f"dag_coefficients: a model with g_source {self.g_source!r} has no A_LM to regularize")

    @property
    def d_model(self) -> int:
        """Width of the residual stream, D = H * K."""
        return self.num_heads * self.head_dim

    @property
    def feed_forward_size(self) -> int:
        """Hidden size of the feed-forward GLU after the default is applied."""
        return 8 * self.d_model // 3 if self.d_ff is None else self.d_ff

    def to_dict(self) -> dict[str, Any]:
        """JSON-able form; `from_dict` reads it back to an equal configuration. Keys that were added later are left out where
        they have their defaults, as in files from before they existed."""
        values = {**asdict(self), "dag_coefficients": list(self.dag_coefficients)}
        for key in ADDED_KEYS:
            if getattr(self, key) == type(self).__dataclass_fields__[key].default:
                del values[key]
        return values if self.rope_scaling is None else {**values, "rope_scaling": self.rope_scaling.to_dict()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> ModelConfig:
        """Strict reader. Errors: ValueError for an unknown key (names the nearest) or a missing one."""
        known = [field.name for field in fields(cls)]
        for key in values:
            if key not in known:
                near = difflib.get_close_matches(key, known, n=1)
                hint = f"; did you mean {near[0]!r}?" if near else f"; known keys: {', '.join(known)}"
                raise ValueError(f"{key}: unknown model key{hint}")
        for key in ("vocab_size", "num_layers", "num_heads", "head_dim", "context_length"):
            if key not in values:
                raise ValueError(f"{key}: missing from the model configuration")
        return cls(**values)

    @classmethod
    def from_reference(cls, values: Mapping[str, Any]) -> ModelConfig:
        """Read the reference implementation's hyperparameter names (dff, max_seq_len, …)."""
        renamed = {_REFERENCE_NAMES.get(k, k): v for k, v in values.items() if k not in _REFERENCE_IGNORED}
        config = cls.from_dict(renamed)
        if values.get("d_model", config.d_model) != config.d_model:
            raise ValueError(f"d_model: {values['d_model']} is not num_heads * head_dim = {config.d_model}")
        return config

    @classmethod
    def from_transformers(cls, values: Mapping[str, Any]) -> ModelConfig:
        """Read the transformers port's `config.json` (model_type `pldrllm`); fields outside the mathematics
        are skipped.

        `cache_first_G` is a choice of the port's generation and not of the model: here a caller hands the G
        it wants.
        """
        if values.get("model_type", "pldrllm") != "pldrllm":
            raise ValueError(f"model_type: {values['model_type']!r} is not 'pldrllm'")
        custom = values.get("custom_G_type")
        if custom not in _CUSTOM_G_TYPES:
            raise ValueError(f"custom_G_type: {custom!r} is not one of null, identity, random, external")
        ours = {name: values[key] for key, name in _TRANSFORMERS_NAMES.items() if key in values}
        style: RopeStyle = "interleaved" if values.get("reference_rope", True) else "half"
        config = cls.from_dict({**ours, "rope_style": style, "g_source": _CUSTOM_G_TYPES[custom]})
        if values.get("hidden_size", config.d_model) != config.d_model:
            raise ValueError(f"hidden_size: {values['hidden_size']} is not heads * head_dim = {config.d_model}")
        return config

    def sdpa_twin(self) -> ModelConfig:
        """The same sizes with G = identity and no metric learner: the baseline of every comparison."""
        return replace(self, **{**_WITHOUT_G, "g_source": "identity"})

    def with_constant_g(self) -> ModelConfig:
        """The same sizes with a constant G that is handed to the model (v510Gi: what a bundle is)."""
        return self.with_frozen_g("constant")

    def with_frozen_g(self, become: str) -> ModelConfig:
        """The same sizes after a learned G was frozen: to a `constant`, or to a `parameter` of each layer."""
        return replace(self, **frozen_g_changes(become))

    @property
    def _g_size(self) -> int:
        """Parameters of a head's constant G: `low_rank` has two factors, all others a full matrix."""
        return self.head_dim * (self.head_dim if self.g_rank is None else 2 * self.g_rank)

    def num_parameters(self) -> dict[str, int]:
        """Trainable parameters by part; `total` is their sum. A fixed G is a buffer and not counted."""
        D, K, F = self.d_model, self.head_dim, self.feed_forward_size
        glu_A = 3 * K * self.A_dff + 2 * self.A_dff + K
        unit = self.num_denseA * glu_A + 2 * K
        learned = int(self.g_source == "learned")
        parts = {
            "embedding": self.vocab_size * D,
            "attention": self.num_layers * 4 * (D * D + D),
            "metric_learner": learned * self.num_layers * self.num_reslayerA * unit,
            "plga": learned * self.num_layers * (2 * K + 5 * self.num_heads * K * K),
            "constant_g": int(self.g_source == "constant") * self.num_layers * self.num_heads * self._g_size,
            "feed_forward": self.num_layers * (3 * D * F + 2 * F + D),
            "norms": 2 * D + self.num_layers * 4 * D,
            "output": self.vocab_size * D + self.vocab_size,
        }
        return {"total": sum(parts.values()), **parts}

    def flops_per_token(self, *, training: bool, sequences_per_g: int = 1) -> float:
        """Floating-point operations per token of a full context (a multiply-add is 2), for MFU and planning.

        Counted: every matrix product. Attention is counted over the whole context, not its causal half (the
        PaLM convention, so that MFU compares with other reports). The metric learner and the products W A and
        a A_P work on H*K rows per *sequence* and are divided by the context length; the density matrix and q
        G cost 2*K*D a token each; a constrained G is composed once a pass, which is not counted.
        sequences_per_g: how many sequences use one deduced G; all but the product q G is divided by it. Elementwise
        work, norms and the embedding look-up are not counted. Training = 3 x forward.
        """
        D, K, S = self.d_model, self.head_dim, self.context_length
        per_layer = 2.0 * (4 * D * D + 3 * D * self.feed_forward_size) + 4.0 * S * D
        if self.g_source != "identity":
            per_layer += 2.0 * K * D
        if self.g_source == "learned":
            metric_learner = self.num_reslayerA * self.num_denseA * 3 * K * self.A_dff
            per_layer += (2.0 * K * D + 2.0 * D * (metric_learner + 2 * K * K) / S) / sequences_per_g
        forward = self.num_layers * per_layer + 2.0 * D * self.vocab_size
        return 3.0 * forward if training else forward


def frozen_g_changes(become: str) -> dict[str, Any]:
    """The fields of a ModelConfig that change when a learned G is frozen, to a `constant` or to a `parameter`."""
    source: GSource = "constant" if become == "parameter" else "file"
    return {**_WITHOUT_G, "g_source": source}


def _read_rope_scaling(values: object) -> RopeScaling:
    if not isinstance(values, Mapping):
        raise ValueError(f"rope_scaling: {values!r} must be null or {{type: ..., factor: ...}}")
    try:
        return RopeScaling.from_dict(values)
    except ValueError as error:
        raise ValueError(f"rope_scaling.{error}") from None


def _require_int(key: str, value: object, *, at_least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < at_least:
        raise ValueError(f"{key}: {value!r} must be an integer >= {at_least}")
