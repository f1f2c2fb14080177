"""The part of the configuration that decides what is measured after training, and when it may be called certified.

Decision: a threshold can be made stricter, and looser only as far as passing it still means something. A reader of
a certificate checks its thresholds against the same bounds.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated, Any, Literal

from pydantic import Field, ValidatorFunctionWrapHandler, field_validator, model_validator

from pipeline.config.section import Kind, Section, kinds
from pldr_model.config import ModelConfig

WeightFormat = Literal["fp32", "bf16", "int8", "int4"]
KindName = Annotated[str, Field(pattern=r"^[a-z0-9_-]{1,40}$")]
MAX_FORMAT_LOSS = 0.1  # nats; weights that cost more are another model
MAX_KEY_LOSS = 0.1  # nats; the same of low-rank keys

measuring = Kind("may change", ("extract", "validate"), result=True, certificate="settings")
held_out = replace(measuring, stages=("extract", "validate", "bundle"), result=("extract", "validate"))
amount = Kind("may change", ("validate",), result=True, certificate="settings", looser="below")
at_most = Kind("may change", ("validate",), result=True, certificate="thresholds", looser="above")
at_least = replace(at_most, looser="below")
more_measured = replace(measuring, stages=("validate",), added=True)
beside = Kind("may change", ("validate",), result=True)  # shown with the certificate, not part of it
work = replace(beside, result=False)  # how validation is done; and a sample that nothing is judged by
since_5 = replace(at_most, added=True)  # thresholds that certificates before schema 5 did not have
packaging = Kind("may change", ("bundle",), result=True)
packaging_added = replace(packaging, added=True)


class KeyRankConfig(Section):
    """How many of a key's head_dim numbers the KV-cache holds: the rank of G_LM per layer and head (docs/bundle.md). Exactly
    one of energy, max_loss and ranks."""

    energy: float | None = packaging_added(
        None, "the smallest ranks that drop at most this share of a head's squared singular values", gt=0, lt=1
    )
    max_loss: float | None = packaging_added(
        None, "nats; few numbers for this held-out loss, found by measuring head after head", gt=0, le=MAX_KEY_LOSS
    )
    ranks: int | list[list[int]] | None = packaging_added(
        None, "the ranks themselves: one number for all heads, or [layers][heads]"
    )
    multiple: int = packaging_added(4, "of energy and max_loss: ranks are rounded up to a multiple of it", ge=1)
    groups: int = packaging_added(
        3,
        "of energy and max_loss: different ranks in a layer, at most; each is a tensor and a product of its own",
        ge=1,
    )

    @field_validator("ranks", mode="wrap")
    @classmethod
    def _whole_numbers(cls, given: Any, check: ValidatorFunctionWrapHandler) -> Any:
        """One line for both forms; `true` is no number."""
        rows = given if isinstance(given, list) else [[given]]
        if given is not None and any(
            not isinstance(row, list) or any(type(rank) is not int for rank in row) for row in rows
        ):
            raise ValueError("give one integer for all heads, or one for each, [layers][heads]: [[4, 8], [16, 12]]")
        return check(given)

    @model_validator(mode="after")
    def _one_of_three(self) -> KeyRankConfig:
        given = [key for key in ("energy", "max_loss", "ranks") if getattr(self, key) is not None]
        if len(given) != 1:
            raise ValueError(
                f"{' and '.join(given) or 'neither energy, max_loss nor ranks'} given; give exactly one of the three"
            )
        if self.ranks is not None and (self.multiple, self.groups) != (4, 3):
            raise ValueError(
                "multiple and groups round what energy and max_loss find, and not given ranks; remove them"
            )
        return self

    def unfit(self, model: ModelConfig) -> str | None:
        """What is wrong with given ranks for this model, in one line; None when they fit."""
        size = model.head_dim
        rows = [[self.ranks]] if isinstance(self.ranks, int) else self.ranks or []
        if outside := [rank for row in rows for rank in row if not 1 <= rank <= size]:
            return f"{outside[0]} is not one of 1 to {size}, model.head_dim; {size} keeps the keys as they are"
        if isinstance(self.ranks, list) and [len(row) for row in rows] != [model.num_heads] * model.num_layers:
            return f"not {model.num_layers} layers of {model.num_heads} heads each, as the model has"
        return None


class PostConfig(Section):
    """Consolidate, extract, validate, bundle. Why each threshold is where it is: docs/certificate.md."""

    g_from: Literal["mean", "first"] = measuring(
        "mean", "what G is the mean of: many held-out prompts, or only the first (the paper)"
    )
    prompts: int = held_out(128, "held-out prompts; each is also cut to several lengths", ge=2)
    min_prompts: int = at_least(100, "with fewer nothing is certified; a lower value is noted in the certificate", ge=2)
    fp64_prompts: int = amount(16, "of every kind, in the fp64 pass that separates variation from round-off", ge=2)
    generate_tokens: int = amount(256, "of each generated text, as far as it fits the context (the papers' 256)", ge=1)
    generate_prompts: int = amount(16, "of greedy agreement and the papers' order parameter (they take 100)", ge=1)
    effect_prompts: int = replace(amount, added=True)(
        16, "prompts over which the effect of G is measured layer by layer", ge=2
    )
    order_parameter: bool = more_measured(False, "the papers' order parameter too; without caches, so it takes long")
    prove: bool = more_measured(True, "try to bound the deviation of G over every input there is")
    extra_prompts: dict[KindName, str] = replace(beside, added=True)(
        {}, "more kinds of prompts: name -> text file, each judged like the others"
    )
    ranks: int | None = work(None, "processes that validate together on this node; null: one per GPU, 1 on a CPU", ge=1)
    # Tiers of the relative deviation of G: above each of these it is variant, approximate, invariant; else round-off.
    # They can be made stricter, not looser; and no threshold can be so loose that passing it means nothing.
    # Variant trained models have >= 5e-2, untrained ones >= 0.1.
    variant_above: float = at_most(1e-2, "relative deviation of G above which it is variant", gt=0, le=1e-2)
    # A near-critical published model has 2e-2..1e-5, with answers that differ.
    approximate_above: float = at_most(1e-5, "relative deviation of G above which it is approximate", gt=0, le=1e-5)
    # Ten times fp32's epsilon: below it, G cannot be told from the rounding of the sums of one pass.
    invariant_above: float = at_most(
        1e-6, "relative deviation of G above which it is invariant; below it is round-off", gt=0, le=1e-6
    )
    max_relative_deviation_g: float = at_most(
        1e-5, "largest relative deviation of G, in fp64, that is certified; at most variant_above", gt=0, le=1e-2
    )
    # Where a head's terms cancel, fp32 alone deviates more; what that does to outputs is judged below.
    max_relative_deviation_g_fp32: float = since_5(
        1e-4, "the same in the model's own precision, over all prompts", gt=0, le=1e-3
    )
    # Over prompts 0.4 to 2.5 times the relative deviation, and 1e5 times it where G is huge in directions without queries.
    max_query_deviation: float = since_5(
        1e-4, "RMS(q dG) / RMS(q G), the worst head on the worst prompt, and on the worst rows", gt=0, le=1e-3
    )
    max_worst_row_deviation: float = since_5(
        1e-4, "relative deviation of G over the worst rows there are, searched and, if possible, proven", gt=0, le=1e-3
    )
    min_attention_effect: float = at_least(0.05, "nats lost by G=0 and by G=identity; dead attention: 0", ge=0.01)
    max_leak_gap: float = at_most(1e-3, "nats, |block loss - loss with a G blind to the targets|", gt=0, le=0.1)
    max_leak_effect: float = at_most(1e-4, "RMS move of earlier logits by a new suffix / their spread", gt=0, le=0.1)
    max_kl: float = at_most(1e-4, "nats per token, cached against full recomputation", gt=0, le=0.1)
    min_top1_agreement: float = at_least(
        0.999, "share of tokens with the same first choice, cached against full recomputation", ge=0.9, le=1
    )
    weight_format: WeightFormat = packaging("fp32", "of the bundle's matrices; bf16, int8, int4: docs/bundle.md")
    max_format_loss: float = packaging(
        0.01, "nats, |held-out loss of bf16, int8 or int4 weights - of fp32|", ge=0, le=MAX_FORMAT_LOSS
    )
    key_rank: KeyRankConfig | None = packaging_added(
        None, "low-rank keys: a smaller KV-cache; null: every key keeps its head_dim numbers"
    )
    max_key_loss: float = packaging_added(
        1e-3,
        "nats, |held-out loss with low-rank keys - with full ones|; with key_rank.max_loss it is that",
        ge=0,
        le=MAX_KEY_LOSS,
    )
    with_metric_learner: bool = packaging_added(
        False, "keep the metric learner in the bundle, to compare the cached G with the live one (needs fp32)"
    )
    twin: str | None = beside(None, "run_dir of the SDPA twin (model.g_source=identity): the page shows its loss")
    register_as: str | None = packaging("pldr", "MLflow registered model; null: none", pattern=r"^[^/:]+$")
    sample_prompt: str = work("The ", "what the sample at the end of `pldr run` continues")

    @model_validator(mode="after")
    def _can_certify(self) -> PostConfig:
        if not self.variant_above > self.approximate_above > self.invariant_above:
            raise ValueError("variant_above > approximate_above > invariant_above must hold")
        if self.max_relative_deviation_g > self.variant_above:
            raise ValueError(
                f"max_relative_deviation_g {self.max_relative_deviation_g:g} is above variant_above {self.variant_above:g}: "
                "a G_LM that varies is never certified; lower it"
            )
        if self.with_metric_learner and self.weight_format != "fp32":
            raise ValueError(
                f"with_metric_learner needs weight_format fp32, not {self.weight_format}: the live model has the certified "
                "weights; set weight_format: fp32, or leave out the metric learner"
            )
        if self.prompts < self.min_prompts:
            raise ValueError(
                f"prompts {self.prompts} is below min_prompts {self.min_prompts}, so nothing could be certified; raise prompts"
            )
        return self


def recorded(
    part: Literal["thresholds", "settings"], *, looser: Literal["above", "below"] | None = None
) -> tuple[str, ...]:
    """The keys that a certificate records in this part; `looser`: of these, where values above or below ask less of a model.

    In the order of the fields: a certificate's statement names looser thresholds in it, and readers compare statements.
    """
    found = {key: kind for key, kind in kinds(PostConfig).items() if kind is not None and kind.certificate == part}
    return tuple(key for key, kind in found.items() if looser is None or kind.looser == looser)
