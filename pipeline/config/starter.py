"""A first YAML for a corpus: `pldr init`. Sizes, steps, warm-up, held-out share and budget that fit what there is to read.

Decisions: tokens are 20 a parameter (Hoffmann et al. 2022), but at most four passes over the training split (Muennighoff et al.
2023 saw little loss up to there). The metric learner's weight decay is raised above the papers' 0.1 where a short run would end
below the invariance budget that is enough (docs/certificate.md, "The invariance budget").
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path

from pipeline.config.run import RunConfig
from pipeline.config.schedule import BUDGET_PUBLISHED, BUDGET_TABLE, invariance_budget
from pipeline.config.train import TrainConfig
from pipeline.errors import ConfigError
from pldr_model.config import ModelConfig

SCHEMA = Path(__file__).parent / "schema.json"  # editors complete keys by it
TOKENS_PER_PARAMETER = 20
FEW_TOKENS = 15  # a parameter: fewer are told
FEW_STEPS = 3000  # of the tiny size: 2,000 and 1,800 left attention dead (docs/certificate.md, "When it fails")
EPOCHS = 4
BUDGET = BUDGET_PUBLISHED + 1  # the decay is rounded, and steps may be lowered a little
HELD_OUT_SEQUENCES = 4 * (128 + 64)  # of the certificate and of validation, with room: splits are by whole documents
LEAST_HELD_OUT_DOCUMENTS = 8
LEAST_FOR_TEST = 5  # documents: of fewer, none can be spared
LEAST_BYTES = 500_000  # of text: SentencePiece has to find its pieces in it


@dataclass(frozen=True)
class Size:
    """A model and its batch. bytes_per_token: of English text, at this vocabulary."""

    model: ModelConfig
    global_batch: int
    micro_batch: int
    bytes_per_token: float
    precision: str


def _model(
    vocab_size: int, context_length: int, num_layers: int, num_heads: int, head_dim: int, A_dff: int
) -> ModelConfig:
    return ModelConfig(
        vocab_size=vocab_size, context_length=context_length, num_layers=num_layers, num_heads=num_heads, head_dim=head_dim,
        A_dff=A_dff,
    )  # fmt: skip


SIZES = {
    "tiny": Size(_model(4096, 128, 2, 4, 16, 32), 4, 2, 3.3, "fp32"),  # minutes on two CPU cores
    "30m": Size(_model(16000, 512, 4, 7, 64, 170), 32, 8, 4.0, "bf16"),
    "110m": Size(_model(32000, 1024, 5, 14, 64, 170), 32, 4, 4.3, "bf16"),  # the papers' 110M
    "350m": Size(_model(32000, 1024, 16, 18, 64, 170), 64, 4, 4.3, "bf16"),
}


@dataclass(frozen=True)
class Corpus:
    """What is known of a corpus before it is read: its URLs, estimated bytes of text and documents, the start of one.

    positions: (hash position, bytes) of every document, where there are so few that all were read: which of them a share holds
    out is then known. Empty: they are many.
    """

    urls: list[str]
    text_bytes: int
    documents: int
    prompt: str
    positions: tuple[tuple[float, int], ...] = ()


def starter_yaml(name: str, corpus: Corpus, size_name: str) -> str:
    """A commented YAML of a run. Raises ConfigError for a corpus that is too small for any."""
    size = SIZES[size_name]
    if corpus.text_bytes < LEAST_BYTES:
        raise ConfigError(
            f"init: the corpus has about {_count(corpus.text_bytes)}B of text; {_count(LEAST_BYTES)}B is the least that a "
            "tokenizer and held-out text can be made from; name more files"
        )
    if len(corpus.positions) == 1:
        raise ConfigError(
            "init: the corpus is one document, and whole documents are held out to judge with; name more files, or cut it: "
            "split -C 50k --additional-suffix=.txt FILE part-"
        )
    model, tokens = size.model, int(corpus.text_bytes / size.bytes_per_token)
    parameters = model.num_parameters()["total"]
    per_step = size.global_batch * model.context_length
    val, test = _held_out(corpus, tokens, model.context_length)
    trained_on = tokens * _train_share(corpus, val, test)
    wanted = min(TOKENS_PER_PARAMETER * parameters, EPOCHS * trained_on)
    steps = _round(max(300, wanted / per_step))
    warmup = min(2000, _round(steps / 20))
    decay = _metric_decay(steps, warmup)
    every = max(10, _round(steps / 12))
    urls = "\n".join(f"    - {_quoted(url)}" for url in corpus.urls)
    accelerated = ""
    if decay is not None:
        why = f"raised from the papers' 0.1: invariance budget {BUDGET:g} in {steps:,} steps"
        table = f"# {BUDGET_PUBLISHED:g} or more is enough: {BUDGET_TABLE}"
        accelerated = f"\n  metric_weight_decay: {decay:g}   # {why}\n  {table}"
    passes, share = steps * per_step / trained_on, steps * per_step / parameters
    note = f" {TOKENS_PER_PARAMETER} would be better: the corpus is small for this model." if share < FEW_TOKENS else ""
    return f"""\
