"""Register a bundle in MLflow: a model version with its lineage, and the alias `certified` only for a certified bundle.

Decision: the wrapper is saved to a local folder and uploaded by the client, as a logged model of the training run, so that
nothing here starts, ends or renames a run, or changes the global tracking URI. The version names the run; its tags name the
logged model, the checkpoint, the data and the verdict. Registering the same bundle twice gives the same version.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import tempfile
import warnings
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from pipeline.bundle.read import BundleParts, read_bundle
from pipeline.errors import UserError
from pipeline.inference.logged_model import log_model
from pipeline.tracking.client import client as open_client
from pipeline.tracking.client import contended, patience, why
from pipeline.tracking.sqlite_store import keep_home

ALIAS = "certified"
LINEAGE_TAGS = ("checkpoint", "step", "data_fingerprint", "tokenizer_sha256", "git_commit")


def register(bundle: Path, *, tracking_uri: str, run_id: str, name: str, certified: bool) -> dict[str, Any]:
    """Log the bundle as a model of the run, register it as a version of the model `name`; returns {"version", "uri", "alias"}.

    certified: move the alias `certified` to this version. An uncertified version never gets it and never removes it from
    another. `uri` is `models:/NAME/VERSION`. Raises UserError when `certified` is requested for an uncertified bundle, when
    the bundle is damaged, when there is no such run, or when the server is unreachable.
    """
    parts = read_bundle(bundle)
    if certified and not parts.manifest["certified"]:
        raise UserError(
            f"{bundle}: its certificate did not pass, so it cannot be registered as certified; use certified=False"
        )
    with _quiet(), patience():
        try:
            keep_home(tracking_uri)
            client = open_client(tracking_uri)
            version = _find_version(client, name, run_id, parts.manifest["bundle_sha256"])
            if version is None:
                _ensure_model(client, name)
                version = _register(client, bundle, parts, run_id=run_id, name=name, certified=certified)
            if certified:
                _set_alias(client, name, version)
        except Exception as error:  # a damaged SQLite file raises SQLAlchemy's own
            raise UserError(
                f"MLflow at {tracking_uri}: {why(tracking_uri, error)}; check tracking.uri and post.register_as"
            ) from error
    return {"version": str(version), "uri": f"models:/{name}/{version}", "alias": ALIAS if certified else None}


def save_pyfunc(bundle: Path, folder: Path, *, mlflow_model: Any = None) -> None:
    """Write the bundle as an MLflow model (models from code, no pickle) to a new local folder. mlflow_model: what its MLmodel
    says beside that."""
    import mlflow
    from mlflow.models import ModelSignature

    from pipeline.inference.parameters import SCHEMA

    packages = Path(__file__).resolve().parents[2]
    mlflow.pyfunc.save_model(
        path=folder,
        mlflow_model=mlflow_model,
        python_model=str(Path(__file__).with_name("mlflow_model.py")),
        artifacts={"bundle": str(bundle)},
        # No input schema: it would reject a plain list of texts.
        signature=ModelSignature(params=SCHEMA),
        code_paths=[str(packages / "pipeline"), str(packages / "pldr_model")],
        pip_requirements=_requirements(),
    )


def _register(client: Any, bundle: Path, parts: BundleParts, *, run_id: str, name: str, certified: bool) -> str:
    """A new version, with its logged model; where another process registers the same bundle, the version that was first."""
    from mlflow.exceptions import MlflowException
    from mlflow.utils.mlflow_tags import MLFLOW_MODEL_VERSIONS

    digest, lineage = parts.manifest["bundle_sha256"], parts.manifest["lineage"]
    tags = {
        "bundle_sha256": digest,
        "verdict": parts.certificate["verdict"],
        "tier": parts.certificate["tier"],
        "certified": str(certified).lower(),
        "weight_format": parts.weight_format,
        **({} if parts.key_ranks is None else {"numbers_per_key": f"{parts.key_ranks.double().mean():.3g}"}),
        **{key: str(lineage[key]) for key in LINEAGE_TAGS if lineage.get(key) is not None},
    }
    model = log_model(client, parts, partial(save_pyfunc, bundle), run_id=run_id, name=name, tags=tags)
    # Without logged models, one folder per bundle of a run: a later bundle must not change what an earlier version serves.
    # With one, not `models:/ID`: MLflow would look that up in the global store.
    source = model.artifact_location if model else _upload(client, bundle, run_id, f"bundle-{digest[:16]}")
    model_id = None if model is None else str(model.model_id)
    if model_id is not None:
        tags["logged_model"] = model_id
    about = {"run_id": run_id, "model_id": model_id, "description": parts.certificate["statement"]}
    made = _create_version(client, name, source, tags=tags, **about)
    version = _find_version(client, name, run_id, digest) or made
    first = client.get_model_version(name, version).tags.get("logged_model")
    if version != made:  # another process was registering the same bundle
        client.delete_model_version(name, made)
    if (
        model_id is not None and model_id == first
    ):  # as `mlflow.register_model` does: the model's page then names its version
        of_model = json.dumps([{"name": name, "version": int(version)}])
        client.set_logged_model_tags(model_id, {MLFLOW_MODEL_VERSIONS: of_model})
    elif model_id is not None:
        with contextlib.suppress(MlflowException):  # a third process has deleted it
            client.delete_logged_model(model_id)
    return version


def _upload(client: Any, bundle: Path, run_id: str, folder_name: str) -> str:
    """Save and upload the model to the run; returns its URL among the run's artifacts."""
    with tempfile.TemporaryDirectory(prefix="pldr-register-") as temporary:
        folder = Path(temporary) / folder_name
        save_pyfunc(bundle, folder)
        client.log_artifacts(run_id, str(folder), folder_name)
    return f"{client.get_run(run_id).info.artifact_uri}/{folder_name}"


def _find_version(client: Any, name: str, run_id: str, digest: str) -> str | None:
    """The first version of this model that has this bundle from this run."""
    found = client.search_model_versions(f"name = '{name}'")
    same = [int(one.version) for one in found if one.run_id == run_id and one.tags.get("bundle_sha256") == digest]
    return str(min(same)) if same else None


def _ensure_model(client: Any, name: str) -> None:
    from mlflow.exceptions import MlflowException

    def create() -> None:
        try:
            client.create_registered_model(name)
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise

    contended(create)


def _create_version(client: Any, name: str, source: str, **facts: Any) -> str:
    return str(contended(lambda: client.create_model_version(name, source, **facts)).version)


def _set_alias(client: Any, name: str, version: str) -> None:
    contended(lambda: client.set_registered_model_alias(name, ALIAS, version))


def _requirements() -> list[str]:
    """The packages that serving needs, at the versions installed now."""
    from importlib.metadata import version

    names = ("torch", "safetensors", "sentencepiece", "mlflow", "fsspec", "pydantic", "pyyaml", "pandas")
    return [f"{name}=={version(name).partition('+')[0]}" for name in names]


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep MLflow's progress bars and warnings out of the terminal; its errors are exceptions anyway."""
    level, bar = logging.root.manager.disable, "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR"
    logging.disable(logging.WARNING)
    os.environ.setdefault(bar, "false")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)
