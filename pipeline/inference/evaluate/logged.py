"""Scores in MLflow: metrics `eval/TASK/...`, a table, and the files, in the run that trained the model.

Decision: whatever fails here is one warning. The scores are on disk, and the same command sends them again without scoring.
"""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

from pipeline.tracking.client import client as open_client
from pipeline.tracking.client import patience, why
from pipeline.tracking.clock import now_ms
from pipeline.tracking.sqlite_store import keep_home

FOLDER, TABLE = "evaluation", "evaluation/table.json"
TABLES_TAG = "mlflow.loggedArtifacts"  # MLflow's own: which artifacts its page shows as tables
COLUMNS = ("metric", "cached", "cached_stderr", "live", "difference", "stderr", "n", "chance", "leak_gain")
log = logging.getLogger(__name__)
Tree = dict[str, Any]


def log_scores(results: Tree, files: list[Path], *, uri: str, run_id: str, step: int) -> bool:
    """Add the scores to a run; whether that worked. A warning says why not."""
    try:
        with patience():
            keep_home(uri)
            client = open_client(uri)
            _log(client, results, files, run_id, step)
    except Exception as error:  # MLflow raises any kind
        log.warning(
            "the scores are not in MLflow run %s (%s); the same command sends them again", run_id, why(uri, error)
        )
        return False
    return True


def _log(client: Any, results: Tree, files: list[Path], run_id: str, step: int) -> None:
    from mlflow.entities import Metric

    tags = client.get_run(run_id).data.tags
    now = now_ms()
    client.log_batch(run_id, metrics=[Metric(key, value, now, step) for key, value in metrics_of(results).items()])
    for file in files:
        client.log_artifact(run_id, str(file), FOLDER)
    # Not `log_table`: it adds to the rows that an earlier evaluation wrote.
    rows = [[task, *(one[name] for name in COLUMNS)] for task, one in results["tasks"].items()]
    client.log_text(run_id, json.dumps({"columns": ["task", *COLUMNS], "data": rows}), TABLE)
    tables = json.loads(tags.get(TABLES_TAG, "[]"))
    if (table := {"path": TABLE, "type": "table"}) not in tables:
        client.set_tag(run_id, TABLES_TAG, json.dumps([*tables, table]))


def metrics_of(results: Tree) -> dict[str, float]:
    """MLflow's metrics: each of a task's with its standard error, cached, and live as `METRIC_live`; of the main one the
    difference."""
    found: dict[str, float | None] = {}
    for task, one in results["tasks"].items():
        for metric, values in one["metrics"].items():
            name = f"eval/{task}/{metric}"
            found |= {
                name: values["cached"],
                f"{name}_stderr": values["cached_stderr"],
                f"{name}_live": values["live"],
            }
        found |= {f"eval/{task}/difference": one["difference"], f"eval/{task}/difference_stderr": one["stderr"]}
        found |= {f"eval/{task}/leak_gain": one["leak_gain"], f"eval/{task}/n": one["n"]}
    return {key: float(value) for key, value in found.items() if value is not None}
