"""One way to train judged as a whole, and the best way for each number of devices."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from math import gcd
from typing import Any, get_args

from pipeline.config.batches import batch_sizes, stretches
from pipeline.config.load import SHIPPED
from pipeline.config.rank_memory import stages_of
from pipeline.config.run import RunConfig
from pipeline.config.scale.cluster import Cluster
from pipeline.config.scale.failures import Failures
from pipeline.config.scale.input_output import InputOutput, input_output
from pipeline.config.scale.memory import Memory, memory
from pipeline.config.scale.step_time import StepTime, compute_of, step_time
from pldr_model.config import ActivationCheckpointing

WORLD_SIZES = tuple(2**power for power in range(3, 13))  # 8 … 4096


@dataclass(frozen=True)
class Way:
    """A configuration on a cluster, computed."""

    config: RunConfig
    cluster: Cluster
    step: StepTime
    memory: Memory
    files: InputOutput
    failures: Failures

    @property
    def fits(self) -> bool:
        return self.memory.fits(self.cluster)

    @property
    def tokens_per_s(self) -> float:
        """Of training, without failures and checkpoints."""
        return self.config.train.global_batch * self.config.model.context_length / self.step.total

    @property
    def checkpoint_every(self) -> int:
        """Steps between two checkpoints with the highest goodput; at most all steps."""
        steps = round(self.failures.best_interval() / self.step.total)
        return min(max(1, steps), self.config.train.steps)

    def goodput(self, checkpoint_every: int) -> float:
        """Useful share of the time with a checkpoint after every so many steps."""
        return self.failures.goodput(checkpoint_every * self.step.total)

    def hours(self, checkpoint_every: int) -> float:
        """Of the whole run, with failures. Steps of `train.batch_warmup` are shorter, but not by what a step sends."""
        goodput = self.goodput(checkpoint_every)
        seconds = sum(steps * self._step_of(batch) for batch, steps in stretches(self.config.train, 0))
        return seconds / goodput / 3600 if goodput > 0 else float("inf")

    def _step_of(self, batch: int) -> float:
        """Seconds of a step with this many sequences."""
        if batch == self.config.train.global_batch:
            return self.step.total
        train = self.config.train.model_copy(update={"global_batch": batch})
        config = self.config.model_copy(update={"train": train})
        return step_time(config, self.cluster, compute_of(config, self.cluster)).total


def judge(config: RunConfig, cluster: Cluster) -> Way:
    """Compute everything about one way. The configuration's batch must divide (`problem_with`)."""
    step = step_time(config, cluster, compute_of(config, cluster))
    files = input_output(config, cluster, step.total)
    restart = cluster.restart_minutes * 60 + files.read_s + files.commit_s
    return Way(
        config, cluster, step, memory(config, cluster), files, Failures(cluster.job_mtbf_s, files.stall_s, restart)
    )


def problem_with(config: RunConfig, devices: int) -> str | None:
    """Why this many devices cannot share each global batch of the run, or None."""
    micro = config.train.micro_batch
    for batch in batch_sizes(config.train):
        warmup = batch != config.train.global_batch
        key = "batch_warmup: a batch of" if warmup else "global_batch"
        if batch < devices:
            fix = f"raise {'it' if warmup else 'train.global_batch'} to a multiple of {devices}"
            return f"{key} {batch} feeds {batch} devices at most: {fix}"
        if batch % devices:
            fix = "make it" if warmup else "set train.global_batch="
            return (
                f"{key} {batch} is no multiple of {devices}: {fix}{' ' if warmup else ''}{batch // devices * devices}"
            )
        if config.train.mixes_g and batch // devices % micro:
            return (
                f"micro_batch {micro}, part of the recipe where G is shared, does not divide the {batch // devices} of a "
                f"device ({key} {batch})"
            )
    return None


def best(config: RunConfig, cluster: Cluster) -> Way | None:
    """The fastest way that fits, over ZeRO stage, micro batch and recomputation, at the configuration's global batch; None when
    nothing fits. Of ways within 1 % the one that recomputes less, has larger micro batches, shards less: what the model does
    not see (kernels fill a device better with larger micro batches) decides there."""
    ways = [way for way in _ways(config, cluster) if way.fits]
    if not ways:
        return None
    fastest = min(way.step.total for way in ways)
    recompute = get_args(ActivationCheckpointing)
    return min(
        (way for way in ways if way.step.total <= 1.01 * fastest),
        key=lambda way: (
            (0, 2, 1)[recompute.index(way.config.train.activation_checkpointing)],
            -way.config.train.micro_batch,
            way.config.train.zero_stage,
        ),
    )


def _ways(config: RunConfig, cluster: Cluster) -> Iterator[Way]:
    per_rank = gcd(*batch_sizes(config.train)) // cluster.devices
    for stage in stages_of(config.train):
        if config.train.optimizer != "muon" and config.train.precision == "bf16" and stage == 0:
            continue  # gradients would be accumulated in bf16 (docs/compatibility.md)
        for recompute in get_args(ActivationCheckpointing):
            if recompute == "metric_learner" and config.model.g_source != "learned":
                continue
            # Where a sequence takes another's G, the micro batch is part of the recipe.
            fits = [config.train.micro_batch] if config.train.mixes_g else range(1, per_rank + 1)
            for micro in (n for n in fits if per_rank % n == 0):
                yield judge(with_way(config, stage, micro, recompute), cluster)


def with_way(config: RunConfig, stage: int, micro_batch: int, recompute: str) -> RunConfig:
    """The configuration trained another way. At another stage DeepSpeed's own keys are those of the shipped file."""
    changes: dict[str, Any] = {"zero_stage": stage, "micro_batch": micro_batch, "activation_checkpointing": recompute}
    if stage != config.train.zero_stage:
        changes["deepspeed"] = json.loads((SHIPPED / f"zero{stage}.json").read_text())
        changes["offload"] = "none"
    return config.model_copy(update={"train": config.train.model_copy(update=changes)})


def stage_table(config: RunConfig, cluster: Cluster) -> list[Way]:
    """The configuration at each ZeRO stage that its optimizer can have, everything else as it is."""
    train = config.train
    return [
        judge(with_way(config, stage, train.micro_batch, train.activation_checkpointing), cluster)
        for stage in stages_of(train)
    ]


def with_overlap(config: RunConfig) -> RunConfig:
    """The configuration with DeepSpeed's overlap_comm, which reduces gradients while the backward pass runs."""
    keys = dict(config.train.deepspeed) if isinstance(config.train.deepspeed, dict) else {}
    keys["zero_optimization"] = {**keys.get("zero_optimization", {}), "overlap_comm": True}
    return config.model_copy(update={"train": config.train.model_copy(update={"deepspeed": keys})})
