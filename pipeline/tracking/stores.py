"""Where a run's checkpoints are published: the artifacts of its MLflow run, or a folder under any fsspec URL.

Both keep the commit protocol: COMMITTED is uploaded last and removed first, so an incomplete checkpoint is never taken for one.
Whoever fetches a checkpoint checks its bytes against the manifest (`verify` of pipeline/checkpoint/format.py).
"""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Protocol

from pipeline.checkpoint.format import COMMITTED, is_checkpoint_name
from pipeline.io.remote import filesystem_of, open_retrying, retrying
from pipeline.io.storage import safe_member
from pipeline.io.urls import is_local, join, public_url
from pipeline.tracking.client import client, is_unreachable, patience
from pipeline.tracking.sqlite_store import keep_home

FOLDER = "checkpoints"  # among the artifacts
ATTEMPTS, WAIT_S = 3, 0.5  # of one file to MLflow; publish.py retries a whole publication


class CheckpointStore(Protocol):
    """Published checkpoints of one run, by name (`step-000500`)."""

    def listing(self) -> dict[str, bool]:
        """Name -> whether it is committed, newest first. What is not committed is left of an interrupted upload or removal."""
        ...

    def read(self, name: str, member: str) -> bytes:
        """A small file of a checkpoint: `COMMITTED`, `state.json`."""
        ...

    def upload(self, checkpoint: Path) -> None:
        """Publish a local checkpoint under an unused name, COMMITTED last. Raises what the store raises."""
        ...

    def remove(self, name: str) -> None:
        """Remove everything under a name, COMMITTED first."""
        ...

    def download(self, name: str, folder: Path) -> None:
        """Copy a checkpoint's files into a local folder."""
        ...


class MlflowStore:
    """The artifacts of an MLflow run."""

    def __init__(self, uri: str, run_id: str) -> None:
        self._uri, self._run_id = uri, run_id
        keep_home(uri)
        self._client = client(uri)

    def __str__(self) -> str:
        return f"MLflow run {self._run_id}"

    def listing(self) -> dict[str, bool]:
        found = self._members(FOLDER)
        return {name: COMMITTED in self._members(f"{FOLDER}/{name}") for name in _newest_first(found)}

    def _members(self, folder: str) -> list[str]:
        return [Path(item.path).name for item in self._client.list_artifacts(self._run_id, folder)]

    def read(self, name: str, member: str) -> bytes:
        with tempfile.TemporaryDirectory(prefix="pldr-artifact-") as folder:
            path = self._client.download_artifacts(self._run_id, f"{FOLDER}/{name}/{member}", folder)
            return Path(path).read_bytes()

    def upload(self, checkpoint: Path) -> None:
        with patience():
            for path in _committed_last(checkpoint):
                folder = Path(FOLDER) / checkpoint.name / path.parent.relative_to(checkpoint)
                self._with_retries(partial(self._client.log_artifact, self._run_id, str(path), folder.as_posix()))

    def _with_retries(self, action: Callable[[], None]) -> None:
        for attempt in range(ATTEMPTS):
            try:
                return action()
            except Exception as error:
                if attempt + 1 == ATTEMPTS or not is_unreachable(self._uri, error):
                    raise
                time.sleep(WAIT_S * 2**attempt)

    def remove(self, name: str) -> None:
        from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository

        artifacts = self._client.get_run(self._run_id).info.artifact_uri
        repository = get_artifact_repository(artifacts, tracking_uri=self._uri)
        members = self._members(f"{FOLDER}/{name}")
        with patience():
            if COMMITTED in members:
                repository.delete_artifacts(f"{FOLDER}/{name}/{COMMITTED}")
            if members:
                repository.delete_artifacts(f"{FOLDER}/{name}")

    def download(self, name: str, folder: Path) -> None:
        with patience(), tempfile.TemporaryDirectory(prefix=".mlflow-", dir=folder) as temporary:
            got = Path(self._client.download_artifacts(self._run_id, f"{FOLDER}/{name}", temporary))
            for path in list(got.iterdir()):  # how deep it puts them depends on the store
                path.rename(folder / path.name)


class UrlStore:
    """A folder under an fsspec URL: s3://…, gs://…, or a path that other machines see."""

    def __init__(self, url: str) -> None:
        self._url = url.rstrip("/")

    def __str__(self) -> str:
        return public_url(self._url)

    def listing(self) -> dict[str, bool]:
        found = set(self._files(""))
        names = _newest_first({file.split("/")[0] for file in found})
        return {name: f"{name}/{COMMITTED}" in found for name in names}

    def _files(self, below: str) -> list[str]:
        """Names of the files below a folder, relative to it."""
        url = join(self._url, below) if below else self._url
        filesystem, path = filesystem_of(url)
        prefix = path.rstrip("/") + "/"
        try:
            found: list[str] = retrying(url, lambda: filesystem.find(path), what="listed")
        except FileNotFoundError:
            return []
        return [name.removeprefix(prefix) for name in found if name.startswith(prefix)]

    def read(self, name: str, member: str) -> bytes:
        with open_retrying(join(self._url, name, member)) as stream:
            return stream.read()

    def upload(self, checkpoint: Path) -> None:
        for path in _committed_last(checkpoint):
            self._put(path, join(self._url, checkpoint.name, path.relative_to(checkpoint).as_posix()))

    def _put(self, source: Path, url: str) -> None:
        filesystem, path = filesystem_of(url)
        size = source.stat().st_size

        def put() -> None:
            if is_local(url):  # other stores have no folders to make
                Path(path).parent.mkdir(parents=True, exist_ok=True)
            filesystem.put_file(str(source), path)
            filesystem.invalidate_cache()
            found = filesystem.info(path)["size"]
            if found != size:
                raise EOFError(f"{found} bytes arrived, {size} were sent")

        retrying(url, put, what="written")

    def remove(self, name: str) -> None:
        members = self._files(name)
        for member in [COMMITTED] * (COMMITTED in members) + [m for m in members if m != COMMITTED]:
            url = join(self._url, name, member)
            filesystem, path = filesystem_of(url)
            retrying(url, partial(filesystem.rm_file, path), what="removed")
        if is_local(self._url):
            shutil.rmtree(Path(filesystem_of(join(self._url, name))[1]), ignore_errors=True)

    def download(self, name: str, folder: Path) -> None:
        for member in self._files(name):
            target = folder / safe_member(member)
            target.parent.mkdir(parents=True, exist_ok=True)
            with open_retrying(join(self._url, name, member)) as source, open(target, "wb") as stream:
                shutil.copyfileobj(source, stream, 1 << 20)


def names_in(store: CheckpointStore) -> list[str]:
    """The committed checkpoints of a store, newest first."""
    return [name for name, is_committed in store.listing().items() if is_committed]


def store_at(uri: str, run_id: str, url: str | None) -> CheckpointStore:
    """The folder `url`, or without one the artifacts of the run."""
    return UrlStore(url) if url is not None else MlflowStore(uri, run_id)


def _committed_last(checkpoint: Path) -> list[Path]:
    files = sorted(p for p in checkpoint.rglob("*") if p.is_file() and p.name != COMMITTED)
    return [*files, checkpoint / COMMITTED]


def _newest_first(names: Iterable[str]) -> list[str]:
    found = [name for name in names if is_checkpoint_name(name)]
    return sorted(found, key=lambda name: (len(name), name), reverse=True)
