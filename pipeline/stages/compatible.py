"""Whether training may resume from a checkpoint with today's configuration, data and tokenizer, and what has changed since."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

from pipeline.checkpoint.format import committed, model_of, read_state, step_of
from pipeline.config.continued import schedule_before, stable_until
from pipeline.config.keys import added_defaults, is_of_training
from pipeline.config.paths import RunPaths
from pipeline.config.run import RunConfig, flatten
from pipeline.config.train import TrainConfig
from pipeline.errors import ConfigError, UserError
from pipeline.io import storage
from pldr_model.config import ModelConfig

Report = Callable[[str], None]  # gets a line for the user
State = dict[str, Any]  # a checkpoint's state.json


def require_newest(resume_from: Path | None, paths: RunPaths) -> None:
    """A job file is for one start: a second one (a scheduler's requeue) would train again what was committed since.

    Raises ConfigError when the run directory holds a later committed checkpoint than the one that the job begins with.
    """
    done = committed(paths.checkpoints)
    if done and step_of(done[-1]) > (0 if resume_from is None else step_of(resume_from)):
        where = "the beginning" if resume_from is None else resume_from.name
        raise ConfigError(
            f"{paths.logs / 'job.json'}: begins at {where}, but {done[-1].name} is committed since; make it again with "
            "`pldr train CONFIG --prepare RANKS` before each start"
        )


def check_inputs(
    checkpoint: Path, state: State, config: RunConfig, today: dict[str, str], *, force: bool, report: Report
) -> None:
    """A checkpoint continues with the data, tokenizer and model it was trained with; with others only when `force` is given.

    today: this run directory's data_fingerprint and tokenizer_sha256. Raises ConfigError naming the first difference.
    """
    model = config.as_dict()["model"]
    # A key that did not exist when the checkpoint was saved had its default's meaning.
    before = {f.name: f.default for f in fields(ModelConfig)} | state["config"].get("model", {})
    differ = [f"{k} {state[k][:12]}, now {ours[:12]}" for k, ours in today.items() if state[k] != ours]
    differ += [f"model.{k}={before.get(k)}, now {v}" for k, v in model.items() if before.get(k) != v]
    if differ and not force:
        raise ConfigError(
            f"{checkpoint}: was trained with {differ[0]}; use another run_dir, or continue anyway with --force"
        )
    earlier = state["config"].get("train", {}).get("optimizer", "adamw")
    if earlier != config.train.optimizer:
        raise ConfigError(
            f"{checkpoint}: its moments are {earlier}'s; set train.optimizer={earlier}, or begin with its weights alone "
            "(train.init_from)"
        )
    rule, become = config.train.freeze_g, model_of(state)["g_source"]
    if state.get("frozen") is not None and (rule is None or config.trained_model(frozen=True).g_source != become):
        was = "constant" if become == "file" else "parameter"
        raise ConfigError(
            f"{checkpoint}: its G is frozen; set train.freeze_g.become to {was} as it was, or take a checkpoint of "
            f"step {state['frozen']} or before"
        )
    for difference in differ:
        report(f"FORCED      {checkpoint.name} was trained with {difference}")


def newest_stable(folder: Path, train: TrainConfig) -> Path | None:
    """The newest checkpoint in the stable part of the WSD schedule that it was trained with, from where `train` goes on at the
    same rate; None where there is none, or the newest is it."""
    found = committed(folder)
    for checkpoint in reversed(found):
        with contextlib.suppress(UserError, OSError, KeyError, TypeError):  # damaged: not one to name
            state = read_state(checkpoint)
            before = schedule_before(state["config"]["train"], train)
            if before.schedule != "wsd":
                return None
            if stable_until(before, state["step"]) is not None and stable_until(train, state["step"]) is not None:
                return None if checkpoint == found[-1] else checkpoint
    return None


def changes(state: State, config: RunConfig, ranks: int) -> dict[str, str]:
    """`key -> "old -> new"` of every setting of the training that is not as it was when the checkpoint was saved."""
    today = json.loads(storage.canonical_json(config.as_dict()))  # keys in the order of state.json, also inside lists
    # A key that did not exist when the checkpoint was saved had its default's meaning.
    before = {**flatten(added_defaults()), **flatten(state["config"]), "train.ranks": str(state["world_size"])}
    now = {**flatten(today), "train.ranks": str(ranks)}
    keys = [key for key in {**before, **now} if is_of_training(key) and before.get(key) != now.get(key)]
    return {key: f"{before.get(key, 'absent')} -> {now.get(key, 'absent')}" for key in keys}
