"""The schema of `certificate.json`, as the types that write and read it; docs/certificate.schema.json is generated from it.

A reader trusts nothing: checks, verdict, tier and statement must be those that follow from the measures and thresholds
(verdict.py). An edit by hand has to change all of it consistently; this is not a signature.

Decision: earlier certificates (earlier_schema.py) are read as what they were and keep their keys. Whoever reads measures that
came with version 5 must not expect them in every certificate.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError, model_validator

from pipeline.bundle.certificate.checks import Tier
from pipeline.bundle.certificate.earlier_schema import EarlierCertificate, upgraded
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
from pipeline.errors import UserError
from pipeline.io.storage import read_json

SCHEMA_VERSION = 5
READ = (3, 4, SCHEMA_VERSION)
PerLayer = list[Number]  # [L]


class Deviation(Part):
    """Relative deviation of one tensor over inputs: RMS over entries of the difference, over the head's RMS.

    `max`, `by_kind`, `per_head` [L,H]: of G_LM the largest over prompts (and layers and heads; over kinds), of the others the
    RMS over prompts, as in `rms_deviation_*`. `max_abs_delta`: the largest |difference|; `rms` [L,H]: the heads' RMS.
    """

    max: Number
    worst: Spot
    by_kind: dict[str, Number]
    per_head: PerHead
    rms_deviation_by_kind: dict[str, Number]
    rms_deviation_per_head: PerHead
    max_abs_delta: Number
    max_abs_delta_per_head: PerHead
    rms: PerHead


class QueryDeviation(Part):
    """RMS(q dG) / RMS(q G) of the worst prompt of each kind, and of the worst rows that a search found, in fp64; dG: the
    difference to the reference G_LM."""

    max: Number
    worst: Spot
    by_kind: dict[str, Number]
    per_head: PerHead


class Head(Part):
    """A layer and a head."""

    layer: int
    head: int


class WorstRow(Part):
    """The largest relative deviation that a search over all rows of the density matrix found [L,H]: from `starts` sets of
    rows, `steps` each. `rows_from_prompts`: how many rows of prompts they were chosen from, besides random ones."""

    max: Number
    worst: Head
    per_head: PerHead
    starts: int
    steps: int
    seed: int
    rows_from_prompts: int


class Proof(Part):
    """An upper bound of that deviation over every row there is, in exact arithmetic: of the worst head, and per head [L,H].

    `closed`: every head is bounded. `by_unit` [L][unit]: radius of the set of possible rows after each residual unit, over
    the size of its center; null: not bounded. `score_bound` [L]: of the attention scores. `reason`: why it did not close.
    """

    bound: Number
    per_head: PerHead
    closed: bool
    by_unit: list[list[Number]]
    score_bound: PerLayer
    precision_bits: int
    reason: str | None


class Leak(Part):
    """The leak test. `short`: prompts of 16 tokens or fewer."""

    last_token: LeakOf
    last_quarter: LeakOf
    short: LeakOf
    worst_rms: Number
    logit_spread: Number


class Greedy(GreedyText):
    """`live_checks`: prefixes at which one pass without caches checked the decision."""

    live_checks: int


class Losses(Part):
    """Held-out losses in nats per token by G_LM: live, cached, mean over the prompts, of random tokens, of the prompt before,
    zero, identity, and plain: its projection on what commutes with the rotation, which is plain attention."""

    block: Number
    cached: Number
    mean: Number = None
    random_tokens: Number = None
    other: Number
    zero: Number
    identity: Number
    plain: Number = None


class ByLayer(Part):
    """Loss with G_LM replaced in one layer alone, minus the cached loss [L]."""

    zero: PerLayer
    identity: PerLayer
    plain: PerLayer


class Effects(Part):
    """What G_LM is worth over the first `num_prompts`, in nats: in all layers together and in each alone. `alive_layers`:
    where G_LM = 0 alone costs `min_attention_effect` or more."""

    num_prompts: int
    zero: Number
    identity: Number
    plain: Number
    per_layer: ByLayer
    alive_layers: list[int]


class Coverage(Part):
    """How many ids of the vocabulary (without padding) the prompts hold."""

    ids: int
    seen: int


class DoublePrecision(Part):
    """The same weights in fp64, over `fp64_prompts`."""

    losses: Losses
    prefix: Prefix
    agreement: dict[str, Agreement]
    leak: Leak


class Measures(Part):
    """Everything that was measured; what is judged is in `checks`. `agreement`: cached, random_tokens and short prompts."""

    not_finite: list[str]
    coverage: Coverage
    relative_deviation_g: Number
    relative_deviation_g_fp32: Number
    cached_g_deviation: Number
    deviations: dict[Literal["fp32", "fp64"], dict[Tensors, Deviation]]
    query_deviation: QueryDeviation | Empty
    worst_row: WorstRow | Empty
    proof: Proof | Empty
    row_variance_ratio_A: Stats | None
    log_abs_det: dict[Tensors, LogDet]
    rank: dict[Tensors, Rank]
    cached_rank: CachedRank | None
    losses: Losses | Empty
    prefix: Prefix | Empty
    effects: Effects | Empty
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


class Controls(Part):
    """The measures on models whose result is known in advance. A constant G has no untrained control."""

    random_tokens: RandomTokens | Empty
    untrained: Untrained | None = None


class Prompts(Part):
    """The prompts: [count, longest] by kind, how many of the full texts are distinct, how many of them can be given a document
    each, all different (null: unknown), how many deviate by more than is certified, sha256 over every id."""

    sha256: Sha256
    kinds: dict[str, Annotated[list[int], Field(min_length=2, max_length=2)]]
    distinct: int
    documents: int | None
    deviating: int
    left_out_padded: int
    seed: int


class LowRankKeys(Part):
    """Low-rank keys: their ranks [L][H], what they save, and what they cost on held-out text. Losses and KL in nats per token.

    `by`: the key of `post.key_rank` that chose them. `sha256`: of the model.safetensors that was measured. `numbers_per_key`:
    the mean rank; `bytes_per_token`: fp32, keys and values of all layers. `greedy_agreement`: the share of the tokens of greedy
    texts with full keys that low-rank keys choose too; `greedy_identical`: of those texts without a difference.
    """

    by: Literal["energy", "max_loss", "ranks"]
    ranks: list[list[int]]
    sha256: Sha256
    numbers_per_key: float
    bytes_per_token: int
    bytes_per_token_full: int
    prompts: int
    prompts_sha256: Sha256
    loss_full: Number
    loss: Number
    loss_difference: Number
    kl: Number
    top1_agreement: Number
    greedy_agreement: Number
    greedy_identical: Number
    greedy_texts: int
    greedy_tokens: int
    max_loss_difference: float
    passed: bool


class Certificate(Part):
    """certificate.json: whether G_LM may be cached, and all the evidence for it (docs/certificate.md)."""

    schema_version: Literal[5]
    verdict: Literal["certified", "failed"]
    tier: Tier
    statement: str
    constant_by_construction: bool
    failed: list[Failure]
    checks: list[CheckRecord]
    measures: Measures
    controls: Controls
    thresholds: dict[str, float]
    settings: dict[str, bool | int | str]
    prompts: Prompts
    precision: dict[Literal["fp32", "fp64"], Precision]
    model: dict[str, Any]
    files: Files
    lineage: dict[str, Any]
    software: dict[str, str | None]
    packaged: Literal["certified", "uncertified"] | None = None
    weight_format: SmallerWeights | None = None
    key_rank: LowRankKeys | None = None

    @model_validator(mode="after")
    def _follows(self) -> Certificate:
        if wrong := contradiction(self.model_dump(by_alias=True)):
            raise ValueError(wrong)
        return self


def read_certificate(path: Path) -> dict[str, Any]:
    """A certificate file as plain values: of today's schema, or of schema 4, in whose keys one of schema 3 is read too.

    Raises UserError, one line, for one that is missing, of another schema version, damaged, or whose verdict does not follow
    from its measures by the rules of its own schema.
    """
    certificate = read_json(path)
    version = certificate.get("schema_version") if isinstance(certificate, dict) else None
    if not isinstance(certificate, dict) or version not in READ:
        raise UserError(
            f"{path}: schema_version {version!r}, this program reads {', '.join(map(str, READ[:-1]))} and {READ[-1]}; "
            "run `pldr validate` again"
        )
    values: dict[str, Any] = upgraded(certificate) if version == 3 else certificate
    try:
        (Certificate if version == SCHEMA_VERSION else EarlierCertificate).model_validate(values)
    except ValidationError as error:
        raise UserError(f"{path}: {first_fault(error)}; it was damaged or edited: run `pldr validate` again") from None
    return values


def first_fault(error: ValidationError) -> str:
    """The first error, in one line."""
    first = error.errors()[0]
    where = ".".join(str(part) for part in first["loc"])
    return f"{f'{where}: ' if where else ''}{first['msg'].removeprefix('Value error, ')}"
