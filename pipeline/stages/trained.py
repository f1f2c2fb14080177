"""What post-training needs to know of a trained run: its recipe, its held-out sequences, where it comes from.

Decision: G_LM is extracted from one half of the held-out sequences and judged on the other, so that no prompt vouches for
itself. Halves are even and odd sequences, not documents: with few documents in the split, both come from all of them, and what
is judged comes from as many as possible.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch

from pipeline.config.paths import RunPaths, tokens_folder
from pipeline.config.run import RunConfig
from pipeline.config.schedule import planned_budget
from pipeline.config.train import FreezeConfig, TrainConfig
from pipeline.errors import ConfigError, UserError
from pipeline.stages.described import constraint_of
from pipeline.tokenizer import SPECIAL_IDS
from pipeline.tracking.origin import git_commit
from pldr_model.config import ModelConfig

G_OF = {
    "batch": "the G of one sequence for all of a micro batch",
    "neighbor": "the G of the next sequence of the micro batch for each",
}
DECAYED = {
    "units": "the metric learner",
    "norms": "the LayerNorms of the metric learner",
    "glus": "the GLUs of the metric learner",
}


def as_trained(config: RunConfig, paths: RunPaths, source: dict[str, Any]) -> RunConfig:
    """The configuration with the seed and the recipe that the weights were trained with, as recorded with them: today's
    file or an override must not rewrite history. Raises ConfigError for weights that started from another kind of G."""
    recipe, seed = source.get("recipe"), source.get("seed")
    if not isinstance(recipe, dict) or not isinstance(seed, int):
        raise ConfigError(
            f"{paths.weights}: has no record of its training's recipe and seed; run `pldr consolidate CONFIG` again"
        )
    train = {key: value for key, value in recipe.items() if key in TrainConfig.model_fields}
    for key in recipe.keys() - train.keys():
        if (value := getattr(config.model, key)) != recipe[key]:
            raise ConfigError(
                f"{paths.weights}: trained with model.{key} {recipe[key]!r}, the configuration says {value!r}; "
                "name the configuration that it was trained with"
            )
    if train.get("freeze_g") is not None:
        train["freeze_g"] = FreezeConfig.model_validate(train["freeze_g"])
    return config.model_copy(update={"seed": seed, "train": config.train.model_copy(update=train)})


def require_same(config: RunConfig, paths: RunPaths, model: ModelConfig, source: dict[str, Any]) -> None:
    """Raise ConfigError when the weights are of another model or tokenizer than the run's configuration and tokens."""
    from pipeline.data.tokens.index import TokenIndex

    frozen = config.train.freeze_g is not None and model.g_source != "learned"
    ours, theirs = config.trained_model(frozen=frozen).to_dict(), model.to_dict()
    for key in ours | theirs:
        if key != "g_file" and theirs.get(key) != ours.get(key):
            raise ConfigError(
                f"{paths.weights}: a checkpoint of another model: its {key} is {theirs.get(key)}, the configuration's is "
                f"{ours.get(key)}; "
                "name the configuration that it was trained with"
            )
    index = TokenIndex.load(tokens_folder(config))
    if source.get("tokenizer_sha256") not in (None, index.tokenizer_sha256):
        raise ConfigError(
            f"{paths.weights}: trained with another tokenizer than {index.folder} was made with; validate it with its own"
        )


class HeldOut(NamedTuple):
    """Held-out sequences [n, S+1], and from how many documents those without padding are samples; with packing best-fit a
    lower bound (pipeline/data/loading/by_document.py)."""

    sequences_NT: torch.Tensor
    documents: int


