"""Where a run continues: what `--resume` names, and the checkpoint that it leads to.

    auto                                  this run directory's run, from its newest, local or published
    RUN_ID, runs:/RUN_ID                  that MLflow run, from its newest, local or published
    runs:/RUN_ID/checkpoints/step-000500  that run, back at that checkpoint
    PATH                                  a checkpoint, a folder of checkpoints, or a run directory

Decision: a checkpoint that is named, of this run directory's own run, takes the run back to it. Later checkpoints would be
taken for newer ones at the next start: local ones are renamed `.later-step-…` (what was renamed before is replaced), published
ones are removed. Metrics that the run had logged stay as they are.
Decision: a PATH outside of the run directory begins a run of its own, with its own parameters, that continues from there. The
checkpoint is linked (else copied) into the run directory first, so that a second start finds it, or a newer one, also
with `auto`.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from pipeline.checkpoint.format import STATE, adopt, clean, committed, removed, set_aside, step_of, verify
from pipeline.config.paths import RunPaths, expanded
from pipeline.config.run import RunConfig
from pipeline.errors import ConfigError, UserError, first_line
from pipeline.io import storage
from pipeline.io.sealed import publish_sealed, read_sealed
from pipeline.stages.compatible import Report, State, check_inputs
from pipeline.tracking import outbox, publish
from pipeline.tracking.run import TrackedRun, open_run
from pipeline.tracking.run_record import CONTINUED_TAG, restored_when_refused
from pipeline.tracking.stores import CheckpointStore

Check = Callable[[Path, State], None]  # raises ConfigError when training must not resume from a checkpoint
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
    """The run to log to, the checkpoint to resume from (None: step 0) and its state.json."""

    run: TrackedRun
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
        path = expanded(text, "--resume")
        if not path.is_dir():
            raise ConfigError(f"--resume {text}: no such folder; name a checkpoint, its folder, or an MLflow run id")
        return Resume(path=path)
    if re.fullmatch(r"[A-Za-z0-9_-]+", text) is None:
        raise ConfigError(f"--resume {text}: neither auto, nor an MLflow run id, nor a folder")
    return Resume(run_id=text)


def names_run(text: str, run_id: str | None) -> bool:
    """Whether `--resume` names just this run, so that nothing is left to do when it is complete."""
    return text == AUTO or (run_id is not None and text.rstrip("/") in (run_id, f"runs:/{run_id}"))


def find_start(
    config: RunConfig, paths: RunPaths, text: str, *, today: dict[str, str], force: bool, report: Report
) -> Start:
    """Open the MLflow run that `--resume` asks for and find where it continues. Damaged checkpoints are left out, with a
    report, unless they are named. A checkpoint of other data, tokenizer (today: this run directory's data_fingerprint and
    tokenizer_sha256) or model is refused before anything is changed, unless `force`.

    Raises UserError or ConfigError, one line.
    """

    def check(checkpoint: Path, state: State) -> None:
        if state["step"] > config.train.steps:
            raise ConfigError(
                f"{checkpoint}: is past train.steps {config.train.steps}; raise it or resume from an earlier one"
            )
        check_inputs(checkpoint, state, config, today, force=force, report=report)

    resume = parse_resume(text)
    named, run_id = resume.checkpoint, resume.run_id
    if resume.path is not None:
        source = _checkpoint_in(resume.path, report)
        if not _same(source.parent, paths.checkpoints):
            return _begin_from(source, config, paths, check, force=force, report=report)
        if _same(source, resume.path):  # the folder alone, or the run directory, is what auto means
            named = source.name
    with restored_when_refused(paths) if run_id is not None else contextlib.nullcontext():
        run = open_run(config, paths, run_id=run_id, force=force)
        clean(paths.checkpoints)
        _require_no_other(run)
        if named is not None:
            return _roll_back(run, named, check, report)
        found = _newest(run, check, report)
        if found is None and resume.run_id is not None:
            raise UserError(f"MLflow run {run.id} has no committed checkpoint; start without --resume {text}")
        return Start(run, None, {}) if found is None else Start(run, *found)


def _checkpoint_in(path: Path, report: Report) -> Path:
    """The checkpoint that a folder is, or the newest intact one in it."""
    if re.fullmatch(r"step-\d{6,}", path.name):
        verify(path)
        return path
    folders, seen = [path, path / "checkpoints"], set[Path]()
    while found := [c for folder in folders for c in reversed(committed(folder)) if c not in seen]:
        for candidate in found:  # if its run is still training, there may be newer ones by then
            try:
                verify(candidate)
                return candidate
            except UserError as error:
                report(f"{candidate.name} is left out: {error}")
        seen |= set(found)
    raise UserError(f"--resume {path}: no committed checkpoint in it; name a folder step-… that has COMMITTED")


def _same(one: Path, other: Path) -> bool:
    """Whether two paths name the same folder, maybe one of them through a symbolic link."""
    return os.path.realpath(one) == os.path.realpath(other)


def _begin_from(
    source: Path, config: RunConfig, paths: RunPaths, check: Check, *, force: bool, report: Report
) -> Start:
    """A run of this directory's own continues from another run's checkpoint."""
    own = committed(paths.checkpoints)
    try:
        sha256 = storage.sha256_file(source / storage.MANIFEST)
    except FileNotFoundError as error:
        raise removed(source) from error
    origin = paths.root / ORIGIN
    known = read_sealed(origin, schema_version=SCHEMA_VERSION) if origin.exists() else {}
    if own and known.get("manifest_sha256") != sha256:
        raise ConfigError(
            f"{paths.root}: holds {own[-1].name} of a run that did not begin with {source}; use another run_dir, or "
            "--resume auto to continue it"
        )
    state = verify(source)
    if not own:
        check(source, state)
    run = open_run(config, paths, force=force)
    clean(paths.checkpoints)
    if not own:
        facts = {"schema_version": SCHEMA_VERSION, "checkpoint": str(source), "manifest_sha256": sha256}
        publish_sealed(origin, {**facts, "mlflow_run_id": state["mlflow_run_id"]})
        adopt(source, paths.checkpoints, mlflow_run_id=run.id)
        outbox.set_tags(run, {CONTINUED_TAG: str(source)})
        report(f"{source} begins this run; it continues from step {step_of(source)}")
    found = _newest(run, check if own else None, report)
    assert found is not None
    return Start(run, *found)


def _roll_back(run: TrackedRun, name: str, check: Check, report: Report) -> Start:
    """One named checkpoint of the run; later ones are set aside, so that they no longer count as the run's."""
    folder = run.paths.checkpoints
    target = folder / name
    store, published = publish.available(run)
    if target not in committed(folder):
        if store is None or name not in published:
            raise UserError(f"MLflow run {run.id} has no committed checkpoint {name}; it has {published or 'none'}")
        try:
            _fetch(store, name, folder, check)
        except _Damaged as error:
            raise UserError(f"{name} in {store}: {error}") from error
        report(f"{name} fetched from {store}")
    state = verify(target)
    check(target, state)
    later = [c for c in committed(folder) if step_of(c) > step_of(target)]
    for checkpoint in later:
        set_aside(checkpoint, "later")
    withdrawn = [p for p in published if step_of(Path(p)) > step_of(target)]
    for gone in withdrawn:
        assert store is not None
        store.remove(gone)
    names = sorted({c.name for c in later} | set(withdrawn))
    if names:
        report(f"back at {name}: {', '.join(names)} set aside; local ones are kept as .later-…")
    return Start(run, target, state)


