"""The training loop: `Trainer.train` is the order of everything that happens in a step, each event a method below it.

The only state of the training data is `sequences_consumed`; everything else follows from the configuration
(pipeline/data/loading/order.py, pipeline/config/schedule.py) or is in the checkpoint. Every rank has a Trainer; rank 0
reports.
"""

from __future__ import annotations

import gc
import logging
import math
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from pipeline.checkpoint.retention import policy_of, retain
from pipeline.checkpoint.save import Saver
from pipeline.config.batches import batch_at
from pipeline.config.paths import RunPaths, staging_folder
from pipeline.config.run import RunConfig
from pipeline.config.schedule import learning_rate
from pipeline.errors import UserError
from pipeline.tracking.metrics import Tracker
from pipeline.tracking.publish import Publisher
from pipeline.train.batching import accumulate, batches_from, of_step
from pipeline.train.by_source import Sources
from pipeline.train.console import Progress
from pipeline.train.engine import device_of_rank, release, set_learning_rate
from pipeline.train.evaluate import validate
from pipeline.train.evaluations import Evaluations
from pipeline.train.freeze import FreezeRule, freeze, mean_g, num_batches
from pipeline.train.heartbeat import Heartbeat
from pipeline.train.optim import gradient_norm
from pipeline.train.profiling import StepProfiler, record_history
from pipeline.train.sharing import g_in_use, share, training_flops
from pipeline.train.signals import StopRequest, signal_name
from pipeline.train.spikes import Event, Sequences, describe, judge, rollback_target
from pipeline.train.state import Batch, Lineage, TrainData, TrainState, begin, record, roll_back
from pipeline.train.step import Outcome, global_step
from pipeline.train.telemetry import Measures, Throughput, first_on_node, peak_flops
from pldr_model.config import ModelConfig

log = logging.getLogger(__name__)


