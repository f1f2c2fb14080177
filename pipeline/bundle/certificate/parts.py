"""The parts that certificates of every schema have, as the types that write and read them.

The parts that changed are in schema.py (today's) and earlier_schema.py.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from pipeline.bundle.certificate.checks import Tier

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


class GreedyText(Part):
    """Greedy text with caches against text without any."""

    per_decision: Number
    identical: Number
    num_prompts: int
    prompt_length: int
    num_tokens: int
    decisions: int


class Prefix(Part):
    """Losses over the second half of every sequence, with G_LM live, of the first half only, and cached."""

    block: Number
    prefix: Number
    cached: Number


class Empty(Part):
    """Not measured: something was not finite, or nothing is deduced."""


class RandomTokens(Part):
    """The trained model with G_LM from random tokens: its held-out loss, the gap to live, and its outputs against live ones."""

    loss: Number
    gap: Number
    agreement: Agreement


class Precision(Part):
    """The verdict on G_LM in one precision."""

    relative_deviation_g: Number
    tier: Tier


class Files(Part):
    """The sha256 that the certified tensor files have in an fp32 bundle."""

    model: Annotated[Sha256, Field(alias="model.safetensors")]
    g_lm: Annotated[Sha256, Field(alias="g_lm.safetensors")]


class SmallerWeights(Part):
    """What a bundle's bf16, int8 or int4 weights cost on held-out text. Losses and KL in nats per token."""

    format: Literal["bf16", "int8", "int4"]
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
