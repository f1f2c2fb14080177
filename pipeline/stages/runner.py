"""The pipeline: the stages of table.py in order, each skipped when its output is complete for the same inputs.

A stage that finished leaves a record `stages/NAME.json`: a digest of its inputs (the configuration it reads and the
results of the stages before), the names, sizes and hashes of its output files, its result and the seconds it took. It is
skipped when the inputs are today's and the outputs are still there. The record carries a digest of all but the outputs,
which are compared with the files. Without a record, what a killed stage left is made again (the stages themselves keep what
is safe to keep).
"""

from __future__ import annotations

import re
import shutil
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import IO, Any

from pipeline.config.paths import RunPaths
from pipeline.config.run import RunConfig
from pipeline.errors import ConfigError, UserError
from pipeline.io import locks, storage
from pipeline.io.sealed import publish_sealed
from pipeline.stages import borrow
from pipeline.stages.compatible import Report
from pipeline.stages.records import FREE, SCHEMA_VERSION, first_changed, identity, record_file, record_of
from pipeline.stages.replace import SETTINGS, only_writer, require_replaceable, settings_digest
from pipeline.stages.resume import names_run
from pipeline.stages.still import Still
from pipeline.stages.table import NAMES, Stage, Work, stage_named, stages_before
from pipeline.stages.train import Launch
from pipeline.tracking.sqlite_store import RUN_FILE

LOCK = ".lock"  # its presence marks a run directory


class Pipeline:
    """One run's stages. `launch` starts a training job's ranks; `report` gets a line for the user now and then.
    `ranks`: how many train, on all nodes (None: what this node has)."""

    def __init__(self, config: RunConfig, *, launch: Launch, report: Report, ranks: int | None = None) -> None:
        self.config, self.paths = borrow.explicit(config), RunPaths(config.run_dir)
        self._lender = borrow.lender(config)
        self._launch, self._report, self._ranks = launch, report, ranks

    def run(self, *, resume: str = "auto") -> dict[str, dict[str, Any]]:
        """Every stage; returns their records by name. `resume`: where training continues (resume.py). Raises UserError (exit
        code 3 when the certificate failed)."""
        self._clean()
        return {name: self.stage(name, resume=resume if name == "train" else "auto", thorough=False) for name in NAMES}

    def stage(
        self,
        name: str,
        *,
        resume: str = "auto",
        force: bool = False,
        uncertified: bool = False,
        replace: bool = False,
        thorough: bool = True,
    ) -> dict[str, Any]:
        """Run one stage, or skip it; returns its record. Raises UserError when the stage before it is not complete, and when
        it would replace data of another configuration or of a trained run, unless `replace`."""
        stage = stage_named(name)
        if self._lender is not None:
            taken = self._borrow(name, look="thorough" if thorough else "all", make=force or replace)
            if stage.data is not None:
                return {**taken, "skipped": True}
        inputs = self.inputs(name)
        if uncertified:
            inputs["uncertified"] = True
        digest = storage.sha256_json(inputs)
        known = self.record(name)
        if known and not names_run(resume, known["result"].get("run_id")):
            known = None  # another run or checkpoint is asked for than the finished one
        if known and known["inputs"] == digest and not force and not self._changed(known, thorough=thorough):
            self._report(f"{name:<12} complete, skipped")
            stage.check(self.paths, known["result"])
            return {**known, "skipped": True}
        with only_writer(self.config, stage):
            if not replace:
                require_replaceable(self.config, self.paths, stage, self.record(name), digest, self._report)
            self._require_untouched(stage)
            self._report(f"{name:<12} ...")
            new = self._run(stage, digest, resume=resume, force=force, uncertified=uncertified)
        self._report(f"{name:<12} done in {new['seconds']:.1f} s  {_brief(new['result'])}")
        stage.check(self.paths, new["result"])
        return {**new, "skipped": False}

    def dry_run(self, name: str) -> tuple[Path, int]:
        """The script that a stage with `has_dry_run` would submit to Slurm first, written and checked, and its number of
        tasks."""
        from pipeline.data.executor.jobs import DryRun

        try:
            stage_named(name).run(self._work(dry_run=True))
        except DryRun as dry_run:
            return dry_run.script, dry_run.tasks
        raise AssertionError("a dry run ends at the first script")

    def record(self, name: str) -> dict[str, Any] | None:
        """What a finished stage left, None when it has not finished."""
        return record_of(self.paths, stage_named(name))

    def _require_finished(self, name: str, needed_by: str) -> dict[str, Any]:
        """An earlier stage's record. Raises ConfigError where there is none."""
        record, file = self.record(name), record_file(self.paths, name)
        if record is None and file.exists():
            raise ConfigError(f"{file}: damaged, or of another version; run `pldr {name} CONFIG` again")
        if record is None:
            raise ConfigError(f"stage {needed_by}: {name} has not finished; run `pldr {name}` first")
        return record

    def finished(self) -> dict[str, dict[str, Any]]:
        """The results of the stages, from the first on, that have finished for today's inputs; their outputs are not looked
        at."""
        results: dict[str, dict[str, Any]] = {}
        for name in NAMES:
            if self._lender is not None and stage_named(name).data is not None:
                theirs = record_of(self._lender, stage_named(name))
                results[name] = {} if theirs is None else theirs["result"]
                continue
            known = self.record(name)
            if known is None or not self._has_inputs(name, known["inputs"]):
                break
            results[name] = known["result"]
        return results

    def _has_inputs(self, name: str, digest: str) -> bool:
        """Whether a stage's inputs are those of a record; False also where they cannot be found."""
        try:
            return storage.sha256_json(self.inputs(name)) == digest
        except (UserError, OSError):
            return False

    def inputs(self, name: str) -> dict[str, Any]:
        """Everything that decides a stage's output. Raises ConfigError when the stage before it has not finished."""
        before = stages_before(name)
        if not before:
            return stage_named(name).inputs(self.config)
        self._require_finished(before[-1].name, name)
        records = [self.record(stage.name) for stage in before]
        identities = [identity(record) for record in records if record is not None]
        return {**stage_named(name).inputs(self.config), "before": identities}

    def _borrow(self, name: str, *, look: borrow.Look, make: bool) -> dict[str, Any]:
        """Take another run's data, up to this stage's, or see that those which were taken are as they were; the last record."""
        assert self._lender is not None
        taken: dict[str, Any] = {}
        for stage in [one for one in (*stages_before(name), stage_named(name)) if one.data is not None]:
            if make and stage.name == name:
                raise ConfigError(f"{name}: uses {stage.data} of {self._lender.root} (data.of); make them again there")
            before = self.record(stage.name)
            taken = borrow.take(
                self.config, self.paths, self._lender, stage, look=look if stage.name == name else "quick"
            )
            if before is None or stage.name == name:
                self._report(f"{stage.name:<12} {stage.data} of {self._lender.root}, used in place")
        return taken

    def _run(self, stage: Stage, digest: str, *, resume: str, force: bool, uncertified: bool) -> dict[str, Any]:
        """Do a stage's work; returns its new record, which is also written."""
        started = time.perf_counter()
        old, file = self.record(stage.name), record_file(self.paths, stage.name)
        file.unlink(missing_ok=True)
        try:
            with self._told(stage):
                result = stage.run(self._work(resume=resume, force=force, uncertified=uncertified))
        except ConfigError:  # refused: what was there is as complete as it was, for its own inputs
            if old:
                publish_sealed(file, old, free=FREE)
            raise
        new = {
            "schema_version": SCHEMA_VERSION,
            "stage": stage.name,
            "inputs": digest,
            SETTINGS: settings_digest(self.config, stage),
            "outputs": stage.outputs(self.config, self.paths),
            "result": result,
            "seconds": round(time.perf_counter() - started, 2),
        }
        publish_sealed(file, new, free=FREE)
        return new

    def _told(self, stage: Stage) -> AbstractContextManager[Any]:
        """For a stage that reports nothing itself: that it still works."""
        if not stage.is_silent:
            return nullcontext()
        return Still(stage.name, lambda text: self._report(f"  {text}"), times=3)

    def _work(self, **options: Any) -> Work:
        return Work(self.config, self.paths, self._launch, self._report, self._ranks, **options)

    def _clean(self) -> None:
        """Remove what killed stages left half-written beside their outputs."""
        for output in ("weights", "g_lm", "bundle"):
            for path in [*self.paths.root.glob(f".{output}.*.tmp"), *self.paths.root.glob(f".{output}.*.old")]:
                shutil.rmtree(path, ignore_errors=True)

    def _changed(self, record: dict[str, Any], *, thorough: bool) -> str | None:
        return first_changed(record["outputs"], self.paths.root, thorough=thorough)

    def _require_untouched(self, stage: Stage) -> None:
        """Raise UserError naming the first output of an earlier stage that was changed since: what is judged and packaged is
        what the stages wrote."""
        for name in stage.untouched:
            record = self._require_finished(name, stage.name)
            if changed := self._changed(record, thorough=True):
                raise UserError(
                    f"{self.paths.root / changed}: changed since `pldr {name}` wrote it; run `pldr {name} CONFIG` again"
                )