# yaml-language-server: $schema={SCHEMA}
# Made by `pldr init`. Every key: pldr config {name}.yaml; what it costs: pldr plan {name}.yaml; go: pldr run {name}.yaml
name: {name}
run_dir: runs/{name}
seed: 1

data:
  sources:   # about {_count(corpus.text_bytes)}B of text, {_count(tokens)} tokens; paths are relative to the working directory
{urls}
  val_fraction: {val:g}    # of documents: losses and the certificate's prompts come from it
  test_fraction: {test:g}
  # clean: {{exact_duplicates: true, near_duplicates: true, quality: true, language: true}}   # docs/data.md

model:   # {size_name}: {_count(parameters)} parameters
  vocab_size: {model.vocab_size}
  context_length: {model.context_length}
  num_layers: {model.num_layers}
  num_heads: {model.num_heads}
  head_dim: {model.head_dim}
  A_dff: {model.A_dff}

train:
  # {passes:.1f} passes over the training split, {share:.1f} tokens a parameter.{note}
  steps: {steps}   # of {per_step:,} tokens
  global_batch: {size.global_batch}
  micro_batch: {size.micro_batch}
  max_lr: 1.0e-3
  warmup_steps: {warmup}
  weight_decay: 0.1{accelerated}
  clip_by: norm
  clip: 1.0
  precision: {size.precision}
  zero_stage: 1
  validate_every: {every}
  checkpoint_every: {every}

post:
  prompts: 128   # held-out; a certificate asks for 100 or more
  sample_prompt: {_quoted(corpus.prompt)}
"""


def _train_share(corpus: Corpus, val: float, test: float) -> float:
    """The share of the text that is left to train on."""
    if not corpus.positions:
        return 1 - val - test
    left = sum(size for position, size in corpus.positions if val <= position < 1 - test)
    return left / sum(size for _, size in corpus.positions)


def per_parameter(config: RunConfig) -> float:
    """Tokens that a run is trained on, per parameter."""
    train, model = config.train, config.model
    return train.steps * train.global_batch * model.context_length / model.num_parameters()["total"]


def _metric_decay(steps: int, warmup: int) -> float | None:
    """What brings the budget to BUDGET; None where the papers' 0.1 is enough. Two digits, rounded up."""
    usual = invariance_budget(TrainConfig(steps=steps, warmup_steps=warmup, global_batch=4, micro_batch=4))
    if usual >= BUDGET:
        return None
    exact = 0.1 * BUDGET / usual
    unit = 10.0 ** (math.floor(math.log10(exact)) - 1)
    return round(math.ceil(exact / unit) * unit, 6)


def _held_out(corpus: Corpus, tokens: int, context: int) -> tuple[float, float]:
    """The shares of documents for validation and test: enough sequences, from more than a few documents, and at most a fifth
    for validation. Where documents are few, shares that select some."""
    of_text, of_documents = (
        min(0.2, max(0.001, share))
        for share in (
            HELD_OUT_SEQUENCES * context / max(tokens, 1),
            LEAST_HELD_OUT_DOCUMENTS / max(corpus.documents, 1),
        )
    )
    if not corpus.positions:
        val = float(f"{max(of_text, of_documents):.1g}")
        return val, val / 2
    lowest_first = sorted(corpus.positions)
    highest_first = [(1 - position, size) for position, size in reversed(lowest_first)]
    count, val = _select(lowest_first, of_text, of_documents, most=len(lowest_first) - 1)
    if len(lowest_first) < LEAST_FOR_TEST:
        return val, 0.0
    _, test = _select(highest_first, of_text / 2, of_documents / 2, most=len(lowest_first) - count - 1)
    return val, test


def _select(ordered: list[tuple[float, int]], of_text: float, of_documents: float, *, most: int) -> tuple[int, float]:
    """How many documents, from the lowest position on, are shares of the text and of the documents, and the fraction that
    selects them."""
    wanted, count, size = of_text * sum(size for _, size in ordered), 0, 0
    while count < most and (size < wanted or count < math.floor(of_documents * len(ordered))):
        size, count = size + ordered[count][1], count + 1
    if not count:
        return 0, 0.0
    low, high = ordered[count - 1][0], ordered[count][0]
    return count, next(x for digits in range(2, 16) if low < (x := round((low + high) / 2, digits)) < high)


def _round(value: float) -> int:
    """Two significant digits, at least 1."""
    return max(1, round(float(f"{value:.2g}")))


def _count(value: float) -> str:
    """1234567 -> 1.2 M"""
    for unit, name in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= unit:
            return f"{value / unit:.3g} {name}"
    return f"{value:g} "


def _quoted(text: str) -> str:
    """A string of YAML in double quotes, which is one of JSON."""
    return json.dumps(text, ensure_ascii=False)
