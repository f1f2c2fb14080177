"""The training loop: one screen, no callbacks.

The only training-data state is `sequences_consumed`; everything else follows from the configuration (order.py,
schedule.py) or is in the checkpoint. Every rank runs this function; rank 0 talks.
"""

from __future__ import annotations

import gc
import logging
import math
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
import torch.distributed as dist

from pipeline.checkpoint.format import checkpoint_name
from pipeline.checkpoint.retention import policy_of, retain
from pipeline.checkpoint.save import Saver
from pipeline.config.paths import RunPaths, staging_folder
from pipeline.config.run import RunConfig
from pipeline.config.schedule import learning_rate
from pipeline.errors import UserError
from pipeline.tracking.metrics import Tracker
from pipeline.tracking.publish import Publisher
from pipeline.train.console import Progress
from pipeline.train.engine import device_of_rank, release, set_learning_rate
from pipeline.train.evaluate import validate
from pipeline.train.freeze import calm, freeze, is_due, mean_g, num_batches
from pipeline.train.heartbeat import Heartbeat
from pipeline.train.optim import gradient_norm
from pipeline.train.profiling import StepProfiler, record_history
from pipeline.train.signals import StopRequest
from pipeline.train.spikes import checkpoint_to_go_back_to, judge, told
from pipeline.train.state import Lineage, TrainData, TrainState, begin, record, roll_back, whole
from pipeline.train.step import global_step
from pipeline.train.telemetry import Measures, Throughput, first_on_node, peak_flops

log = logging.getLogger(__name__)


