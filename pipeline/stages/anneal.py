"""`--anneal-from CHECKPOINT`: the decay of a WSD schedule as a run of its own, while the run that it branches from goes on.

The branch is what an uninterrupted WSD run would be whose stable part ends at the checkpoint: its configuration is the given
one with `train.schedule=wsd`, and with `train.steps` and `train.decay_share` such that the decay begins there.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.checkpoint.format import is_checkpoint_name, newest_in, read_state, step_of
from pipeline.config.continued import schedule_before, stable_until
from pipeline.config.load import load_config
from pipeline.config.paths import RunPaths, expanded
from pipeline.config.run import RunConfig
from pipeline.errors import ConfigError, UserError, first_line
from pipeline.io.sealed import read_sealed
from pipeline.io.storage import publish_bytes
from pipeline.stages.borrow import with_data_of
from pipeline.stages.compatible import Report
from pipeline.stages.resume import AUTO, ORIGIN
from pipeline.stages.runner import LOCK
from pipeline.tracking.client import client, tracking_uri
from pipeline.tracking.default_store import RUN_DIR_TAG
from pipeline.tracking.publish import fetch_checkpoint
from pipeline.tracking.run import known_run

OF_BRANCH = ("name", "run_dir", "train.steps", "train.schedule", "train.decay_share", "train.decay_shape")
FETCHED = "annealed"  # in the branch's run directory: the checkpoint, where only MLflow has it


@dataclass(frozen=True)
class Branch:
    """A decay: its configuration, where it begins, the state.json there (or of its own newest checkpoint), and the `--resume`
    that it stands for."""

    config: RunConfig
    checkpoint: Path
    state: dict[str, Any]
    resume: str


def branch(file: str, overrides: Sequence[str], text: str, report: Report, *, fetch: bool = True) -> Branch:
    """The run that `--anneal-from` begins, or continues. `overrides`: of the branch; those of OF_BRANCH are not of the run it
    branches from. fetch: whether a checkpoint that only MLflow has is brought here.

    Raises UserError or ConfigError, one line, for a checkpoint that is not there or not in the stable part of a schedule.
    """
    given = {key: value for key, _, value in (override.partition("=") for override in overrides)}
    if given.get("train.schedule", "wsd") != "wsd":
        raise ConfigError(f"--anneal-from: decays as wsd does; remove train.schedule={given['train.schedule']}")
    if {"train.steps", "train.decay_share"} <= given.keys():
        raise ConfigError(
            "--anneal-from: train.steps and train.decay_share both say how long it decays; give one of them"
        )
    shared = [override for override in overrides if override.partition("=")[0] not in OF_BRANCH]
    parent = load_config(file, shared)
    name, run_id = _name_of(text)
    step = step_of(Path(name))
    where = {"name": f"{parent.name}-anneal-{step}", "run_dir": f"{_home(text, parent)}-anneal-{step}"} | given
    paths = RunPaths(where["run_dir"])
    begun, home = _begun(paths), None
    if begun is not None and begun.name == name:
        checkpoint = begun
    elif run_id is not None:
        checkpoint, home = _of_run(run_id, name, parent, paths if fetch else None, report)
    else:
        checkpoint = RunPaths(parent.run_dir).checkpoints / name if text == name else expanded(text, "--anneal-from")
    if checkpoint.parent == paths.checkpoints:
        raise ConfigError(
            f"--anneal-from {text}: begins a run of its own; set run_dir to another one than the checkpoint's"
        )
    if checkpoint == begun:
        adopted = newest_in(paths.root)
        state = {} if adopted is None else read_state(adopted)
    else:
        state = _stable(checkpoint, parent)
    if "train.steps" in given:
        steps = load_config(file, [*shared, f"train.steps={given['train.steps']}"]).train.steps
    else:
        share = float(given.get("train.decay_share", parent.train.decay_share))
        if not 0 < share < 1:
            raise ConfigError(f"--anneal-from: train.decay_share={share:g}: must be between 0 and 1")
        steps = max(step + 1, round(step / (1 - share)))
    if steps <= step:
        raise ConfigError(
            f"--anneal-from {text}: train.steps={steps} counts from the first step; more than {step} are needed"
        )
    decay = {"train.schedule": "wsd", "train.steps": str(steps), "train.decay_share": repr((steps - step) / steps)}
    config = load_config(file, [f"{key}={value}" for key, value in (given | where | decay).items()])
    assert config.train.decay_begins == step
    if home is not None:
        config = with_data_of(config, home, report)
    return Branch(config, checkpoint, state, AUTO if checkpoint == begun else str(checkpoint))


def _name_of(text: str) -> tuple[str, str | None]:
    """The name of the checkpoint, and the MLflow run that it is named of."""
    match = re.fullmatch(r"runs:/([A-Za-z0-9_-]+)/checkpoints/(step-\d{6,})/?", text)
    name = match[2] if match else Path(text).name
    if not is_checkpoint_name(name) or (match is None and text.startswith("runs:")):
        raise ConfigError(
            f"--anneal-from {text}: name one checkpoint: step-003000, its path, or runs:/RUN_ID/checkpoints/step-003000"
        )
    return name, match[1] if match else None


def _home(text: str, parent: RunConfig) -> str:
    """The run directory of the run that is branched from, as far as its name tells."""
    folder = Path(text).parent
    if text.startswith("runs:") or folder.name != "checkpoints":
        return parent.run_dir.rstrip("/")
    home = folder.parent
    return str(home if home.name not in ("", "..") else home.resolve())


def _begun(paths: RunPaths) -> Path | None:
    """The checkpoint that a run directory began with."""
    try:
        return Path(read_sealed(paths.root / ORIGIN)["checkpoint"])
    except (UserError, OSError, KeyError, TypeError):
        return None


def _of_run(
    run_id: str, name: str, parent: RunConfig, paths: RunPaths | None, report: Report
) -> tuple[Path, Path | None]:
    """A checkpoint of an MLflow run: where that was trained, or fetched into the branch's run directory (None: not at all); and
    the run directory where it was trained, if that is here."""
    own = known_run(parent, RunPaths(parent.run_dir))
    homes = [RunPaths(parent.run_dir)] if own is not None and own.record.answers_to(run_id) else []
    try:
        tags = client(tracking_uri(parent)).get_run(run_id).data.tags if not homes else {}
        homes += [RunPaths(tags[RUN_DIR_TAG])] if RUN_DIR_TAG in tags else []
        for home in homes:
            if (home.checkpoints / name).is_dir():
                return home.checkpoints / name, home.root
        if paths is None:
            raise UserError("it is not on this machine; `pldr train` brings it")
        paths.root.mkdir(parents=True, exist_ok=True)
        publish_bytes(paths.root / LOCK, b"")  # a run directory, which the fetched one may be in
        fetched = fetch_checkpoint(tracking_uri(parent), run_id, name, paths.root / FETCHED)
    except Exception as error:
        raise UserError(
            f"--anneal-from runs:/{run_id}/checkpoints/{name}: cannot be fetched: {first_line(error)}"
        ) from error
    report(f"{name} of MLflow run {run_id} fetched")
    return fetched, next((home.root for home in homes if home.root.is_dir()), None)


def _stable(checkpoint: Path, parent: RunConfig) -> dict[str, Any]:
    """The state.json of a checkpoint. Raises ConfigError unless the rate there is that of a stable part."""
    if not checkpoint.is_dir():
        raise ConfigError(
            f"--anneal-from: {checkpoint}: no such checkpoint; `pldr runs CONFIG` lists those of a run, and a run directory "
            "that the YAML does not name takes a path (run_dir=… on the command line is the branch's)"
        )
    state = read_state(checkpoint)
    step, train = state["step"], schedule_before(state["config"]["train"], parent.train)
    if stable_until(train, step) is not None:
        return state
    if train.schedule == "cosine":
        raise ConfigError(
            f"--anneal-from: {checkpoint}: was trained with a cosine schedule, which has no stable part to decay from; train "
            "with train.schedule=wsd or constant"
        )
    stable = f"from {train.warmup_steps} to {train.decay_begins if train.schedule == 'wsd' else train.steps}"
    raise ConfigError(
        f"--anneal-from: {checkpoint}: step {step} is not in the stable part, {stable}; name a checkpoint there"
    )
