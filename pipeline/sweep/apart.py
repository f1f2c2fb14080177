"""A sweep whose children are run by others, several at once: the elements of a scheduler's job array (launch/backends).

One process follows them: it makes the data that the children share, knows which are complete, and writes the table. Each child
is an ordinary `pldr sweep SWEEP --only NUMBER`, on any node. Only the follower writes to the parent's MLflow run, and without a
server each child has a store of its own.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from pipeline.config.run import RunConfig
from pipeline.errors import ConfigError, UserError, first_line
from pipeline.stages.compatible import Report
from pipeline.stages.runner import Pipeline, exclusive
from pipeline.stages.table import NAMES, stage_named
from pipeline.stages.train import Launch
from pipeline.sweep.compare import in_order
from pipeline.sweep.config import Child
from pipeline.sweep.curves import CURVES
from pipeline.sweep.sweep import DATA_STAGES, Result, Sweep, data_of, measured
from pipeline.tracking.client import tracking_uri
from pipeline.tracking.default_store import WAY_OUT
from pipeline.tracking.run import known_run
from pipeline.tracking.sqlite_store import file_of


def run_only(sweep: Sweep, number: int, *, launch: Launch, report: Report, ranks: int | None) -> Result:
    """Run one child, the first being 1; its row of the table. Raises UserError when it failed, and Stopped."""
    if not 1 <= number <= len(sweep.children):
        raise ConfigError(f"--only {number}: the sweep has children 1 to {len(sweep.children)}")
    child = sweep.children[number - 1]
    known = known_run(sweep.config, sweep.paths)
    parent = None if known is None else known.record.run_id
    row = sweep.child(child, parent or sweep.open_parent(), launch=launch, report=report, ranks=ranks)
    row.pop(CURVES, None)
    if row["status"] == "failed":
        raise UserError(f"{child.name}: {row['error']}", details={"row": row})
    return row


def unfinished(sweep: Sweep, failed: Collection[str] = ()) -> dict[int, str]:
    """number -> name of the children that are to run and are not complete for today's settings, in the order in which they run;
    their files are not looked at. Where the others' results decide (compare.py), those that can be told by now.

    failed: names of children that are not to be waited for.
    """
    rows = [_failed(child, "") for child in sweep.children if child.name in failed]
    left = {}
    for number in in_order(sweep.children, sweep.settings.compare):
        child = sweep.children[number - 1]
        done = _done(child.config)
        if _is_complete(done, sweep.settings.until, child.config):
            if sweep.settings.compare is not None:
                rows.append(_finished(sweep, child, done))
        elif child.name not in failed:
            left[number] = child.name
    return {number: name for number, name in left.items() if sweep.is_wanted(sweep.children[number - 1], rows)}


def is_complete(sweep: Sweep, child: Child) -> bool:
    """Whether a child is complete for today's settings; its files are not looked at."""
    return _is_complete(_done(child.config), sweep.settings.until, child.config)


def complete(sweep: Sweep) -> set[str]:
    """The names of the children that are complete."""
    return {child.name for child in sweep.children if is_complete(sweep, child)}


def report_stores(sweep: Sweep, report: Report) -> None:
    """A line where the children do not share an MLflow server."""
    if file_of(tracking_uri(sweep.children[0].config)) is not None:
        report(f"MLflow      each child's store is in its run directory: a SQLite file has one writer; {WAY_OUT}")


def make_shared_data(sweep: Sweep, *, report: Report) -> None:
    """The first child's documents, tokenizer and tokens, which the others link where theirs would be the same. Raises UserError
    where they fail for all; where they fail and others have other data, that is the child's failure."""
    first = sweep.children[0]
    pipeline = _pipeline(first.config, report)
    try:
        with exclusive(pipeline.paths, report):
            for name in DATA_STAGES:
                pipeline.stage(name, thorough=False)
    except UserError as error:
        if all(data_of(child.config) == data_of(first.config) for child in sweep.children):
            raise
        report(f"{first.name}: {first_line(error)}")


def collect(sweep: Sweep, parent: str, errors: Mapping[str, str]) -> Result:
    """Write the table of the children that are complete, and of those that failed. errors: why, by child. Those that run, or
    are to run, are left out.

    Raises UserError, with the table, when children failed.
    """
    rows: list[Result] = []
    for number in in_order(sweep.children, sweep.settings.compare):
        child = sweep.children[number - 1]
        done = _done(child.config)
        if _is_complete(done, sweep.settings.until, child.config):
            rows.append(_finished(sweep, child, done))
        elif child.name in errors:
            rows.append(_failed(child, errors[child.name]) | measured(child.config, list(done)))
    return sweep.write_report(parent, rows) | {"rows": rows}


def _finished(sweep: Sweep, child: Child, done: Mapping[str, Any]) -> Result:
    """The row of a complete child: read once, for there may be a hundred. One that MLflow did not show is read again."""
    row = sweep.complete.get(child.name)
    if row is None or row["run_id"] is None:
        row = {"child": child.name, **child.values, "status": "finished", "error": None}
        sweep.complete[child.name] = row = row | measured(child.config, list(done))
    return row


def _failed(child: Child, error: str) -> Result:
    return {"child": child.name, **child.values, "status": "failed", "error": error}


def _done(config: RunConfig) -> dict[str, Any]:
    return _pipeline(config, lambda text: None).finished()


def _is_complete(done: Mapping[str, Any], until: str, config: RunConfig) -> bool:
    """Whether a child's last stage has finished. A certificate that did not pass is where a child ends, too."""
    if until in done:
        return True
    if "validate" not in done or NAMES.index(until) < NAMES.index("validate"):
        return False
    try:
        stage_named("validate").check(_pipeline(config, lambda text: None).paths, done["validate"])
    except UserError as error:
        return error.exit_code == 3
    return False


def _pipeline(config: RunConfig, report: Report) -> Pipeline:
    return Pipeline(config, launch=_no_training, report=report)


def _no_training(config: RunConfig, job_file: Path, ranks: int) -> None:
    raise AssertionError("children are trained by the elements of the array")
