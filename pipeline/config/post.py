"""The part of the configuration that decides what is measured after training, and when it may be called certified.

Decision: a threshold can be made stricter, and looser only as far as passing it still means something. A certificate's reader
holds the thresholds that it finds against the same bounds.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from pipeline.config.section import Section

WeightFormat = Literal["fp32", "bf16", "int8"]


class PostConfig(Section):
    """Consolidate, extract, validate, bundle. Why each threshold is where it is: docs/certificate.md."""

    g_from: Literal["mean", "first"] = "mean"  # over many held-out prompts, or the first one (the paper's way)
    prompts: int = Field(128, ge=2)  # held-out prompts; each is also cut to several lengths
    min_prompts: int = Field(100, ge=2)  # with fewer nothing is certified; lower it knowingly, the certificate says so
    fp64_prompts: int = Field(16, ge=2)  # of every kind, in the fp64 pass that tells variation from round-off
    generate_tokens: int = Field(256, ge=1)  # of each generated text, as far as the context has room (the papers' 256)
    generate_prompts: int = Field(16, ge=1)  # of greedy agreement and of the papers' order parameter (they take 100)
    ranks: int | None = Field(
        None, ge=1
    )  # processes that validate together on this node; null: one per GPU, 1 on a CPU
    # Tiers of the relative deviation of G: above each of these it is variant, approximate, invariant; else round-off. What
    # a tier is called can be made stricter, not looser; nor can a threshold be so loose that passing it means nothing.
    variant_above: float = Field(1e-2, gt=0, le=1e-2)  # variant trained models: 5e-2 and more; untrained: 0.1 and more
    approximate_above: float = Field(
        1e-5, gt=0, le=1e-5
    )  # a near-critical published model has 2e-2..1e-5, with answers that differ
    invariant_above: float = Field(
        1e-6, gt=0, le=1e-6
    )  # ten times fp32's epsilon: a pass's sums cannot be told from it
    max_relative_deviation_g: float = Field(1e-5, gt=0, le=1e-2)  # tier "invariant"; at most variant_above
    min_attention_effect: float = Field(0.05, gt=0)  # nats lost by G=0 and by G=identity; dead attention: 0
    max_leak_effect: float = Field(1e-4, gt=0, le=0.1)  # RMS move of earlier logits by a changed suffix, / their spread
    max_leak_gap: float = Field(1e-3, gt=0, le=0.1)  # nats, |block loss - loss with a G that has not seen the targets|
    max_kl: float = Field(1e-4, gt=0, le=0.1)  # nats per token, cached against full recomputation
    min_top1_agreement: float = Field(0.999, ge=0.9, le=1)
    weight_format: WeightFormat = "fp32"  # of the bundle's matrices; bf16 and int8: docs/bundle.md
    max_format_loss: float = Field(0.01, ge=0)  # nats, |held-out loss of bf16 or int8 weights - of fp32|
    twin: str | None = None  # run_dir of the SDPA twin (model.g_source=identity): the report shows its loss beside
    register_as: str | None = Field("pldr", pattern=r"^[^/:]+$")  # MLflow registered model; null: none
    sample_prompt: str = "The "

    @model_validator(mode="after")
    def _can_certify(self) -> PostConfig:
        if not self.variant_above > self.approximate_above > self.invariant_above:
            raise ValueError("variant_above > approximate_above > invariant_above must hold")
        if self.max_relative_deviation_g > self.variant_above:
            raise ValueError(
                f"max_relative_deviation_g {self.max_relative_deviation_g:g} is above variant_above {self.variant_above:g}: "
                "a G_LM that varies is never certified; lower it"
            )
        if self.prompts < self.min_prompts:
            raise ValueError(
                f"prompts {self.prompts} is below min_prompts {self.min_prompts}, so nothing could be certified; raise prompts"
            )
        return self
