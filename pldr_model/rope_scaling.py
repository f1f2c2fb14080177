"""How rotary frequencies are changed so that a model reads a longer context than its frequencies were made for.

Background: `linear` divides all of them (position interpolation, 2306.15595), `llama3` and `yarn` (2309.00071) divide the slow
ones and leave the fast ones, each with its own transition. Decision: these three, with the meaning and nearly the names that
they have in transformers' `rope_parameters` and in vLLM, so that an export carries them. Not `dynamic` and `longrope`: their
frequencies depend on the length of the sequence, and keys that are cached cannot be turned again.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, get_args

RopeType = Literal["linear", "llama3", "yarn"]
# Beside `type` and `factor`: the keys that a type needs, and those it may have.
_KEYS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "linear": ((), ()),
    "llama3": (("original_context_length", "low_freq_factor", "high_freq_factor"), ()),
    "yarn": (("original_context_length",), ("beta_fast", "beta_slow", "attention_factor")),
}
_OF_TRANSFORMERS = {"rope_type": "type", "original_max_position_embeddings": "original_context_length"}


@dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """Scaled rotary frequencies. Errors: ValueError that names the key."""

    type: RopeType
    """`linear`: all frequencies / factor; `llama3` and `yarn`: only the slow ones."""
    factor: float
    """How much longer the context becomes, at least 1."""
    original_context_length: int | None = None
    """Context that the frequencies were made for; `llama3` and `yarn` need it."""
    low_freq_factor: float | None = None
    """`llama3`: waves longer than original_context_length / this are stretched by the factor."""
    high_freq_factor: float | None = None
    """`llama3`: waves shorter than original_context_length / this stay as they are."""
    beta_fast: float | None = None
    """`yarn`: what turns this often in original_context_length stays as it is; null: 32."""
    beta_slow: float | None = None
    """`yarn`: what turns less often is divided by the factor; null: 1."""
    attention_factor: float | None = None
    """`yarn`: queries and keys are multiplied by it; null: 0.1 ln(factor) + 1."""

    def __post_init__(self) -> None:
        if self.type not in get_args(RopeType):
            raise ValueError(f"type: {self.type!r} is not one of {', '.join(get_args(RopeType))}")
        needed, optional = _KEYS[self.type]
        for key, value in asdict(self).items():
            if key == "type" or (value is None and key not in ("factor", *needed)):
                continue
            if key not in ("factor", *needed, *optional):
                known = ", ".join(("factor", *needed, *optional))
                raise ValueError(f"{key}: not a key of type {self.type!r}, which has {known}; remove it")
            if value is None:
                raise ValueError(f"{key}: missing; type {self.type!r} needs it")
            kind = int if key == "original_context_length" else int | float
            if isinstance(value, bool) or not isinstance(value, kind) or not 0 < value < math.inf:
                what = "integer" if kind is int else "number"
                raise ValueError(f"{key}: {value!r} must be a positive {what}")
        if self.factor < 1:
            raise ValueError(f"factor: {self.factor} must be at least 1")
        for low, high in (("low_freq_factor", "high_freq_factor"), ("beta_slow", "beta_fast")):
            at_low, at_high = getattr(self, low) or 1, getattr(self, high) or 32
            if at_low >= at_high:
                raise ValueError(f"{high}: {at_high} must be larger than {low} {at_low}")

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> RopeScaling:
        """Strict reader. Errors: ValueError for an unknown key or a missing one."""
        known = [field.name for field in fields(cls)]
        for key in values:
            if key not in known:
                ours = _OF_TRANSFORMERS.get(key)
                hint = f"; did you mean {ours!r}?" if ours else f"; known keys: {', '.join(known)}"
                raise ValueError(f"{key}: unknown key{hint}")
        for key in ("type", "factor"):
            if key not in values:
                raise ValueError(f"{key}: missing")
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        """The keys that are set; `from_dict` reads them back."""
        return {key: value for key, value in asdict(self).items() if value is not None}

    @property
    def magnitude(self) -> float:
        """What rotated queries and keys are multiplied by."""
        if self.type != "yarn":
            return 1.0
        return 0.1 * math.log(self.factor) + 1.0 if self.attention_factor is None else self.attention_factor
