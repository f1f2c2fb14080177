"""The schema of `certificate.json`, as the types that write and read it; docs/certificate.schema.json is generated from it.

A reader trusts nothing: checks, verdict, tier and statement must be those that follow from the measures and thresholds
(verdict.py). An edit by hand has to change all of it consistently; this is not a signature.

Decision: a certificate of schema 3 is read as one of schema 4, from which it differs in one name: `mend` became `fix`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from pipeline.bundle.certificate.checks import Tier
from pipeline.bundle.certificate.verdict import contradiction
from pipeline.errors import UserError
from pipeline.io.storage import read_json

SCHEMA_VERSION = 4
OLD_VERSION = 3  # still read
SINCE_3 = {"mend": "fix", "fix": "mend"}  # keys of checks and failures; both ways, so that neither is accepted twice

Number = float | None  # None: could not be measured, or is not finite
PerHead = list[list[Number]]  # [L,H]
Tensors = Literal["A", "A_LM", "A_P", "G_LM"]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class Part(BaseModel):
    """A part of the certificate: exactly these keys."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class CheckRecord(Part):
    """One judged measure. `skipped`: why it does not apply; it then counts as passed."""

    measure: str
    value: Number
    threshold: float
    bound: Literal["<=", ">="]
    fix: str
    skipped: str | None
    passed: bool


class Failure(Part):
    """A check that failed, in short."""

    measure: str
    value: Number
    threshold: float
    fix: str


class Spot(Part):
    """Where a measure is worst."""

    kind: str
    layer: int
    head: int


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


class Stats(Part):
    """One number per prompt, per head [L,H]: mean, standard deviation, lowest and highest over the prompts."""

    mean: PerHead
    std: PerHead
    low: PerHead
    high: PerHead


class LogDet(Stats):
    """log|det|. `singular`: how many prompts had an exactly singular matrix (log|det| = -infinity); the rest excludes them."""

    singular: PerHead


class Rank(Stats):
    """Numerical rank over the first prompts of every kind, of `of`."""

    of: int


class CachedRank(Part):
    """Of the cached G_LM [L,H]: numerical rank, and the rank that keeps all but 1e-6 of the energy."""

    numerical: list[list[int]]
    effective: list[list[int]]
    of: int


class Order(Part):
    """The papers' order parameter of two runs: RMSE / |mean| and RMSE / RMS, over everything and per head."""

    by_mean: Number
    by_rms: Number
    by_mean_per_head: PerHead
    by_rms_per_head: PerHead


class Agreement(Part):
    """Outputs with a constant G_LM against live ones: largest |delta logit|, KL(live || constant) in nats, top-1."""

    max_abs_delta_logit: Number
    kl: Number
    kl_max: Number
    top1: Number


class LeakOf(Part):
    """A changed suffix: RMS and largest change of the logits before it, over the logits' spread."""

    live_rms: Number
    live_max: Number
    cached_rms: Number
    cached_max: Number


class Leak(Part):
    """The leak test."""

    last_token: LeakOf
    last_quarter: LeakOf
    worst_rms: Number
    logit_spread: Number


class Greedy(Part):
    """Greedy text with caches against text without any."""

    per_decision: Number
    identical: Number
    num_prompts: int
    prompt_length: int
    num_tokens: int
    decisions: int


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


class Prefix(Part):
    """Losses over the second half of every sequence, with G_LM live, of the first half only, and cached."""

    block: Number
    prefix: Number
    cached: Number


class Empty(Part):
    """Not measured: something was not finite, or nothing is deduced."""


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
    greedy: Greedy | Empty
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


class RandomTokens(Part):
    """The trained model with G_LM from random tokens: its held-out loss, the gap to live, and its outputs against live ones."""

    loss: Number
    gap: Number
    agreement: Agreement


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


class Precision(Part):
    """The verdict on G_LM in one precision."""

    relative_deviation_g: Number
    tier: Tier


class Files(Part):
    """The sha256 that the certified tensor files have in an fp32 bundle."""

    model: Annotated[Sha256, Field(alias="model.safetensors")]
    g_lm: Annotated[Sha256, Field(alias="g_lm.safetensors")]


class SmallerWeights(Part):
    """What a bundle's bf16 or int8 weights cost on held-out text. Losses and KL in nats per token."""

    format: Literal["bf16", "int8"]
    sha256: Sha256
    bytes: int
    bytes_fp32: int
    prompts: int
    prompts_sha256: Sha256
    loss_fp32: Number
    loss: Number
    loss_difference: Number
    kl: Number
    top1_agreement: Number
    max_loss_difference: float
    passed: bool


class Certificate(Part):
    """certificate.json: whether G_LM may be cached, and all the evidence for it (docs/certificate.md)."""

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
    def _follows(self) -> Certificate:
        if wrong := contradiction(self.model_dump(by_alias=True)):
            raise ValueError(wrong)
        return self


def read_certificate(path: Path) -> dict[str, Any]:
    """A certificate file as plain values, in the keys of today's schema. Raises UserError, one line, for one that is missing,
    of another schema version, damaged, or whose verdict does not follow from its measures."""
    certificate = read_json(path)
    version = certificate.get("schema_version") if isinstance(certificate, dict) else None
    if not isinstance(certificate, dict) or version not in (OLD_VERSION, SCHEMA_VERSION):
        raise UserError(
            f"{path}: schema_version {version!r}, this program reads {OLD_VERSION} and {SCHEMA_VERSION}; "
            "run `pldr validate` again"
        )
    values: dict[str, Any] = upgraded(certificate) if version == OLD_VERSION else certificate
    try:
        Certificate.model_validate(values)
    except ValidationError as error:
        raise UserError(f"{path}: {first_fault(error)}; it was damaged or edited: run `pldr validate` again") from None
    return values


def upgraded(certificate: Mapping[str, Any]) -> dict[str, Any]:
    """A certificate of schema 3 with the keys of schema 4. What is malformed stays as it is, for the schema to refuse."""

    def renamed(entries: Any) -> Any:
        if not isinstance(entries, list):
            return entries
        return [{SINCE_3.get(k, k): v for k, v in e.items()} if isinstance(e, dict) else e for e in entries]

    lists = {key: renamed(certificate[key]) for key in ("checks", "failed") if key in certificate}
    return {**certificate, **lists, "schema_version": SCHEMA_VERSION}


def first_fault(error: ValidationError) -> str:
    """The first error, in one line."""
    first = error.errors()[0]
    where = ".".join(str(part) for part in first["loc"])
    return f"{f'{where}: ' if where else ''}{first['msg'].removeprefix('Value error, ')}"
