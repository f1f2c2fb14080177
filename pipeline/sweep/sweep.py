"""A grid of runs, one after another: the children of one MLflow run, with one table and one plot of what came out.

    name: invariance-budget
    config: ../quickstart.yaml          # the run that is varied; relative to this file
    run_dir: runs/sweeps/budget         # of the sweep; its children lie below it
    set: {train.steps: 600}             # for every child
    grid: {train.metric_weight_decay: [1, 5, 20], seed: [1, 2]}     # every combination is a child
    until: validate                     # the last stage of each child
    plot: {x: budget, y: relative_deviation_g, log_x: false, log_y: true}

Decisions. A child is an ordinary run in a directory of its own, so a sweep that is started again skips what is complete and
resumes a training that was killed, by the same rules as `pldr run`. A certificate that fails is a result of the sweep and not
its failure. Children whose settings decide the same tokens (pipeline/config/keys.py) get the first one's, by hard links, so
that they train on the same tokens in the same order. The table is written again after each child.
"""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from pipeline.config.keys import of_stage
from pipeline.config.paths import RunPaths
from pipeline.config.run import RunConfig, flatten
from pipeline.errors import Stopped, UserError, first_line
from pipeline.io import storage
from pipeline.io.sealed import read_sealed
from pipeline.stages.compatible import Report
from pipeline.stages.records import FREE, record_of
from pipeline.stages.runner import Pipeline, exclusive
from pipeline.stages.table import NAMES, stage_named
from pipeline.stages.train import Launch
from pipeline.sweep.compare import in_order, is_wanted
from pipeline.sweep.config import COLUMNS, VARIANT, Child, read
from pipeline.sweep.report import write_sweep_report
from pipeline.tracking.client import client, report_store, tracking_uri, why
from pipeline.tracking.clock import now_ms
from pipeline.tracking.query import read_run
from pipeline.tracking.run import TrackedRun, known_run
from pipeline.tracking.run_record import new_record

DATA_STAGES = ("shard", "tokenizer", "tokenize")
Result = dict[str, Any]
MakeLaunch = Callable[[RunConfig], Launch]
log = logging.getLogger(__name__)