def _newest(run: TrackedRun, check: Check | None, report: Report) -> tuple[Path, State] | None:
    """The newest committed checkpoint of the run that is intact, checked. None: step 0.

    A local one is taken before its published copy; a later one, from another machine, before both. With the store unreachable
    the newest local one is taken, with a report.
    """
    folder = run.paths.checkpoints
    local = committed(folder)
    unreachable: UserError | None = None
    store, published = None, list[str]()
    try:
        store, published = publish.available(run)
    except UserError as error:
        unreachable = error
    for name in sorted({c.name for c in local} | set(published), key=lambda name: step_of(Path(name)), reverse=True):
        candidate = folder / name
        if candidate in local:
            try:
                state = _verified(candidate)
            except _Damaged as error:
                report(f"{name} is damaged and left out: {error}")
                set_aside(candidate)
            else:
                if check is not None:
                    check(candidate, state)
                if unreachable is not None:
                    report(f"it is not known whether another machine continued from {name}: {unreachable}")
                return candidate, state
        if name in published:
            assert store is not None
            try:
                found = _fetch(store, name, folder, check)
            except _Damaged as error:
                report(f"{name} in {store} is damaged and left out: {error}")
            else:
                later = bool(local) and step_of(found[0]) > step_of(local[-1])
                why = f": the run is further than {local[-1].name} here" if later else ""
                report(f"{name} fetched from {store}{why}")
                return found
    if unreachable is not None:
        raise unreachable
    return None


class _Damaged(Exception):
    """A checkpoint that is not as it was written."""


def _verified(checkpoint: Path) -> State:
    """The state.json of an intact checkpoint. Raises _Damaged."""
    try:
        return verify(checkpoint)
    except UserError as error:
        raise _Damaged(str(error)) from error


def _fetch(store: CheckpointStore, name: str, folder: Path, check: Check | None) -> tuple[Path, State]:
    """Bring a published checkpoint into `folder`; nothing of it stays when it is damaged or refused."""
    try:
        fetched = publish.fetch(store, name, folder)
    except Exception as error:
        raise UserError(f"{name} could not be fetched from {store}: {first_line(error)}; start again") from error
    try:
        state = _verified(fetched)
        if check is not None:
            check(fetched, state)
    except BaseException:
        shutil.rmtree(fetched, ignore_errors=True)
        raise
    return fetched, state


def _require_no_other(run: TrackedRun) -> None:
    """Raise ConfigError unless all local checkpoints are of this run: none is fetched or set aside beside another run's."""
    for checkpoint in committed(run.paths.checkpoints):
        try:
            owner = storage.read_json(checkpoint / STATE)["mlflow_run_id"]
        except (UserError, TypeError, KeyError):  # damaged: reported where it would be taken
            continue
        if not run.record.answers_to(owner):
            raise ConfigError(
                f"{checkpoint}: belongs to MLflow run {owner}, not to {run.id}; use another run_dir, or continue with "
                f"--resume {owner}"
            )