def held_out(config: RunConfig, paths: RunPaths, *, half: int, limit: int | None = None) -> HeldOut:
    """Held-out sequences of one half of the val split (0: even, 1: odd sequences), from as many documents as possible.

    The first `limit` (None: post.prompts) hold no padding, as far as the half has such; those with padding come after them, at
    most as many. Half 0 leaves out the documents of half 1 where there are enough others.
    """
    from pipeline.data.loading.by_document import documents_of, spread
    from pipeline.data.loading.reader import open_split
    from pipeline.data.tokens.index import TokenIndex

    index = TokenIndex.load(tokens_folder(config))
    reader = open_split(index, "val", cache_gigabytes=config.data.cache_gigabytes)
    skip = config.data.on_bad_shard == "skip"
    split = documents_of(reader, pad_id=config.model.pad_id, eos_id=SPECIAL_IDS["eos"], skip=skip)
    of_half = [split.sequences % 2 == each for each in (0, 1)]
    if of_half[half].sum() < 2:
        raise UserError(
            f"{index.folder}: {reader.num_sequences} held-out sequences are too few to judge with; raise data.val_fraction"
        )
    wanted = config.post.prompts if limit is None else limit
    usable = [split.sequences[mine & ~split.padded] for mine in of_half]
    if half == 0:
        judged = split.of(spread(split, usable[1], config.post.prompts))
        others = np.setdiff1d(usable[0], split.holding(judged))
        usable[0] = others if len(others) >= wanted else usable[0]
    chosen = spread(split, usable[half], wanted)
    padded = split.sequences[of_half[half] & split.padded][:wanted]
    return HeldOut(torch.from_numpy(reader.read(np.concatenate((chosen, padded)))), split.count(chosen))


def lineage(source: dict[str, Any]) -> dict[str, Any]:
    """Where a bundle comes from: the checkpoint's record and the code's commit."""
    return {**source, "git_commit": git_commit()}


def spent_budget(config: RunConfig, source: dict[str, Any]) -> float | None:
    """The invariance budget behind the weights, as recorded in their checkpoint (older ones lack it: the planned one); None
    without a metric learner to spend it on."""
    if config.model.g_source != "learned":
        return None
    recorded = source.get("invariance_budget")
    return planned_budget(config.train) if recorded is None else float(recorded)


def notes(config: RunConfig, source: dict[str, Any]) -> list[str]:
    """What a reader of the model card must know about the recipe. source: the weights' record (consolidate.py)."""
    train, budget, frozen = config.train, spent_budget(config, source), source.get("frozen")
    fewer = " (fewer at first)" if train.batch_warmup else ""
    optimizer = "AdamW" if train.optimizer == "adamw" else "Muon (matrices) and AdamW"
    lines = [
        f"Trained {source.get('step') or train.steps:,} steps of {train.global_batch} sequences{fewer} of "
        f"{config.model.context_length} tokens, {optimizer}, max lr {train.max_lr:g}, weight decay {train.weight_decay:g}."
    ]
    if train.document_masks:
        lines.append(
            "Trained with attention within documents only (train.document_masks), each at positions from 0: give it one text "
            "at a time. It was measured without masks, as it is used."
        )
    if config.model.g_source == "constant":
        lines.append("G_LM: one trained [K,K] parameter a head, started at the identity; there is no metric learner.")
    if (constraint := constraint_of(config.model)) is not None:
        lines.append(f"It was constrained in training (model.g_constraint {config.model.g_constraint}): {constraint}.")
    if config.model.g_source == "learned" and not config.model.num_denseA:
        lines.append("The metric learner has no GLUs (model.num_denseA 0): it is LayerNorms alone, unlike the papers'.")
    if config.model.g_start == "identity":
        lines.append(
            "Started near plain attention (model.g_start=identity: b_a = I, a scaled by 0.1), unlike the papers."
        )
    if train.g_from != "own":
        lines.append(
            f"Trained with {G_OF[train.g_from]} (train.g_from {train.g_from}); measured with each prompt's own G."
        )
    if (shared := source.get("shared")) is not None:
        lines.append(
            f"After step {shared:,}, with an order parameter of G below {train.share_g_below:g}, trained with {G_OF['batch']} "
            "(train.share_g_below); measured with each prompt's own G."
        )
    if budget is not None:
        lines.append(f"Invariance budget (sum of learning rate x metric weight decay): {budget:.2f}.")
        if frozen is not None:
            trained = train.freeze_g is not None and train.freeze_g.become == "parameter"
            lines.append(
                f"G_LM was frozen to its mean over training sequences after step {frozen:,} (train.freeze_g) and "
                f"{'trained on as a parameter' if trained else 'stayed as it was'}; the budget is that of the steps before."
            )
        if train.metric_decay > train.weight_decay:
            lines.append(
                f"ACCELERATED RECIPE: {DECAYED[train.metric_decay_on]} had weight decay {train.metric_decay:g} (the papers use "
                "0.1), "
                "which makes G_LM invariant early."
            )
        lines.append(
            "At small scale and short training PLGA trails its SDPA twin (G = identity) in held-out loss; compare with "
            "the twin (model.g_source=identity) before drawing conclusions."
        )
    return lines
