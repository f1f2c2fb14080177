"""`pldr evaluate`: benchmark scores of a model, with its cached G_LM and live."""

from __future__ import annotations

import argparse
import logging
import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launch.commands.verbs import Report, Result, Verbs, add_overrides
from pipeline.errors import Caution, ConfigError, UserError

if TYPE_CHECKING:
    from pipeline.inference.opened import OpenModel

EVERY_S, EVERY_PLAIN_S = 0.5, 30.0  # between lines of progress: on a terminal, in a log
log = logging.getLogger(__name__)


def add_evaluate_verb(verbs: Verbs) -> None:
    """The verb `evaluate`."""
    sub = verbs.add(
        "evaluate", _evaluate, "benchmark scores (lm-evaluation-harness), with cached and live G_LM", is_work=True
    )
    sub.add_argument("source", metavar="BUNDLE|HF_DIR|CONFIG", help="a bundle, an export, or a run's YAML")
    add_overrides(sub, "override a key of the YAML")
    sub.add_argument("--tasks", metavar="NAME,NAME", help="tasks of lm-eval (default: the ten of docs/evaluation.md)")
    sub.add_argument("--limit", type=_count, metavar="N", help="only the first N items of each task")
    sub.add_argument("--data", type=Path, metavar="DIR", help="a folder of JSONL files (default: the Hugging Face hub)")
    sub.add_argument("--out", type=Path, metavar="DIR", help="default: RUN_DIR/evaluation, or ./evaluation-NAME")
    sub.add_argument("--uri", help="MLflow's store, to log the scores of a bundle or an export in the run that made it")


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: a number of items, at least 1")
    return min(int(text), sys.maxsize)


def _evaluate(arguments: Any, report: Report) -> Result:
    from launch.commands.terminal import status_lines
    from pipeline.inference.evaluate import tasks

    tasks.quiet(offline=arguments.data is not None)  # first: transformers would import `datasets`
    from pipeline.inference.evaluate.run import PAGE, RESULTS, evaluate
    from pipeline.inference.evaluate.table import table
    from pipeline.inference.source import open_model
    from pipeline.io.storage import require_unsealed

    names = list(tasks.STOCK) if arguments.tasks is None else [name for name in arguments.tasks.split(",") if name]
    if not names:
        raise ConfigError(
            f"--tasks: names of tasks, separated by commas; for example {','.join(list(tasks.STOCK)[:2])}"
        )
    opened = open_model(arguments.source, arguments.overrides, live=None)
    if opened.caution:
        warnings.warn(opened.caution, Caution, stacklevel=2)
    origin = _Origin(opened, arguments)
    require_unsealed(origin.out)
    live = sys.stdout.isatty() and not arguments.json
    results = evaluate(
        opened,
        names,
        out=origin.out,
        limit=arguments.limit,
        data=arguments.data,
        report=report,
        status=status_lines(json=arguments.json),
        every_s=EVERY_S if live else EVERY_PLAIN_S,
    )
    for line in table(results):
        report(line)
    page = origin.write_page(results)
    if results["tasks"]:
        origin.log(results, [origin.out / RESULTS, page])
    report(f"page  {origin.out / PAGE}    ({results['seconds']:.0f} s)")
    summary = {**results, "out": str(origin.out), "page": str(page)}
    if results["failed"]:
        failed = ", ".join(results["failed"])
        raise UserError(f"not scored: {failed}; {next(iter(results['failed'].values()))}", details=summary)
    return summary


class _Origin:
    """Where a model's scores belong: a folder, the other pages beside it, and the MLflow run that trained it."""

    def __init__(self, opened: OpenModel, arguments: Any) -> None:
        self._opened, self._pages, self._uri = opened, [], arguments.uri
        lineage = (opened.certificate or {}).get("lineage", {})
        self._run_id, self._step = lineage.get("mlflow_run_id"), lineage.get("step") or 0
        if opened.kind == "run":
            self._of_run(arguments)
            return
        self.out = (arguments.out or Path(f"evaluation-{opened.name}")).absolute()
        if self.out.resolve().is_relative_to(opened.path.resolve()):
            raise ConfigError(
                f"--out {self.out}: inside the folder of the model, whose files are verified; name another"
            )
        if self._uri is not None:
            from pipeline.report.links import mlflow_link

            self._pages.append(mlflow_link(self._uri, self._run_id))

    def _of_run(self, arguments: Any) -> None:
        from pipeline.bundle.weights import load_weights
        from pipeline.config.load import load_config
        from pipeline.config.paths import RunPaths
        from pipeline.report.links import EVALUATION, links, mlflow_link
        from pipeline.tracking.run import known_run, require_no_copy

        if arguments.uri is not None:
            raise ConfigError("--uri: goes with a bundle or an export; a run's scores go to its own store")
        config = load_config(arguments.source, arguments.overrides)
        paths = RunPaths(config.run_dir)
        self.out = arguments.out.absolute() if arguments.out else (paths.root / EVALUATION).parent
        self._step = load_weights(paths.weights)[1].get("step") or 0  # a run may have no certificate
        run = known_run(config, paths)
        try:
            if run is not None:
                require_no_copy(run, publishes=False)
                self._uri, self._run_id = run.uri, run.record.run_id
        except ConfigError as error:
            log.warning("the scores will not be in MLflow: %s", error)
        mlflow = None if run is None else mlflow_link(run.uri, run.record.run_id)
        page = self.out / Path(EVALUATION).name
        self._pages = links(page, paths.root, mlflow=mlflow, in_sweep=config.tracking.parent_run is not None)

    def write_page(self, results: Result) -> Path:
        """evaluation.html"""
        from pipeline.inference.evaluate.page import write_page

        return write_page(results, self._pages, self.out)

    def log(self, results: Result, files: list[Path]) -> None:
        """Into MLflow, where a run is known."""
        if self._uri is not None and self._run_id is not None:
            from pipeline.inference.evaluate.logged import log_scores

            log_scores(results, files, uri=self._uri, run_id=self._run_id, step=self._step)
