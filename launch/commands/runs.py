"""`pldr runs`, `report` and `track replay`: the runs in MLflow, one run's curves, and metrics that MLflow is missing."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launch.commands.verbs import Report, Result, Verbs, add_overrides
from pipeline.errors import ConfigError, UserError

if TYPE_CHECKING:
    from pipeline.config.run import RunConfig

RUNS = "runs"  # the folder of runs, in the working directory
HEADER = (
    "run",
    "name",
    "status",
    "step",
    "loss",
    "cached",
    "order par.",
    "budget",
    "checkpoints",
    "verdict",
    "began with",
)


def add_run_verbs(verbs: Verbs) -> None:
    """The verbs `runs`, `report` and `track`."""
    sub = verbs.add("runs", _runs, "training runs, their checkpoints and verdicts, from MLflow, newest first")
    sub.add_argument("config", nargs="?", metavar="CONFIG", help="YAML of a run: its store and experiment")
    add_overrides(sub, "override a key of the YAML")
    sub.add_argument("--uri", help="an MLflow server or sqlite:///PATH (else MLFLOW_TRACKING_URI, runs/)")
    sub.add_argument("--experiment", metavar="NAME", help="only this one (with CONFIG: its own; without: all)")
    sub = verbs.add("report", _report, "one HTML page of a run's curves, from MLflow")
    sub.add_argument("run", metavar="CONFIG|RUN_DIR|RUN_ID", help="YAML of a run, its run directory, or an MLflow id")
    add_overrides(sub, "override a key of the YAML")
    sub.add_argument("--uri", help="with RUN_ID: an MLflow server or sqlite:///PATH (else MLFLOW_TRACKING_URI, runs/)")
    sub.add_argument(
        "--output", metavar="FILE", help="where to write it (else report/training.html of the run, or RUN_ID.html)"
    )
    track = verbs.group("track", "send what could not be sent while MLflow was unreachable", metavar="replay")
    about = "create the run if it does not exist, send spooled metrics in order and once, publish checkpoints"
    sub = track.add("replay", _replay, about)
    sub.add_argument("config", metavar="CONFIG|RUN_DIR", help="YAML of a run, or its run directory")
    add_overrides(sub, "override a key of the YAML")


def _runs(arguments: Any, report: Report) -> Result:
    if arguments.config is not None:
        from pipeline.config.load import load_config

        config = load_config(arguments.config, arguments.overrides)
        from pipeline.tracking.client import tracking_uri

        uri = arguments.uri or tracking_uri(config)
        experiment = arguments.experiment or config.tracking.experiment
        uris = [uri]
    else:
        uris, experiment = _stores(arguments.uri), arguments.experiment
        if not uris:
            raise ConfigError(
                f"runs: no {RUNS}/mlflow.db in the working directory; name the YAML of a run, or --uri http://HOST:PORT or "
                "sqlite:///PATH"
            )
    with _without_gc():
        from pipeline.tracking.query import list_all_runs

        rows = list_all_runs(uris, experiment)
    for line in _table(rows):
        report(line)
    for uri in uris if len(uris) > 1 else []:
        report(f"{sum(row['uri'] == uri for row in rows)} of {uri}")
    return {"uri": uris[0], "runs": rows}


def _stores(given: str | None) -> list[str]:
    """The stores that are meant without a YAML: the one that is named, or those in `runs/` of the working directory."""
    from pipeline.tracking.client import variable
    from pipeline.tracking.default_store import stores_of

    uri = given or variable()
    return stores_of(Path(RUNS)) if uri is None else [uri]


@contextlib.contextmanager
def _without_gc() -> Iterator[None]:
    """Pause the garbage collector: its passes over the objects of MLflow's import are a fifth of `pldr runs` (measured
    2026-11-28: 3.6 s of processor time with it, 2.8 to 3.1 s without, on a busy machine)."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _report(arguments: Any, report: Report) -> Result:
    from pipeline.config.paths import RunPaths
    from pipeline.io.urls import without_secrets
    from pipeline.report.links import TRAINING, links, mlflow_link
    from pipeline.report.training import write_run_report
    from pipeline.tracking.query import read_run
    from pipeline.tracking.run import known_run
    from pipeline.tracking.sqlite_store import RUN_FILE, holds_run

    given, root, in_sweep = Path(arguments.run), None, False
    if given.suffix in (".yaml", ".yml") or given.is_dir():
        config = _config_of(arguments.run, arguments.overrides, verb="report")
        paths = RunPaths(config.run_dir)
        run = known_run(config, paths)
        if run is None or run.record.run_id is None:
            raise UserError(
                f"{paths.root / RUN_FILE}: missing, or names no run in MLflow yet; train first, or `pldr track replay`"
            )
        run.require_store_exists()
        uri, run_id = run.uri, run.record.run_id
        root, in_sweep = paths.root, config.tracking.parent_run is not None
        target = root / TRAINING
    else:
        uris, run_id = _stores(arguments.uri), arguments.run
        if not uris or arguments.overrides:
            raise ConfigError(
                "report: an MLflow run id goes with --uri http://HOST:PORT or sqlite:///PATH, and nothing else"
            )
        uri = next((one for one in uris if holds_run(one, run_id)), uris[0])
        target = Path(f"{run_id}.html")
    row, data, histories = read_run(uri, run_id)
    facts = {**{key: row[key] for key in ("name", "status", "started", "verdict", "checkpoints")}, "run_id": run_id}
    target = Path(arguments.output).absolute() if arguments.output else target
    mlflow = mlflow_link(uri, run_id)
    pages = [mlflow] if root is None else links(target, root, mlflow=mlflow, in_sweep=in_sweep)
    facts |= {"uri": without_secrets(uri), "pages": pages}
    result = write_run_report(facts, data.params, data.tags, histories, target)
    report(result["report"])
    return result