def train(
    config: RunConfig,
    data: TrainData,
    held_out: np.ndarray,
    *,
    bytes_per_token: float,
    lineage: Lineage,
    tracker: Tracker | None,
    resume_from: Path | None,
    publisher: Publisher | None = None,
    heart: Heartbeat | None = None,
    stop: StopRequest | None = None,
) -> TrainState:
    """Train to `train.steps`, or to the step in which a rank was asked to stop; collective.

    `held_out`: validation sequences [n, S+1]; `tracker`, `publisher`: rank 0's, else None. Raises UserError when too many
    losses in a row are not finite, a spike is to stop the run, a checkpoint does not fit, or the last one cannot be written.
    """
    heart, stop = heart or Heartbeat(), stop or StopRequest()
    settings, paths = config.train, RunPaths(config.run_dir)
    world, device = dist.get_world_size(), device_of_rank()
    if settings.memory_history:
        record_history()
    engine, state = begin(config, resume_from)
    saver = Saver(
        engine,
        paths.checkpoints,
        staging=staging_folder(config),
        first_on_node=first_on_node(),
        committed=partial(_committed, config, paths.checkpoints, publisher),
    )
    progress = Progress(config, start_step=state.step) if dist.get_rank() == 0 else None
    throughput, measures = Throughput(), Measures(paths.root, device)
    profiler = StepProfiler(settings.profile_steps, paths.profiles, dist.get_rank())
    tokens_per_batch = settings.global_batch * config.model.context_length
    peak = settings.peak_tflops * 1e12 if settings.peak_tflops else peak_flops()
    batches = data.micro_batches(state.sequences_consumed, limit=settings.steps - state.step)
    stopped: str | None = None
    no_freeze_before = 0  # later when a save has failed

    def is_to_freeze() -> bool:
        due = is_due(settings, state.step, state.calm_evaluations)
        return state.frozen is None and state.step >= no_freeze_before and due

    gc.disable()  # ranks must not pause one after another; collected at the logging interval

    while state.step < settings.steps:
        if is_to_freeze():
            source = whole(paths.checkpoints / checkpoint_name(state.step))
            ahead = list(islice(batches, num_batches(settings))) if source is not None else []
            batches = chain(ahead, batches)
            if source is not None and ahead:
                heart.at(state.step, "freeze")
                with throughput.pause():
                    g_lm = mean_g(engine, config.model, [micro for micro, _ in ahead])
                    release(engine)
                    del engine, saver.engine
                    saver.engine = engine = freeze(config, source, g_lm)
                state.frozen = state.step
                _tell(progress, f"G is frozen after step {state.step}: the metric learner is gone")
        model = config.trained_model(frozen=state.frozen is not None)
        profiler.begin(state.step + 1)
        heart.at(state.step + 1, "data")
        with measures.data.running():
            batch = next(batches, None)
        if batch is None:  # steps that were rolled back are trained on further batches
            batches = data.micro_batches(state.sequences_consumed, limit=settings.steps - state.step)
            continue
        micro_batches, position = batch
        heart.at(state.step + 1, "compute")
        rate = learning_rate(settings, state.step)
        set_learning_rate(engine, rate)
        outcome = global_step(engine, micro_batches, model, stop=stop, device=device, forward=measures.forward)
        ids = partial(data.indices, state.sequences_consumed)
        stopped = outcome.stop
        if not outcome.skipped and state.frozen is None:
            state.budget += rate * settings.metric_decay
        state.step += 1
        state.skipped_steps = int(engine.skipped_steps)
        state.sequences_left_out += position - state.sequences_consumed - settings.global_batch
        state.sequences_consumed = position
        state.tokens_consumed += tokens_per_batch
        throughput.add(tokens_per_batch)
        measures.step()
        last = state.step == settings.steps or stopped is not None
        checkpoint_due = state.step % settings.checkpoint_every == 0 or last
        values: dict[str, float] = {}

        if (
            state.step % settings.log_every == 0
            or state.step % settings.checkpoint_every == 0
            or state.step == settings.steps
        ):
            gc.collect(1)
            values |= {
                "train/loss": outcome.loss,
                "train/lr": rate,
                "train/grad_norm": _gradient_norm(engine),
                "train/tokens_per_second": throughput.read(),
                "train/skipped_steps": float(state.skipped_steps),
                "train/spikes": float(state.guard.spikes),
                "data/epoch": state.sequences_consumed / data.num_sequences,
                "data/tokens": float(state.tokens_consumed),
                "data/left_out_sequences": float(state.sequences_left_out),
                **measures.gather(),
            }
            if peak is not None:
                flops = values["train/tokens_per_second"] * model.flops_per_token(training=True)
                values["train/mfu"] = flops / (peak * world)
            if settings.freeze_g is not None:
                values["invariance/frozen"] = float(state.frozen is not None)
            if config.model.g_source == "learned":
                values["invariance/budget"] = state.budget
            if outcome.skipped:
                del values["train/loss"], values["train/grad_norm"]

        if state.step % settings.validate_every == 0 or state.step == settings.steps:
            heart.at(state.step, "validate")
            with throughput.pause():
                values |= validate(
                    engine, model, held_out, batch_size=settings.micro_batch, bytes_per_token=bytes_per_token
                )
            cached = values["val/loss_cached"]
            state.calm_evaluations = calm(settings, state.calm_evaluations, values.get("invariance/order_parameter_G"))
            state.val_loss_cached, state.val_step = cached if math.isfinite(cached) else None, state.step

        try:
            event = judge(state.guard, settings, state.step, outcome, values, ids)
        except UserError:  # the same on every rank
            saver.settle()
            raise
        if event is not None:
            values["train/spikes"] = float(state.guard.spikes)
            _warn(progress, told(event))
        if values:
            _report(tracker, progress, state.step, values)
        if event is not None and event["action"] == "rollback":
            _warn(progress, saver.settle())
            target = checkpoint_to_go_back_to(paths.checkpoints, state.guard, state.step)
            if target is not None:
                engine, earlier = roll_back(engine, config, target, state)
                saver.engine = engine
                state = earlier
                _tell(progress, f"rolled back to step {state.step}; goes on at position {state.sequences_consumed}")
                continue
            _warn(progress, "there is no checkpoint to roll back to; training goes on")
        freezes = is_to_freeze()
        if checkpoint_due or freezes or state.step - 1 == state.frozen:
            heart.at(state.step, "save")
            with throughput.pause():
                try:
                    _warn(progress, saver.save(record(config, state, lineage, freezes=freezes), wait=last or freezes))
                except UserError as error:  # on every rank: a full disk, say
                    if last:
                        raise
                    _warn(progress, f"{error}; training goes on, earlier checkpoints are kept")
                    no_freeze_before = state.step + settings.checkpoint_every
        if stopped is not None:
            break

    profiler.close()
    heart.at(state.step, "end")
    if progress is not None:
        progress.end(state.step, stop=stopped)
    return state


def _committed(config: RunConfig, folder: Path, publisher: Publisher | None, step: int) -> None:
    """On rank 0, which has the publisher where there is one."""
    if publisher is not None:
        publisher.saved(step)
    else:
        retain(folder, policy_of(config.train), now=step)


def _gradient_norm(engine: Any) -> float:
    norm = engine.get_global_grad_norm()
    return gradient_norm(engine.optimizer) if norm is None else float(norm)


def _warn(progress: Progress | None, text: str | None) -> None:
    if text is not None:
        _tell(progress, f"warning: {text}")


def _tell(progress: Progress | None, text: str) -> None:
    if progress is not None:
        progress.event(text)
        log.warning("%s", text)


def _report(tracker: Tracker | None, progress: Progress | None, step: int, values: dict[str, float]) -> None:
    if tracker is not None:
        tracker.log(step, values)
    if progress is not None:
        progress.update(step, values)
