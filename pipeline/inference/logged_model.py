"""A bundle as MLflow's logged model: the page with its parameters, metrics, data sets and the run that it comes from.

This is what `mlflow.pyfunc.log_model` does (MLflow 3.17), with a client and no global state: create the model, upload, finish,
name it as an output of the run.
"""

from __future__ import annotations

import contextlib
import re
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pipeline.bundle.read import BundleParts
from pipeline.tracking.client import OLDER_SERVER

SHOWN = ("train/", "val/", "invariance/", "data/")  # a run's metrics that say something of its model
NO_NAME = re.compile(r"[/:.%\"']")  # what MLflow allows in the name of a registered model only

Save = Callable[..., None]  # write the bundle as an MLflow model to a new folder


def log_model(client: Any, parts: BundleParts, save: Save, *, run_id: str, name: str, tags: dict[str, str]) -> Any:
    """The logged model of the run that has this bundle (of a registration that was interrupted), or a new one; None where the
    server is older than those. Raises what MLflow raises."""
    run = client.get_run(run_id)
    try:
        same = f"tags.bundle_sha256 = '{tags['bundle_sha256']}'"
        for known in client.search_logged_models([run.info.experiment_id], same):
            if known.source_run_id == run_id and known.status == "READY":
                return known
        model = client.create_logged_model(
            run.info.experiment_id,
            name=NO_NAME.sub("-", name),
            source_run_id=run_id,
            tags=tags,
            params={**run.data.params, "weight_format": parts.weight_format},
        )
    except Exception as error:
        if getattr(error, "error_code", None) in OLDER_SERVER:
            return None
        raise
    try:
        _fill(client, model, parts, save, run)
    except BaseException:
        with contextlib.suppress(Exception):  # the server is gone: it stays PENDING
            client.finalize_logged_model(model.model_id, "FAILED")
        raise
    return client.finalize_logged_model(model.model_id, "READY")


def _fill(client: Any, model: Any, parts: BundleParts, save: Save, run: Any) -> None:
    from mlflow.entities import LoggedModelOutput
    from mlflow.models import Model

    run_id, step = run.info.run_id, int(parts.manifest["lineage"].get("step") or 0)
    with tempfile.TemporaryDirectory(prefix="pldr-register-") as temporary:
        folder = Path(temporary) / "model"
        about = Model(
            artifact_path=model.artifact_location, model_uuid=model.model_id, model_id=model.model_id, run_id=run_id
        )
        save(folder, mlflow_model=about)
        client.log_model_artifacts(model.model_id, str(folder))
    client.log_outputs(run_id, [LoggedModelOutput(model.model_id, step)])
    client.log_batch(run_id, metrics=_metrics(run, parts, model.model_id, step))


def _metrics(run: Any, parts: BundleParts, model_id: str, step: int) -> list[Any]:
    """The certificate's numbers, and the run's newest metrics where they are of the bundle's checkpoint. A metric names the
    data set that it was measured on; the model's page lists those."""
    from mlflow.entities import Metric
    from mlflow.utils.mlflow_tags import MLFLOW_DATASET_CONTEXT

    newest = [metric for metric in run.data._metric_objs if metric.step == step and metric.key.startswith(SHOWN)]
    # A fixed time: of several processes that register at once, all log the same points, and MLflow keeps one of each.
    time = max((metric.timestamp for metric in newest), default=run.info.start_time)
    points = [(metric.key, metric.value, metric.timestamp) for metric in newest]
    points += [(key, value, time) for key, value in _certified(parts.certificate).items()]
    inputs = run.inputs.dataset_inputs if run.inputs is not None else []
    by_use = {tag.value: one.dataset for one in inputs for tag in one.tags if tag.key == MLFLOW_DATASET_CONTEXT}

    def metric(key: str, value: float, timestamp: int) -> Any:
        data = by_use.get("training" if key.startswith(("train/", "data/")) else "validation")
        return Metric(
            key,
            value,
            timestamp,
            step,
            model_id=model_id,
            run_id=run.info.run_id,
            dataset_name=data and data.name,
            dataset_digest=data and data.digest,
        )

    return [metric(*point) for point in points]


def _certified(certificate: dict[str, Any]) -> dict[str, float]:
    """The numbers of a certificate that compare models: how much G_LM deviates, over prompts and over every row (searched, and
    bounded if a proof closed; not before schema 5), and the held-out loss, live and cached."""
    measures = certificate["measures"]
    losses = measures["losses"] or {}
    found = {"relative_deviation_g": measures["relative_deviation_g"]}
    row, proof = measures.get("worst_row") or {}, measures.get("proof") or {}
    found |= {
        "worst_row_deviation": row.get("max"),
        "proven_bound": proof.get("bound") if proof.get("closed") else None,
    }
    found |= {f"loss_{kind}": losses.get(kind) for kind in ("block", "cached")}
    return {f"certificate/{key}": float(value) for key, value in found.items() if isinstance(value, int | float)}