def _table(rows: list[Result]) -> list[str]:
    experiments = [row["experiment"] for row in rows]
    cells = [HEADER, *(_cells(row) for row in rows)]
    if len(set(experiments)) > 1:
        cells = [(*row, experiment) for row, experiment in zip(cells, ["experiment", *experiments], strict=True)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(cells[0]))]
    return ["  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip() for row in cells]


def _cells(row: Result) -> tuple[str, ...]:
    def number(key: str, form: str) -> str:
        return "-" if row[key] is None else format(row[key], form)

    steps = [str(int(name.rpartition("-")[2])) for name in row["checkpoints"]]
    shown = ",".join(steps if len(steps) <= 4 else ["…", *steps[-4:]])
    return (
        row["id"],
        row["name"],
        row["status"],
        number("step", "d"),
        number("loss", ".4f"),
        number("val_loss_cached", ".4f"),
        number("order_parameter", ".1e"),
        number("budget", ".2f"),
        shown or "-",
        row["verdict"] or "-",
        _origin(row["continued_from"]),
    )


def _origin(checkpoint: str | None) -> str:
    """`old/step-000500` of the checkpoint of another run that a run began with: its run directory and its step."""
    if checkpoint is None:
        return "-"
    path = Path(checkpoint)
    return f"{path.parent.parent.name}/{path.name}" if path.parent.name == "checkpoints" else path.name


def _replay(arguments: Any, report: Report) -> Result:
    from pipeline.checkpoint.format import TRAINING_LOCK
    from pipeline.config.paths import RunPaths
    from pipeline.io import locks
    from pipeline.stages.runner import exclusive
    from pipeline.tracking import outbox

    config = _config_of(arguments.config, arguments.overrides, verb="track replay")
    paths = RunPaths(config.run_dir)
    logs = paths.logs
    if not logs.is_dir():
        raise UserError(f"{logs}: no such folder; nothing was trained here")
    with open(logs / TRAINING_LOCK, "a+", encoding="utf-8") as stream:
        if not locks.lock(stream):
            holder = locks.lock_holder(stream)
            raise UserError(f"{logs.parent}: process {holder} trains here, and sends by itself when MLflow is back")
        with exclusive(paths, report, wait_s=0):
            result = outbox.replay(config, paths)
    report(f"MLflow run {result['run_id']}: {result['points_sent']} points sent, nothing is left over")
    return result


def _config_of(given: str, overrides: list[str], *, verb: str) -> RunConfig:
    """The YAML's configuration, or that of a run directory's last start."""
    from pipeline.config.load import load_config, parse_config
    from pipeline.config.paths import RunPaths
    from pipeline.io.sealed import read_sealed
    from pipeline.tracking.default_store import job_uri

    folder = Path(given)
    if not folder.is_dir():
        return load_config(given, overrides)
    if overrides:
        raise ConfigError(f"{verb}: {overrides[0]} goes with the YAML of a run, not with its folder")
    job = RunPaths(folder).logs / "job.json"
    if not job.exists():
        raise UserError(f"{job}: missing; no training was started in {folder}: name the YAML of the run")
    config = parse_config(read_sealed(job, schema_version=1).get("config") or {}, where=str(job))
    if (uri := config.tracking.uri) is not None:
        uri = job_uri(RunPaths(folder).root, uri, RunPaths(config.run_dir).root)
    tracking = config.tracking.model_copy(update={"uri": uri})
    return config.model_copy(update={"run_dir": str(folder), "tracking": tracking})
