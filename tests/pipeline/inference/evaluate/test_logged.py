"""Scores in MLflow: metrics, a table, the files; and one warning where that fails."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipeline.inference.evaluate import run
from pipeline.inference.evaluate.logged import TABLE, TABLES_TAG, log_scores
from pipeline.network import free_port
from pipeline.tracking.client import client as open_client


@pytest.fixture
def results(opened: Callable[..., Any], data: Path, tmp_path: Path) -> dict[str, Any]:
    names = ["winogrande", "lambada_openai"]
    return run.evaluate(opened(), names, out=tmp_path / "out", data=data, report=lambda _: None)


def test_scores_are_metrics_and_a_table_of_the_run(results: dict[str, Any], tmp_path: Path, empty_mlflow: Path) -> None:
    shutil.copy(empty_mlflow, tmp_path / "mlflow.db")
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    client = open_client(uri)
    experiment = client.create_experiment("e", artifact_location=(tmp_path / "artifacts").as_uri())
    run_id = client.create_run(experiment).info.run_id
    file = tmp_path / "out" / run.RESULTS
    for _ in range(2):  # the second time nothing is doubled
        assert log_scores(results, [file], uri=uri, run_id=run_id, step=7)
    logged = client.get_run(run_id)
    one = results["tasks"]["winogrande"]
    assert logged.data.metrics["eval/winogrande/acc"] == one["cached"]
    assert logged.data.metrics["eval/winogrande/acc_live"] == one["live"]
    assert logged.data.metrics["eval/winogrande/difference_stderr"] == one["stderr"] == 0
    assert "eval/lambada_openai/perplexity" in logged.data.metrics
    assert "eval/winogrande/leak_gain" not in logged.data.metrics
    assert [point.step for point in client.get_metric_history(run_id, "eval/winogrande/n")] == [7, 7]
    table = json.loads((tmp_path / "artifacts" / run_id / "artifacts" / TABLE).read_text())
    assert [row[0] for row in table["data"]] == ["winogrande", "lambada_openai"] and table["columns"][1] == "metric"
    assert json.loads(logged.data.tags[TABLES_TAG]) == [{"path": TABLE, "type": "table"}]
    assert json.loads((tmp_path / "artifacts" / run_id / "artifacts/evaluation/results.json").read_text()) == results


def test_a_store_that_fails_is_one_warning(results: dict[str, Any], caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        assert not log_scores(results, [], uri=f"http://127.0.0.1:{free_port()}", run_id="abc", step=0)
    (record,) = [record for record in caplog.records if record.name.startswith("pipeline.")]
    assert "not in MLflow run abc" in record.getMessage() and "\n" not in record.getMessage()