class Trainer:
    """One rank of a training run: `Trainer(...).train()`. Every rank makes one and calls the same methods; collective.

    `data`: this rank's batches; `held_out`: validation sequences [n, S+1] (with document masks [2, n, S+1]), and the `sources`
    of their tokens, where they are known; `tracker`, `publisher`, `evaluations`: rank 0's, else None; `resume_from`: a
    committed checkpoint, or None.
    `engine` and `state` are the current ones: a freeze or a rollback replaces them. Raises UserError when a checkpoint does not
    fit this run.
    """

    def __init__(
        self,
        config: RunConfig,
        paths: RunPaths,
        data: TrainData,
        held_out: np.ndarray,
        *,
        bytes_per_token: float,
        lineage: Lineage,
        tracker: Tracker | None,
        resume_from: Path | None,
        publisher: Publisher | None = None,
        evaluations: Evaluations | None = None,
        heart: Heartbeat | None = None,
        stop: StopRequest | None = None,
        sources: Sources | None = None,
    ) -> None:
        self.config, self.settings, self.checkpoints = config, config.train, paths.checkpoints
        self.data, self.held_out, self.sources, self.bytes_per_token = data, held_out, sources, bytes_per_token
        self.lineage, self.tracker, self.evaluations = lineage, tracker, evaluations
        self.heart, self.stop = heart or Heartbeat(), stop or StopRequest()
        self.device = device_of_rank()
        if self.settings.memory_history:
            record_history()
        self.engine, self.state = begin(config, resume_from)
        self.freeze_rule = FreezeRule(self.settings)
        self.saver = Saver(
            self.engine,
            self.checkpoints,
            staging=staging_folder(config),
            first_on_node=first_on_node(),
            committed=partial(_committed, config, self.checkpoints, publisher, evaluations),
        )
        self.progress = Progress(config, start_step=self.state.step) if dist.get_rank() == 0 else None
        self.throughput, self.measures = Throughput(), Measures(paths.root, self.device)
        self.profiler = StepProfiler(self.settings.profile_steps, paths.profiles, dist.get_rank())
        self.peak = self.settings.peak_tflops * 1e12 if self.settings.peak_tflops else peak_flops()
        self.batches = self._batches_from_here()
        self.stopped: str | None = None  # the signal that ends training after this step

    def train(self) -> TrainState:
        """Train to `train.steps`, or to the step in which a rank was asked to stop.

        Raises UserError when too many losses in a row are not finite, a spike is to stop the run, or the last checkpoint cannot
        be written.
        """
        gc.disable()  # ranks must not pause one after another; collected at the logging interval
        while self.state.step < self.settings.steps:
            if self._validation_is_left():
                self._log(self._validate())
            if self.freeze_rule.is_due(self.state):
                self._freeze()
            outcome, sequences = self._step()
            values: dict[str, float] = {}
            if self._logs_now():
                values |= self._training_metrics(outcome)
            if self._validates_now():
                values |= self._validate()
            event = self._check_for_spike(outcome, values, sequences)
            if values:
                self._log(values)
            if event is not None and event["action"] == "rollback" and self._roll_back():
                continue
            if self._saves_now():
                self._save()
            for line in self.evaluations.poll() if self.evaluations is not None else ():
                self._announce(line)
            if self.stopped is not None:
                break
        self.profiler.close()
        self.heart.at(self.state.step, "end")
        if self.progress is not None:
            self.progress.end(self.state.step, stop=self.stopped)
        return self.state

    @property
    def model(self) -> ModelConfig:
        """The model that is trained now: another one once G is frozen."""
        return self.config.trained_model(frozen=self.state.frozen is not None)

    def optimize(self, micro_batches: Sequence[np.ndarray]) -> Outcome:
        """One optimizer step over a global batch (a test overrides this to look at the engine before and after)."""
        return global_step(
            self.engine,
            micro_batches,
            self.model,
            stop=self.stop,
            device=self.device,
            forward=self.measures.forward,
            z_loss=self.settings.z_loss,
            g_from=g_in_use(self.settings, self.state),
        )

    def _freeze(self) -> None:
        """Replace the metric learner by the mean of G over the coming batches. Does nothing when the checkpoint of this
        step, which the frozen model's weights are read from, was not saved."""
        source = self.freeze_rule.source(self.checkpoints, self.state)
        if source is None:
            return
        ahead = self._look_ahead(num_batches(self.settings, self.state.step))
        self.heart.at(self.state.step, "freeze")
        with self.throughput.pause():
            g_lm = mean_g(self.engine, self.config.model, [micro_batches for micro_batches, _ in ahead])
            release(self.engine)
            del self.engine, self.saver.engine  # its memory is free before the new one is made
            self.saver.engine = self.engine = freeze(self.config, source, g_lm)
        self.state.frozen = self.state.step
        self._announce(f"G is frozen after step {self.state.step}: the metric learner is gone")

    def _step(self) -> tuple[Outcome, Sequences]:
        """Train on the next global batch. Returns what came of it, and what gives the numbers of its sequences."""
        step = self.state.step
        sequences = partial(of_step(self.data, self.settings, step).indices, self.state.sequences_consumed)
        self.profiler.begin(step + 1)
        self.heart.at(step + 1, "data")
        with self.measures.data.running():
            micro_batches, position = self._next_batch()
        self.heart.at(step + 1, "compute")
        rate = learning_rate(self.settings, step)
        set_learning_rate(self.engine, rate)
        accumulate(self.engine, len(micro_batches))
        outcome = self.optimize(micro_batches)
        self.stopped = outcome.stop
        self._advance(outcome, position, rate)
        return outcome, sequences

    def _advance(self, outcome: Outcome, position: int, rate: float) -> None:
        """Count a step whose batch ends at this position of the data order."""
        state, batch = self.state, batch_at(self.settings, self.state.step)
        if not outcome.skipped and state.frozen is None:
            state.budget += rate * self.settings.metric_decay
        state.step += 1
        state.skipped_steps = int(self.engine.skipped_steps)
        state.sequences_left_out += position - state.sequences_consumed - batch
        state.sequences_consumed = position
        state.tokens_consumed += outcome.targets
        self.throughput.add(outcome.targets)
        self.measures.step()
        if self.progress is not None:
            self.progress.first_step(state.step)

    def _is_last(self) -> bool:
        return self.state.step == self.settings.steps or self.stopped is not None

    def _logs_now(self) -> bool:
        step, settings = self.state.step, self.settings
        return step % settings.log_every == 0 or step % settings.checkpoint_every == 0 or step == settings.steps

    def _validates_now(self) -> bool:
        return self.state.step % self.settings.validate_every == 0 or self.state.step == self.settings.steps

    def _validation_is_left(self) -> bool:
        """Whether this step's validation was ended by a stop (`_stop_is_asked`): the resumed run does it first."""
        due = self.state.step > 0 and self.state.step % self.settings.validate_every == 0
        return due and (self.state.val_step or 0) < self.state.step

    def _stop_is_asked(self) -> bool:
        """Whether a rank was asked to stop, so that validation ends; not after the last step, which no start follows."""
        if self.state.step == self.settings.steps:
            return False
        if self.stopped is None:
            flags = torch.tensor(self.stop.flags(), dtype=torch.float64).to(self.device)
            dist.all_reduce(flags)
            self.stopped = signal_name(flags.tolist())
        return self.stopped is not None

    def _saves_now(self) -> bool:
        due = self.state.step % self.settings.checkpoint_every == 0 or self._is_last()
        return due or self.freeze_rule.needs_checkpoint(self.state)

    def _training_metrics(self, outcome: Outcome) -> dict[str, float]:
        """What is logged of the step that just ended, and of the interval since the last logging."""
        gc.collect(1)
        state, settings = self.state, self.settings
        values = {
            "train/loss": outcome.loss,
            "train/lr": learning_rate(settings, state.step - 1),
            "train/grad_norm": _gradient_norm(self.engine),
            "train/tokens_per_second": self.throughput.read(),
            "train/skipped_steps": float(state.skipped_steps),
            "train/spikes": float(state.guard.spikes),
            "data/epoch": state.sequences_consumed / self.data.num_sequences,
            "data/tokens": float(state.tokens_consumed),
            "data/padding_share": state.padding_share(self.config.model.context_length),
            "data/left_out_sequences": float(state.sequences_left_out),
            **self.measures.gather(),
        }
        if self.peak is not None:
            flops = values["train/tokens_per_second"] * training_flops(self.model, settings, state)
            values["train/mfu"] = flops / (self.peak * dist.get_world_size())
        if settings.freeze_g is not None:
            values["invariance/frozen"] = float(state.frozen is not None)
        if settings.share_g_below is not None:
            values["invariance/shared"] = float(state.shared is not None)
        if self.config.model.g_source == "learned":
            values["invariance/budget"] = state.budget
        if outcome.skipped:
            del values["train/loss"], values["train/grad_norm"]
        return values

    def _validate(self) -> dict[str, float]:
        """Score the held-out sequences; what the freeze rule and the retention of checkpoints need goes into the state.
        Empty when a stop ended it."""
        self.heart.at(self.state.step, "validate")
        with self.throughput.pause():
            values = validate(
                self.engine,
                self.model,
                self.held_out,
                batch_size=self.settings.micro_batch,
                bytes_per_token=self.bytes_per_token,
                sources=self.sources,
                stopped=self._stop_is_asked,
            )
        if not values:
            return {}
        order_parameter = values.get("invariance/order_parameter_G")
        self.freeze_rule.count(self.state, order_parameter)
        if (text := share(self.settings, self.state, order_parameter)) is not None:
            self._announce(text)
        cached = values["val/loss_cached"]
        self.state.val_loss_cached = cached if math.isfinite(cached) else None
        self.state.val_step = self.state.step
        return values

    def _check_for_spike(self, outcome: Outcome, values: dict[str, float], sequences: Sequences) -> Event | None:
        """A skipped step or a loss spike, announced; `values` gets the new count. Raises UserError when it ends the run."""
        try:
            event = judge(self.state.guard, self.settings, self.state.step, outcome, values, sequences)
        except UserError:  # the same on every rank
            self.saver.finish()
            raise
        if event is not None:
            values["train/spikes"] = float(self.state.guard.spikes)
            self._warn(describe(event))
        return event

    def _log(self, values: dict[str, float]) -> None:
        if self.tracker is not None:
            self.tracker.log(self.state.step, values)
        if self.progress is not None:
            self.progress.update(self.state.step, values)

    def _roll_back(self) -> bool:
        """Load the newest intact checkpoint, and continue after the batches seen so far; False when there is none."""
        self._warn(self.saver.finish())
        target = rollback_target(self.checkpoints, self.state.guard, self.state.step)
        if target is None:
            self._warn("there is no checkpoint to roll back to; training continues")
            return False
        self.engine, self.state = roll_back(self.engine, self.config, target, self.state)
        self.saver.engine = self.engine
        if self.settings.batch_warmup is not None:
            self.batches = self._batches_from_here()  # of the sizes of the steps that are repeated
        position = self.state.sequences_consumed
        self._announce(f"rolled back to step {self.state.step}; continues at position {position}")
        return True

    def _save(self) -> None:
        """Save a checkpoint. One that fails ends the run only at its last step."""
        freezes, last = self.freeze_rule.is_due(self.state), self._is_last()
        self.heart.at(self.state.step, "save")
        with self.throughput.pause():
            try:
                saved = record(self.config, self.state, self.lineage, self.data, freezes=freezes)
                self._warn(self.saver.save(saved, wait=last or freezes))
            except UserError as error:  # on every rank: a full disk, say
                if last:
                    raise
                self._warn(f"{error}; training continues, earlier checkpoints are kept")
                self.freeze_rule.postpone(self.state)

    def _batches_from_here(self) -> Iterator[Batch]:
        return batches_from(self.data, self.settings, self.state)

    def _next_batch(self) -> Batch:
        batch = next(self.batches, None)
        if batch is None:  # steps that were rolled back are trained on further batches
            self.batches = self._batches_from_here()
            batch = next(self.batches)
        return batch

    def _look_ahead(self, count: int) -> list[Batch]:
        """The coming batches, at least one; they are still trained on."""
        first = self._next_batch()
        ahead = [first, *islice(self.batches, count - 1)]
        self.batches = chain(ahead, self.batches)
        return ahead

    def _warn(self, text: str | None) -> None:
        if text is not None:
            self._announce(f"warning: {text}")

    def _announce(self, text: str) -> None:
        if self.progress is not None:
            self.progress.event(text)
            log.warning("%s", text)


def _committed(
    config: RunConfig, folder: Path, publisher: Publisher | None, evaluations: Evaluations | None, step: int
) -> None:
    """On rank 0, which has the publisher where there is one."""
    if evaluations is not None:
        evaluations.committed(step)  # first: what it will read is not removed
    if publisher is not None:
        publisher.saved(step)
    else:
        busy = set() if evaluations is None else evaluations.busy()
        retain(folder, policy_of(config.train), now=step, busy=busy)


def _gradient_norm(engine: Any) -> float:
    norm = engine.get_global_grad_norm()
    return gradient_norm(engine.optimizer) if norm is None else float(norm)