class Sweep:
    """A checked sweep: every child's configuration has been read before any of them starts."""

    def __init__(self, path: str | Path, overrides: list[str], *, nodes: int = 1, apart: bool = False) -> None:
        """nodes: how many train each child. apart: children run at the same time, on any nodes (apart.py).

        Raises ConfigError, one line, for a mistake in the sweep's YAML or in any child's configuration."""
        self.settings, self.config, self.children = read(Path(path), overrides, nodes=nodes, apart=apart)
        self.paths = RunPaths(self.config.run_dir)
        self.complete: dict[str, Result] = {}  # rows of children that others have finished (apart.py)

    def run(self, *, launch: Launch, report: Report, ranks: int | None = None) -> Result:
        """Every child in turn; returns the table, as `report/sweep.json` has it. `ranks`: how many train, on all nodes (None:
        what this node has).

        Raises UserError when a child failed for another reason than its certificate, after all others have run; and
        Stopped, at once, when a child's training was stopped by a signal.
        """
        with exclusive(self.paths, report):
            parent = self.open_parent()
            status = "KILLED"
            rows: list[Result] = []
            try:
                for number in in_order(self.children, self.settings.compare):
                    child = self.children[number - 1]
                    if not self.is_wanted(child, rows):
                        continue
                    report(f"child       {number} of {len(self.children)}: {child.name}")
                    rows.append(self.child(child, parent, launch=launch, report=report, ranks=ranks))
                    table = self.write_report(parent, rows)
                status = "FAILED" if any(row["status"] == "failed" for row in rows) else "FINISHED"
            finally:
                self.log(parent, {}, status=status)
        return self.result(parent, rows, table)

    def is_wanted(self, child: Child, rows: Sequence[Result]) -> bool | None:
        """Whether a child is to run, as far as the rows of others tell (compare.py)."""
        return is_wanted(child, self.children, {row["child"]: row for row in rows}, self.settings.compare)

    def result(self, parent: str, rows: list[Result], table: Result) -> Result:
        """What the sweep returns at its end. Raises UserError when a child failed, and without a table."""
        failed = [row["child"] for row in rows if row["status"] == "failed"]
        if failed:
            first = next(row for row in rows if row["status"] == "failed")
            raise UserError(
                f"{len(failed)} of {len(rows)} children failed, {first['child']} with: {first['error']}; fix that and start "
                "again: what is complete is skipped",
                details={"table": table["table"], "failed": failed},
            )
        if not table["files"]:
            raise UserError(f"{self._folder()}: the table could not be written; make room and start again")
        return {"run_id": parent, "children": len(rows), **table}

    def child(self, child: Child, parent: str, *, launch: Launch, report: Report, ranks: int | None) -> Result:
        """Run or skip one child's stages; its row of the table."""
        tracking = child.config.tracking.model_copy(update={"parent_run": parent})
        config = child.config.model_copy(update={"tracking": tracking})
        row: Result = {"child": child.name, **child.values, "status": "finished", "error": None}
        done: list[str] = []
        try:
            pipeline = Pipeline(config, launch=launch, report=report, ranks=ranks)
            with exclusive(pipeline.paths, report):
                self._share_data(config)
                for name in NAMES[: NAMES.index(self.settings.until) + 1]:
                    pipeline.stage(name, thorough=False)
                    done.append(name)
        except Stopped:
            raise
        except Exception as error:
            if isinstance(error, UserError) and error.exit_code == 3:
                done.append("validate")  # a certificate that did not pass is what a sweep is there to find
            else:
                if not isinstance(error, UserError):  # a full disk, a bug: the other children may do well
                    log.error("%s failed", child.name, exc_info=True)
                if isinstance(error, OSError):
                    error = storage.explain_os_error(error, error.filename or child.name)
                report(f"{child.name}: {first_line(error)}")
                row |= {"status": "failed", "error": first_line(error)}
        return row | measured(config, done)

    def write_report(self, parent: str, rows: list[Result]) -> Result:
        """Write the table and the page, here and in MLflow. On a full disk there are none: a later start writes them."""
        try:
            allowed = {child.config.post.max_relative_deviation_g for child in self.children}
            report = write_sweep_report(
                self._facts(parent),
                rows,
                self._folder(),
                limit=allowed.pop() if len(allowed) == 1 else None,
                uri=tracking_uri(self.config),
            )
        except OSError as error:
            log.warning("%s: the table could not be written: %s", self._folder(), error)
            return {"table": rows, "files": {}}
        self.log(parent, report["files"])
        return report

    def _share_data(self, config: RunConfig) -> None:
        """Link the first child's documents, tokenizer and tokens where this child's would be the same."""
        first = self.children[0].config
        paths, theirs = RunPaths(config.run_dir), RunPaths(first.run_dir)
        if paths.root == theirs.root or data_of(config) != data_of(first) or (paths.stages / "shard.json").exists():
            return
        if not (theirs.stages / f"{DATA_STAGES[-1]}.json").exists():
            return
        for source, target in (
            (theirs.documents, paths.documents),
            (theirs.tokenizer.parent, paths.tokenizer.parent),
            (theirs.tokens, paths.tokens),
        ):
            if source.exists():
                shutil.rmtree(target, ignore_errors=True)
                shutil.copytree(source, target, copy_function=_link)
        for name in reversed(DATA_STAGES):  # the first of them, which is looked for above, last
            record = theirs.stages / f"{name}.json"
            storage.publish_bytes(paths.stages / record.name, record.read_bytes())

    def open_parent(self) -> str:
        """The id of the MLflow run whose children these are: made once, also when a start was killed."""
        run = known_run(self.config, self.paths)
        if run is None:
            report_store(self.config, self.paths)
            settings = flatten({"sweep": self.settings.model_dump(mode="json")})
            run = TrackedRun(self.config, self.paths, new_record(self.config, self.paths, params=settings))
            run.write()
        try:
            run_id = run.create()
            client(run.uri).update_run(run_id, status="RUNNING")
        except Exception as error:
            raise UserError(f"MLflow at {run.uri}: {why(run.uri, error)}") from error
        return run_id

    def log(self, parent: str, files: dict[str, str], *, status: str | None = None) -> None:
        """Attach the table and the page to the parent run. In an outage they stay where they are: the next start sends them."""
        try:
            mlflow = client(tracking_uri(self.config))
            for file in files.values():
                mlflow.log_artifact(parent, file, "sweep")
            if status is not None:
                mlflow.set_terminated(parent, status=status, end_time=now_ms())
        except Exception as error:
            log.warning(
                "MLflow did not take the sweep's table: %s; start the sweep again to send it", first_line(error)
            )

    def _facts(self, parent: str) -> Result:
        settings = self.settings
        return {
            "name": settings.name,
            "run_id": parent,
            "config": settings.config,
            "set": {key: str(value) for key, value in settings.set.items()},
            "grid": [*([VARIANT] if settings.variants else []), *settings.grid],
            "variants": {name: {k: str(v) for k, v in keys.items()} for name, keys in settings.variants.items()},
            "compare": settings.compare and settings.compare.model_dump(),
            "children": len(self.children),
            "plot": settings.plot.model_dump(),
        }

    def _folder(self) -> Path:
        return self.paths.root / "report"


def measured(config: RunConfig, done: Sequence[str]) -> Result:
    """What a child's MLflow run and files hold of it; None for what is not there (yet).

    done: the stages that are complete today. What a stage left earlier belongs to another training, and is not shown.
    """
    row: Result = dict.fromkeys(COLUMNS)
    paths = RunPaths(config.run_dir)
    with contextlib.suppress(UserError):  # MLflow is unreachable: the certificate is still on disk
        run = known_run(config, paths)
        if run is not None and run.record.run_id is not None:
            known = read_run(run.uri, run.record.run_id)[0]
            row |= {key: known[key] for key in ("step", "loss", "val_loss_cached", "order_parameter", "budget")}
            row["run_id"] = run.record.run_id
    if "train" in done and (train := record_of(paths, stage_named("train"))) is not None:
        row["tokens"] = train["result"]["tokens"]
        row["train_seconds"] = train["seconds"] if train["result"]["resumed_from"] is None else None
    if "validate" in done:
        certificate = storage.read_json(
            paths.certificate / "certificate.json"
        )  # its stage has compared it with its record
        losses = certificate["measures"]["losses"]
        row |= {key: certificate[key] for key in ("verdict", "tier")}
        row["relative_deviation_g"] = certificate["measures"]["relative_deviation_g"]
        row |= {f"held_out_{key}": losses.get(key) for key in ("block", "cached")}
    if DATA_STAGES[-1] in done:
        tokens = read_sealed(paths.stages / f"{DATA_STAGES[-1]}.json", free=FREE)
        row["data_fingerprint"] = tokens["result"]["fingerprint"]
    return row


def data_of(config: RunConfig) -> Result:
    """Everything that decides documents, tokenizer and tokens."""
    return {stage: of_stage(config, stage) for stage in DATA_STAGES}


def _link(source: str, target: str) -> None:
    """A hard link, where the disk allows it: the stages never write into a finished file."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)
