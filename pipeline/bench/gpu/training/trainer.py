"""The trainer on token tars: how long it waits for data, what a checkpoint costs, and whether a resumed run is bit-equal."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.bench.gpu.training.corpus import tokens_folder
from pipeline.bench.gpu.training.ours import join, recipe
from pipeline.bench.gpu.training.setting import TrainSetting

Found = Iterator[dict[str, Any]]
STALL = 0.01  # of training, for checkpoints
HELD_OUT = 3
SAVES = 2
RESUMED = (2, 4)  # steps: of the checkpoint, and of the end


class Recorder:
    """In place of MLflow's tracker."""

    def __init__(self) -> None:
        self.points: dict[int, dict[str, float]] = {}

    def log(self, step: int, values: dict[str, float]) -> None:
        self.points.setdefault(step, {}).update(values)


def trainer(setting: TrainSetting) -> Found:
    """Waiting for data as a share of a step, with the recipe's global batch; a save over the recipe's `checkpoint_every` steps.
    The tars were written a moment ago, so the operating system has them in memory; the loader hashes them all the same.
    """
    join(setting.device)
    every = setting.trained // SAVES
    recorder, saves, made, where = _train(setting, "trainer", steps=setting.trained, checkpoint_every=every)
    config = made.config
    half = setting.trained // 2  # the first steps load kernels
    points = [values for step, values in recorder.points.items() if step > half and "train/tokens_per_second" in values]
    batch = config.train.global_batch * config.model.context_length
    step_s = statistics.median(batch / values["train/tokens_per_second"] for values in points)
    wait_s = statistics.median(values["system/data_wait_seconds"] for values in points)
    yield {
        "what": "loader",
        "tokens": where,
        "global_batch": config.train.global_batch,
        "micro_batch": config.train.micro_batch,
        "step_ms": 1e3 * step_s,
        "wait_ms": 1e3 * wait_s,
        "share": wait_s / step_s,
    }
    configured, save_s = recipe(config.model, setting.work).train.checkpoint_every, statistics.median(saves)
    nbytes = sum(file.stat().st_size for file in _checkpoint(made.checkpoints, setting.trained).rglob("*"))
    yield {
        "what": "checkpoint",
        "save_s": save_s,
        "saves_s": saves,
        "bytes": nbytes,
        "mb_per_second": nbytes / save_s / 1e6,
        "checkpoint_every": configured,
        "stall": save_s / (configured * step_s),
        "checkpoint_every_for_one_percent": -(-save_s // (STALL * step_s)),
    }


def resume(setting: TrainSetting) -> Found:
    """Trains, and again from a checkpoint on the way: the same losses and the same weights, bit for bit, in bf16."""
    from pipeline.train.backend import set_up

    at, end = RESUMED
    keys: dict[str, Any] = {"steps": end, "checkpoint_every": at, "log_every": 1, "deterministic": True}
    set_up(recipe(next(iter(setting.models.values())), setting.work, deterministic=True).train, setting.work)
    join(setting.device)
    straight, _, made, _ = _train(setting, "resume", **keys)
    expected = [p.detach().clone() for p in made.engine.module.parameters()]
    start = _checkpoint(made.checkpoints, at)
    del made
    resumed, _, again, _ = _train(setting, "resume", start=start, **keys)
    pairs = zip(expected, again.engine.module.parameters(), strict=True)
    losses = {
        step: (straight.points[step]["train/loss"], resumed.points[step]["train/loss"]) for step in resumed.points
    }
    differing = sum(not one.equal(other) for one, other in pairs)
    yield {
        "what": "resume",
        "losses": losses,
        "tensors_that_differ": differing,
        "bit_equal": not differing and all(one == other for one, other in losses.values()),
    }


def _train(
    setting: TrainSetting, name: str, *, steps: int, start: Path | None = None, **keys: Any
) -> tuple[Recorder, list[float], Any, str]:
    """Train the first model; what was logged, the seconds of each save, the trainer, and where its tokens come from."""
    from pipeline.config.paths import RunPaths
    from pipeline.data.loading.loader import TrainLoader
    from pipeline.data.loading.reader import open_split
    from pipeline.data.tokens.index import TokenIndex
    from pipeline.train.state import Lineage
    from pipeline.train.trainer import Trainer

    model = next(iter(setting.models.values()))
    folder, where = tokens_folder(setting)
    batch = {} if setting.device.type == "cuda" else {"global_batch": 4}
    whole = recipe(model, setting.work / name, **batch).train.global_batch
    sizes = {**batch, "micro_batch": min(whole, setting.micro_batch(next(iter(setting.models))))}
    config = recipe(
        model,
        setting.work / name,
        **{"log_every": 5, "validate_every": steps, "val_sequences": HELD_OUT - 1, "warmup_steps": 1, **sizes, **keys},
        steps=steps,
    )
    index, paths = TokenIndex.load(folder), RunPaths(config.run_dir)
    paths.checkpoints.mkdir(parents=True, exist_ok=True)
    reader = open_split(index, "train", cache_gigabytes=config.data.cache_gigabytes)
    loader = TrainLoader(
        reader,
        seed=config.seed,
        global_batch=config.train.global_batch,
        micro_batch=config.train.micro_batch,
        rank=0,
        world_size=1,
    )
    saves: list[float] = []

    class Timed(Trainer):
        def _save(self) -> None:
            started = time.perf_counter()
            super()._save()
            saves.append(time.perf_counter() - started)

    recorder: Any = Recorder()
    made = Timed(
        config,
        paths,
        loader,
        reader.read(np.arange(HELD_OUT)),
        bytes_per_token=1.0,
        lineage=Lineage(index.fingerprint, index.tokenizer_sha256, name),
        tracker=recorder,
        resume_from=start,
    )
    made.train()
    return recorder, saves, made, where


def _checkpoint(folder: Path, step: int) -> Path:
    from pipeline.checkpoint.format import checkpoint_name

    return folder / checkpoint_name(step)