@contextmanager
def exclusive(paths: RunPaths, report: Report, *, wait_s: float | None = None) -> Iterator[None]:
    """One process at a time works in a run directory; a second one waits (and then finds everything done).

    wait_s: raise UserError after that time, for a process that holds nodes while it waits, or 0; None: as long as it takes."""
    while True:
        with _open_lock(paths.root) as stream:
            if not locks.lock(stream):
                holder = locks.lock_holder(stream)
                if wait_s == 0:
                    raise UserError(f"{paths.root}: process {holder} works here; wait for it to end")
                report(f"{paths.root}: process {holder} works here; waiting for it to end")
                if not locks.lock_within(stream, wait_s):
                    raise UserError(f"{paths.root}: process {holder} works here; it did not end in {wait_s:g} s")
            if locks.is_in_place(stream):  # else the directory was removed while we waited
                yield
                return


def _open_lock(root: Path) -> IO[str]:
    """The lock file of a run directory, which is made. Raises ConfigError for a folder that is none."""
    try:
        root.mkdir(parents=True, exist_ok=True)
        filled = any(path.name != LOCK for path in root.iterdir())
        ours = any((root / name).exists() for name in (LOCK, RUN_FILE))
        if filled and not ours:  # asked last: a run that begins now makes the lock before any other file
            raise ConfigError(f"run_dir {root}: holds files that are no run's; name a new or empty folder")
        return open(root / LOCK, "a+", encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"run_dir {root}: {error.strerror}; set run_dir to a folder that can be written") from error


def _brief(result: dict[str, Any]) -> str:
    """The few plain values of a result, for one line."""
    plain = {k: v for k, v in result.items() if isinstance(v, int | float | str) and not isinstance(v, bool)}
    plain.pop("schema_version", None)
    return "  ".join([f"{key}={_short(value)}" for key, value in plain.items()][:6])


def _short(value: float | str) -> str:
    """Six digits of a number, the first twelve of a hash, a long path shortened in its middle."""
    if isinstance(value, float):
        return f"{value:.6g}"
    text = str(value)
    if re.fullmatch(r"[0-9a-f]{32,}", text):
        return text[:12]
    return text if len(text) <= 48 else f"{text[:16]}…{text[-31:]}"
