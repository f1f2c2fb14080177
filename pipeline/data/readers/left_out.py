"""What of a folder or glob is never input: hidden entries, and what this program wrote itself.

Hidden entries (names that begin with a dot: `.ipynb_checkpoints`, `._x`, `.git`) hold copies, caches and settings. As in a
shell, a glob takes them only if it names them (`**/.notes/*.txt`). A run's own files (reports, model cards, lists of removed
documents) would come back as documents when the run is repeated. The run's folders are known from the configuration, and other
runs' by the files that mark them. A file that is named as a source is always read.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from fsspec.implementations.local import LocalFileSystem

from pipeline.errors import UserError
from pipeline.io.urls import is_local, local_path

# What a run directory holds (pipeline/config/paths.py), and where MLflow puts what runs log.
RUN_ENTRIES = frozenset(
    [
        "documents",
        "tokenizer",
        "tokens",
        "checkpoints",
        "weights",
        "g_lm",
        "certificate",
        "bundle",
        "stages",
        "logs",
        "report",
    ]
)
MLFLOW = frozenset(("mlartifacts", "mlruns"))
SIBLINGS = {  # names of ours outside of a run directory, and a file beside each that makes it ours
    "removed": "index.json",
    "README.md": "g_lm.safetensors",
    "certificate.html": "certificate.json",
    "sweep.html": "sweep.json",
}


class LeftOut:
    """Decides for the entries below `root`, and remembers which were left out.

    exists: whether a path is there. is_cheap: whether asking costs nothing; else only names that are ours are asked about.
    outputs: folders that this run writes, below `real_root` if the root is a link. After use, `hidden` and `ours` are the
    entries that were left out, each without what is in it.
    """

    def __init__(
        self,
        root: str,
        exists: Callable[[str], bool],
        *,
        is_cheap: bool,
        outputs: Iterable[str],
        real_root: str,
        take_hidden: bool,
    ) -> None:
        self.hidden: set[str] = set()
        self.ours: set[str] = set()
        self._root = root.rstrip("/")
        self._exists = exists
        self._is_cheap = is_cheap
        self._outputs = frozenset(outputs)
        self._take_hidden = take_hidden
        self._real_root = real_root.rstrip("/")
        self._folders: dict[str, bool] = {}

    def has(self, path: str) -> bool:
        """Whether an entry below the root, or a folder that it is in, is left out."""
        parent, _, name = path.rpartition("/")
        return self._has_folder(parent) or self._is_left_out(path, name)

    def _has_folder(self, path: str) -> bool:
        if len(path) <= len(self._root):
            return False
        if path not in self._folders:
            self._folders[path] = self.has(path)
        return self._folders[path]

    def _is_left_out(self, path: str, name: str) -> bool:
        if name.startswith(".") and not self._take_hidden:
            self.hidden.add(path)
            return True
        if self._is_ours(path, name):
            self.ours.add(path)
            return True
        return False

    def _is_ours(self, path: str, name: str) -> bool:
        parent = path[: -len(name) - 1]
        if name in MLFLOW or self._real_root + path[len(self._root) :] in self._outputs:
            return True
        if name in SIBLINGS and self._exists(f"{parent}/{SIBLINGS[name]}"):
            return True
        return (self._is_cheap and self._is_run(path)) or (name in RUN_ENTRIES and self._is_run(parent))

    def _is_run(self, path: str) -> bool:
        """Whether it is the folder of a run: the lock of one, and what its first stage makes."""
        made = ("stages", "logs", "report", "run.json")
        return self._exists(f"{path}/.lock") and any(self._exists(f"{path}/{name}") for name in made)


class LocalFolders(LocalFileSystem):  # type: ignore[misc]  # fsspec has no types
    """The local file system, listed without what is left out, and never with a folder silently missing: fsspec's own walk
    leaves out folders that cannot be read."""

    def __init__(self, left_out: LeftOut) -> None:
        super().__init__(skip_instance_cache=True)
        self.left_out = left_out

    def walk(
        self, path: str, maxdepth: int | None = None, topdown: bool = True, on_error: Any = None, **options: Any
    ) -> Iterator[tuple[str, dict[str, Any], dict[str, Any]]]:
        """As fsspec's, with details, from the top."""
        waiting = [(self._strip_protocol(path), 1)]
        while waiting:
            folder, depth = waiting.pop()
            dirs: dict[str, Any] = {}
            files: dict[str, Any] = {}
            try:
                listed = self.ls(folder, detail=True)
            except FileNotFoundError:
                if depth == 1 and not os.path.isdir(folder):
                    return
                raise UserError(f"data.sources: {folder}: changed while its files were listed; start again") from None
            for info in listed:
                name = info["name"].rpartition("/")[2]
                if not self.left_out.has(info["name"]):
                    (dirs if info["type"] == "directory" else files)[name] = info
            yield folder, dirs, files
            if maxdepth is None or depth < maxdepth:
                waiting += [(info["name"], depth + 1) for info in dirs.values()]


def below(filesystem: Any, outputs: Iterable[str]) -> list[str]:
    """The folders of `outputs` (paths and URLs) in this file system, as it names them, without symbolic links."""
    if isinstance(filesystem, LocalFileSystem):
        return [os.path.realpath(local_path(url).expanduser()) for url in outputs if is_local(url)]
    protocols = (filesystem.protocol,) if isinstance(filesystem.protocol, str) else filesystem.protocol
    mine = [url for url in outputs if not is_local(url) and url.partition("://")[0] in protocols]
    return [filesystem._strip_protocol(url).rstrip("/") for url in mine]
