"""Register a bundle in MLflow: a model version with its lineage, and the alias `certified` only for a certified bundle.

Decision: the wrapper is saved to a local folder and uploaded to the training run by the client, so that nothing here starts,
ends or renames a run, or changes the global tracking URI. The version names the run; its tags name the checkpoint, the data
and the verdict. Registering the same bundle twice gives the same version.
"""

from __future__ import annotations

import contextlib
import logging
import os
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pipeline.bundle.read import read_bundle
from pipeline.errors import UserError
from pipeline.tracking.client import client as open_client
from pipeline.tracking.client import contended, patience, why
from pipeline.tracking.sqlite_store import keep_home

ALIAS = "certified"
LINEAGE_TAGS = ("checkpoint", "step", "data_fingerprint", "tokenizer_sha256", "git_commit")


def register(bundle: Path, *, tracking_uri: str, run_id: str, name: str, certified: bool) -> dict[str, Any]:
    """Upload the bundle to the run, register it as a version of the model `name`; returns {"version", "uri", "alias"}.

    certified: move the alias `certified` to this version. An uncertified version never gets it and never removes it from
    another. `uri` is `models:/NAME/VERSION`. Raises UserError when `certified` is requested for an uncertified bundle, when
    the bundle is damaged, when there is no such run, or when the server is unreachable.
    """
    parts = read_bundle(bundle)
    if certified and not parts.manifest["certified"]:
        raise UserError(
            f"{bundle}: its certificate did not pass, so it cannot be registered as certified; use certified=False"
        )
    digest = parts.manifest["bundle_sha256"]
    with _quiet(), patience():
        try:
            keep_home(tracking_uri)
            client = open_client(tracking_uri)
            version = _find_version(client, name, run_id, digest)
            if version is None:
                # One folder per bundle of a run: a later bundle must not change what an earlier version serves.
                source = _upload(client, bundle, run_id, folder_name=f"bundle-{digest[:16]}")
                _ensure_model(client, name)
                lineage = parts.manifest["lineage"]
                tags = {
                    "bundle_sha256": digest,
                    "verdict": parts.certificate["verdict"],
                    "tier": parts.certificate["tier"],
                    "certified": str(certified).lower(),
                    "weight_format": parts.weight_format,
                    **{key: str(lineage[key]) for key in LINEAGE_TAGS if lineage.get(key) is not None},
                }
                made = _create_version(
                    client, name, source, run_id=run_id, tags=tags, description=parts.certificate["statement"]
                )
                version = _find_version(client, name, run_id, digest) or made
                if version != made:  # another process was registering the same bundle
                    client.delete_model_version(name, made)
            if certified:
                _set_alias(client, name, version)
        except Exception as error:  # a damaged SQLite file raises SQLAlchemy's own
            raise UserError(
                f"MLflow at {tracking_uri}: {why(tracking_uri, error)}; check tracking.uri and post.register_as"
            ) from error
    return {"version": str(version), "uri": f"models:/{name}/{version}", "alias": ALIAS if certified else None}


def save_pyfunc(bundle: Path, folder: Path) -> None:
    """Write the bundle as an MLflow model (models from code, no pickle) to a new local folder."""
    import mlflow
    from mlflow.models import ModelSignature
    from mlflow.types import ParamSchema, ParamSpec

    parameters = [
        ParamSpec("max_new_tokens", "long", 128),
        ParamSpec("temperature", "double", 0.0),
        ParamSpec("top_k", "long", 0),
        ParamSpec("top_p", "double", 1.0),
        ParamSpec("stop", "string", [], shape=(-1,)),
        ParamSpec("seed", "long", 0),
    ]
    packages = Path(__file__).resolve().parents[2]
    mlflow.pyfunc.save_model(
        path=folder,
        python_model=str(Path(__file__).with_name("mlflow_model.py")),
        artifacts={"bundle": str(bundle)},
        # No input schema: it would reject a plain list of texts.
        signature=ModelSignature(params=ParamSchema(parameters)),
        code_paths=[str(packages / "pipeline"), str(packages / "pldr_model")],
        pip_requirements=_requirements(),
    )


def _upload(client: Any, bundle: Path, run_id: str, *, folder_name: str) -> str:
    """Save and upload the model; returns its URL among the run's artifacts."""
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
