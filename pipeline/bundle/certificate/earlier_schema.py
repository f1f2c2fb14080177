"""The schema of certificates before version 5, frozen: they are read as what they were, and judged by earlier.py.

Version 3 is read as 4, from which it differs in one name: `mend` became `fix`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from pipeline.bundle.certificate.checks import Tier
from pipeline.bundle.certificate.parts import (
    Agreement,
    CachedRank,
    CheckRecord,
    Empty,
    Failure,
    Files,
    GreedyText,
    LeakOf,
    LogDet,
    Number,
    Order,
    Part,
    PerHead,
    Precision,
    Prefix,
    RandomTokens,
    Rank,
    Sha256,
    SmallerWeights,
    Spot,
    Stats,
    Tensors,
)
from pipeline.bundle.certificate.verdict import contradiction

SINCE_3 = {"mend": "fix", "fix": "mend"}  # keys of checks and failures; both ways, so that neither is accepted twice


class Deviation(Part):
    """Relative deviation of one tensor over inputs: RMS of the difference over the head's RMS.

    `max` over kinds, layers and heads; `per_head` the worst kind's; `max_abs_delta` the largest |difference|; `rms` [L,H].
    """

    max: Number
    worst: Spot
    by_kind: dict[str, Number]
    per_head: PerHead
    max_abs_delta: Number
    max_abs_delta_per_head: PerHead
    rms: PerHead


class Leak(Part):
    """The leak test."""

    last_token: LeakOf
    last_quarter: LeakOf
    worst_rms: Number
    logit_spread: Number


class Losses(Part):
    """Held-out losses in nats per token by G_LM: live, cached, mean over the prompts, of random tokens, of the prompt before,
    zero, identity."""

    block: Number
    cached: Number
    mean: Number = None
    random_tokens: Number = None
    other: Number
    zero: Number
    identity: Number


class DoublePrecision(Part):
    """The same weights in fp64, over `fp64_prompts`."""

    losses: Losses
    prefix: Prefix
    agreement: dict[str, Agreement]
    leak: Leak


class Measures(Part):
    """Everything that was measured; what is judged is in `checks`."""

    not_finite: list[str]
    relative_deviation_g: Number
    deviations: dict[Literal["fp32", "fp64"], dict[Tensors, Deviation]]
    row_variance_ratio_A: Stats | None
    log_abs_det: dict[Tensors, LogDet]
    rank: dict[Tensors, Rank]
    cached_rank: CachedRank | None
    losses: Losses | Empty
    prefix: Prefix | Empty
    agreement: dict[str, Agreement]
    leak: Leak | Empty
    greedy: GreedyText | Empty
    order_parameter: dict[Tensors, dict[Literal["1-2", "1-C", "2-C"], Order]]
    fp64: DoublePrecision | Empty


class Untrained(Part):
    """The model before training. `failed`: the checks that it fails, as it must."""

    seed: int
    prompts_of_each_kind: int
    failed: list[str]
    relative_deviation_g: Number
    row_variance_ratio_A: Stats | None
    losses: Losses | Empty
    leak: Leak | Empty
    deviations: dict[Tensors, Deviation]
    agreement: Agreement | Empty


class Controls(Part):
    """The measures on models whose result is known in advance. A constant G has no untrained control."""

    random_tokens: RandomTokens | Empty
    untrained: Untrained | None = None


class Prompts(Part):
    """The prompts: [count, length] by kind, how many of the full texts are distinct, sha256 over every id."""

    sha256: Sha256
    kinds: dict[str, Annotated[list[int], Field(min_length=2, max_length=2)]]
    distinct: int
    left_out_padded: int
    seed: int


class EarlierCertificate(Part):
    """certificate.json of schema 4, and of 3 once `upgraded`."""

    schema_version: Literal[4]
    verdict: Literal["certified", "failed"]
    tier: Tier
    statement: str
    constant_by_construction: bool
    failed: list[Failure]
    checks: list[CheckRecord]
    measures: Measures
    controls: Controls
    thresholds: dict[str, float]
    settings: dict[str, int | str]
    prompts: Prompts
    precision: dict[Literal["fp32", "fp64"], Precision]
    model: dict[str, Any]
    files: Files
    lineage: dict[str, Any]
    software: dict[str, str | None]
    packaged: Literal["certified", "uncertified"] | None = None
    weight_format: SmallerWeights | None = None

    @model_validator(mode="after")
    def _follows(self) -> EarlierCertificate:
        if wrong := contradiction(self.model_dump(by_alias=True)):
            raise ValueError(wrong)
        return self


def upgraded(certificate: Mapping[str, Any]) -> dict[str, Any]:
    """A certificate of schema 3 with the keys of schema 4. What is malformed stays as it is, for the schema to refuse."""

    def renamed(entries: Any) -> Any:
        if not isinstance(entries, list):
            return entries
        return [{SINCE_3.get(k, k): v for k, v in e.items()} if isinstance(e, dict) else e for e in entries]

    lists = {key: renamed(certificate[key]) for key in ("checks", "failed") if key in certificate}
    return {**certificate, **lists, "schema_version": 4}
