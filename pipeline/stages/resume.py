"""Where a run goes on: what `--resume` names, whether that checkpoint fits today's configuration, and what has changed.

    auto                                  this run directory's run, from its newest, be it here or published
    RUN_ID, runs:/RUN_ID                  that MLflow run, from its newest, be it here or published
    runs:/RUN_ID/checkpoints/step-000500  that run, back at that checkpoint
    PATH                                  a checkpoint, a folder of checkpoints, or a run directory

Decision: a checkpoint that is named, of this run directory's own run, takes the run back to it. Later checkpoints would be
taken for newer ones at the next start: local ones are renamed `.later-step-…` (what was renamed before is replaced), published
ones are removed. Metrics up to where the run had come stay as they are.
Decision: a PATH outside of the run directory begins a run of its own, with its own parameters, that goes on from there. The
checkpoint is linked (else copied) into the run directory first, so that a second start finds it, or a newer one, also
with `auto`.
"""

from __future__ import annotations

import contextlib
import json
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from pipeline.checkpoint.format import STATE, adopt, clean, committed, model_of, set_aside, step_of, verify
from pipeline.config.keys import is_of_training
from pipeline.config.paths import RunPaths
from pipeline.config.run import RunConfig, flatten
from pipeline.errors import ConfigError, UserError, first_line
from pipeline.io import storage
from pipeline.tracking import outbox, publish, run, run_record
from pipeline.tracking.stores import Place
from pldr_model.config import ModelConfig

Say = Callable[[str], None]
State = dict[str, Any]  # a checkpoint's state.json
Check = Callable[[Path, State], None]  # raises ConfigError when a checkpoint is not to be gone on with
SCHEMA_VERSION = 1
ORIGIN = "continued_from.json"  # in the run directory: the checkpoint of another run that this one began with
AUTO = "auto"


@dataclass(frozen=True)
class Resume:
    """What `--resume` names: nothing (auto), a run, one checkpoint of a run, or a folder."""

    run_id: str | None = None
    checkpoint: str | None = None
    path: Path | None = None


@dataclass(frozen=True)
class Start:
    """The MLflow run to log to, the checkpoint to go on from (None: step 0) and its state.json."""

    run_id: str
    checkpoint: Path | None
    state: State


def parse_resume(text: str) -> Resume:
    """Read the argument of `--resume`. Raises ConfigError when it has no known form or names no folder."""
    if text == AUTO:
        return Resume()
    if text.startswith("runs:"):
        match = re.fullmatch(r"runs:/([A-Za-z0-9_-]+)(?:/checkpoints/(step-\d{6,}))?/?", text)
        if match is None:
            raise ConfigError(f"--resume {text}: write runs:/RUN_ID or runs:/RUN_ID/checkpoints/step-000500")
        return Resume(run_id=match[1], checkpoint=match[2])
    if "/" in text or (text and Path(text).is_dir()):
        path = Path(text).expanduser().absolute()
        if not path.is_dir():
            raise ConfigError(f"--resume {text}: no such folder; name a checkpoint, its folder, or an MLflow run id")
        return Resume(path=path)
    if re.fullmatch(r"[A-Za-z0-9_-]+", text) is None:
        raise ConfigError(f"--resume {text}: neither auto, nor an MLflow run id, nor a folder")
    return Resume(run_id=text)


def names_run(text: str, run_id: str | None) -> bool:
    """Whether `--resume` asks for no more than that this run be complete."""
    return text == AUTO or (run_id is not None and text.rstrip("/") in (run_id, f"runs:/{run_id}"))


def find_start(config: RunConfig, paths: RunPaths, text: str, *, today: dict[str, str], force: bool, say: Say) -> Start:
    """Open the MLflow run that `--resume` asks for and find where it goes on. Damaged checkpoints are passed over, loudly,
    unless they are named. A checkpoint of other data, tokenizer (today: this run directory's data_fingerprint and
    tokenizer_sha256) or model is refused before anything is changed, unless `force`.

    Raises UserError or ConfigError, one line.
    """

    def check(checkpoint: Path, state: State) -> None:
        if state["step"] > config.train.steps:
            raise ConfigError(
                f"{checkpoint}: is past train.steps {config.train.steps}; raise it or resume from an earlier one"
            )
        check_inputs(checkpoint, state, config, today, force=force, say=say)

    resume = parse_resume(text)
    named, run_id = resume.checkpoint, resume.run_id
    if resume.path is not None:
        source = _checkpoint_in(resume.path, say)
        if source.parent != paths.checkpoints:
            return _begin_from(source, config, paths, check, force=force, say=say)
        if source == resume.path:  # the folder alone, or the run directory, is what auto means
            named = source.name
    with run_record.forgotten_when_refused(config) if run_id is not None else contextlib.nullcontext():
        run_id = run.open_run(config, run_id=run_id, force=force)
        clean(paths.checkpoints)
        _require_no_other(config, paths, run_id)
        if named is not None:
            return _go_back(config, paths, run_id, named, check, say=say)
        found = _newest(config, paths, run_id, check, say=say)
        if found is None and resume.run_id is not None:
            raise UserError(f"MLflow run {run_id} has no committed checkpoint; start without --resume {text}")
        return Start(run_id, None, {}) if found is None else Start(run_id, *found)


def require_newest(resume_from: Path | None, paths: RunPaths) -> None:
    """A job file is for one start: given to a second one (a scheduler's requeue) it would train again what is committed since.

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
    checkpoint: Path, state: State, config: RunConfig, today: dict[str, str], *, force: bool, say: Say
) -> None:
    """A checkpoint goes on with the data, tokenizer and model it was trained with, or not at all; `force`: all the same.

    Raises ConfigError naming the first difference.
    """
    model = config.as_dict()["model"]
    # A key that did not exist when the checkpoint was saved had its default's meaning.
    before = {f.name: f.default for f in fields(ModelConfig)} | state["config"].get("model", {})
    differ = [f"{k} {state[k][:12]}, now {ours[:12]}" for k, ours in today.items() if state[k] != ours]
    differ += [f"model.{k}={before.get(k)}, now {v}" for k, v in model.items() if before.get(k) != v]
    if differ and not force:
        raise ConfigError(
            f"{checkpoint}: was trained with {differ[0]}; use another run_dir, or go on all the same with --force"
        )
    rule, become = config.train.freeze_g, model_of(state)["g_source"]
    if state.get("frozen") is not None and (rule is None or config.trained_model(frozen=True).g_source != become):
        was = "constant" if become == "file" else "parameter"
        raise ConfigError(
            f"{checkpoint}: its G is frozen; set train.freeze_g.become to {was} as it was, or take a checkpoint of "
            f"step {state['frozen']} or before"
        )
    for difference in differ:
        say(f"FORCED      {checkpoint.name} was trained with {difference}")


def changes(start: Start, config: RunConfig, ranks: int) -> dict[str, str]:
    """`key -> "old -> new"` of every setting of the training that is not as it was when the checkpoint was saved."""
    if start.checkpoint is None:
        return {}
    today = json.loads(storage.canonical_json(config.as_dict()))  # keys in the order of state.json, also inside lists
    before = {**flatten(start.state["config"]), "train.ranks": str(start.state["world_size"])}
    now = {**flatten(today), "train.ranks": str(ranks)}
    keys = [key for key in {**before, **now} if is_of_training(key) and before.get(key) != now.get(key)]
    return {key: f"{before.get(key, 'absent')} -> {now.get(key, 'absent')}" for key in keys}


def _checkpoint_in(path: Path, say: Say) -> Path:
    """The checkpoint that a folder is, or the newest one in it that is whole."""
    if re.fullmatch(r"step-\d{6,}", path.name):
        verify(path)
        return path
    folders = [path, path / "checkpoints"]
    for candidate in [c for folder in folders for c in reversed(committed(folder))]:
        try:
            verify(candidate)
            return candidate
        except UserError as error:
            say(f"{candidate.name} is damaged and left out: {error}")
    raise UserError(f"--resume {path}: no committed checkpoint in it; name a folder step-… that has COMMITTED")


def _begin_from(source: Path, config: RunConfig, paths: RunPaths, check: Check, *, force: bool, say: Say) -> Start:
    """Another run's checkpoint: a run of this directory's own goes on from it."""
    sha256, own = storage.sha256_file(source / storage.MANIFEST), committed(paths.checkpoints)
    origin = paths.root / ORIGIN
    known = storage.read_json(origin, schema_version=SCHEMA_VERSION) if origin.exists() else {}
    if own and known.get("manifest_sha256") != sha256:
        raise ConfigError(
            f"{paths.root}: holds {own[-1].name} of a run that did not begin with {source}; use another run_dir, or "
            "--resume auto to go on with it"
        )
    state = verify(source)
    if not own:
        check(source, state)
    run_id = run.open_run(config, force=force)
    clean(paths.checkpoints)
    if not own:
        facts = {"schema_version": SCHEMA_VERSION, "checkpoint": str(source), "manifest_sha256": sha256}
        storage.publish_json(origin, {**facts, "mlflow_run_id": state["mlflow_run_id"]})
        adopt(source, paths.checkpoints, mlflow_run_id=run_id)
        outbox.set_tags(config, run_id, {"pldr.continued_from": str(source)})
        say(f"{source} begins this run; it goes on from step {step_of(source)}")
    found = _newest(config, paths, run_id, check if own else None, say=say)
    assert found is not None
    return Start(run_id, *found)


def _go_back(config: RunConfig, paths: RunPaths, run_id: str, name: str, check: Check, *, say: Say) -> Start:
    """One named checkpoint of the run; what is later is no longer taken for the run's."""
    target = paths.checkpoints / name
    place, published = publish.available(config, run_id)
    if target not in committed(paths.checkpoints):
        if place is None or name not in published:
            raise UserError(f"MLflow run {run_id} has no committed checkpoint {name}; it has {published or 'none'}")
        try:
            _fetch(place, name, paths, check)
        except _Damaged as error:
            raise UserError(f"{name} in {place}: {error}") from error
        say(f"{name} fetched from {place}")
    state = verify(target)
    check(target, state)
    later = [c for c in committed(paths.checkpoints) if step_of(c) > step_of(target)]
    for checkpoint in later:
        set_aside(checkpoint, "later")
    withdrawn = [p for p in published if step_of(Path(p)) > step_of(target)]
    for gone in withdrawn:
        assert place is not None
        place.remove(gone)
    names = sorted({c.name for c in later} | set(withdrawn))
    if names:
        say(f"back at {name}: {', '.join(names)} set aside; local ones are kept as .later-…")
    return Start(run_id, target, state)


def _newest(
    config: RunConfig, paths: RunPaths, run_id: str, check: Check | None, *, say: Say
) -> tuple[Path, State] | None:
    """The newest committed checkpoint of the run that is whole, checked. None: step 0.

    One that is here is taken before its published copy; a later one, from another machine, before both. With the place away
    what is here is taken, and said.
    """
    here = committed(paths.checkpoints)
    away: UserError | None = None
    place, published = None, list[str]()
    try:
        place, published = publish.available(config, run_id)
    except UserError as error:
        away = error
    for name in sorted({c.name for c in here} | set(published), key=lambda name: step_of(Path(name)), reverse=True):
        candidate = paths.checkpoints / name
        if candidate in here:
            try:
                state = _whole(candidate)
            except _Damaged as error:
                say(f"{name} is damaged and left out: {error}")
                set_aside(candidate)
            else:
                if check is not None:
                    check(candidate, state)
                if away is not None:
                    say(f"it is not known whether another machine went on from {name}: {away}")
                return candidate, state
        if name in published:
            assert place is not None
            try:
                found = _fetch(place, name, paths, check)
            except _Damaged as error:
                say(f"{name} in {place} is damaged and left out: {error}")
            else:
                later = bool(here) and step_of(found[0]) > step_of(here[-1])
                why = f": the run is further than {here[-1].name} here" if later else ""
                say(f"{name} fetched from {place}{why}")
                return found
    if away is not None:
        raise away
    return None


class _Damaged(Exception):
    """A checkpoint that is not as it was written."""


def _whole(checkpoint: Path) -> State:
    try:
        return verify(checkpoint)
    except UserError as error:
        raise _Damaged(str(error)) from error


def _fetch(place: Place, name: str, paths: RunPaths, check: Check | None) -> tuple[Path, State]:
    """A published checkpoint, brought here; nothing of it stays when it is damaged or refused."""
    try:
        fetched = publish.fetch(place, name, paths.checkpoints)
    except Exception as error:
        raise UserError(f"{name} could not be fetched from {place}: {first_line(error)}; start again") from error
    try:
        state = _whole(fetched)
        if check is not None:
            check(fetched, state)
    except BaseException:
        shutil.rmtree(fetched, ignore_errors=True)
        raise
    return fetched, state


def _require_no_other(config: RunConfig, paths: RunPaths, run_id: str) -> None:
    """All checkpoints here are of this run: none is brought in, or set aside, beside another run's."""
    for checkpoint in committed(paths.checkpoints):
        try:
            owner = storage.read_json(checkpoint / STATE)["mlflow_run_id"]
        except (UserError, TypeError, KeyError):  # damaged: told where it would be taken
            continue
        if not run.same_run(config, owner, run_id):
            raise ConfigError(
                f"{checkpoint}: belongs to MLflow run {owner}, not to {run_id}; use another run_dir, or go on with "
                f"--resume {owner}"
            )
