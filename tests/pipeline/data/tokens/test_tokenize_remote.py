"""Stage tokenize between object stores: the same bytes as on a disk despite failures, and no leftovers."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from pipeline.config.paths import RunPaths
from pipeline.config.run import RunConfig
from pipeline.data.tokens.index import TokenIndex
from pipeline.data.tokens.tokenize import tokenize_documents
from pipeline.errors import UserError

MakeConfig = Callable[..., RunConfig]
Contents = Callable[[Path], dict[str, bytes]]


def prepare(root: Path, finished: tuple[RunConfig, RunPaths], *, documents: bool = True) -> RunPaths:
    paths = RunPaths(root)
    shutil.copytree(finished[1].tokenizer.parent, paths.tokenizer.parent)
    if documents:
        shutil.copytree(finished[1].documents, paths.documents)
    return paths


def objects(store: Any, folder: str = "tokens") -> dict[str, bytes]:
    """Every object below a folder, hidden ones too."""
    keys: list[str] = store.keys()
    return {key.removeprefix(f"{folder}/"): store.read(key) for key in keys if key.startswith(f"{folder}/")}


def test_tokens_at_a_url_are_the_same_bytes(
    faulty_s3: Any,
    tmp_path: Path,
    corpus: Path,
    make_config: MakeConfig,
    finished: tuple[RunConfig, RunPaths],
    contents: Contents,
) -> None:
    """From documents at a URL to tokens at a URL, with a store that fails and truncates responses."""
    paths = prepare(tmp_path, finished, documents=False)
    for path in finished[1].documents.glob("*.*"):
        faulty_s3.put(f"documents/{path.name}", path.read_bytes())
    faulty_s3.put("tokens/train-000077.tar", b"of an earlier run with more shards")
    faulty_s3.put("tokens/mine.txt", b"of the user")
    config = make_config(
        tmp_path,
        str(corpus),
        data={"output": faulty_s3.url("documents")},
        tokens={"output": faulty_s3.url("tokens")},
    )
    faulty_s3.fail_next(2)
    faulty_s3.truncate_next(2)
    faulty_s3.fail_next(3, method="PUT")
    tokenize_documents(config, paths)
    found = objects(faulty_s3)
    assert found.pop("mine.txt") == b"of the user" and found == contents(finished[1].tokens)
    assert not paths.tokens.exists() and not list(paths.logs.glob("*/spool/.*"))

    for key in ("tokens/val-000001.tar", "tokens/train-000000.tar"):  # lost, and damaged without a change of size
        faulty_s3.put(key, faulty_s3.read(key)[:-1] + b"x")
    faulty_s3.requests.clear()
    tokenize_documents(config, paths)
    assert objects(faulty_s3) == {**found, "mine.txt": b"of the user"}
    written = {path for method, path, _ in faulty_s3.requests if method == "PUT" and path.endswith(".tar")}
    assert {Path(path).name for path in written} == {"val-000001.tar", "train-000000.tar"}


def test_a_store_that_refuses_leaves_no_tokens(
    faulty_s3: Any,
    tmp_path: Path,
    corpus: Path,
    make_config: MakeConfig,
    finished: tuple[RunConfig, RunPaths],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("PLDR_RETRIES", "1")
    paths = prepare(tmp_path, finished)
    config = make_config(tmp_path, str(corpus), tokens={"output": faulty_s3.url("tokens"), "workers": 1})
    faulty_s3.fail_next(100, method="PUT")
    with pytest.raises(UserError, match=r"tokens/\S+\.tar: cannot be written, 2 attempts failed"):
        tokenize_documents(config, paths)
    assert objects(faulty_s3) == {}
    with pytest.raises(UserError, match="no finished tokens"):
        TokenIndex.load(faulty_s3.url("tokens"))


@pytest.mark.parametrize(
    "moment",
    [
        "while a shard is on its way",
        pytest.param("when some shards are published", marks=pytest.mark.slow),
    ],
)
def test_killed_and_started_again(
    moment: str,
    faulty_s3: Any,
    tmp_path: Path,
    corpus: Path,
    make_config: MakeConfig,
    finished: tuple[RunConfig, RunPaths],
    contents: Contents,
    repository: Path,
) -> None:
    paths = prepare(tmp_path, finished)
    config = make_config(tmp_path, str(corpus), tokens={"output": faulty_s3.url("tokens"), "workers": 1})
    command = [sys.executable, "-m", "tests.pipeline.data.run_stage", "tokenize", json.dumps(config.as_dict())]
    child = subprocess.Popen(command, cwd=repository)
    ending = ".tmp" if moment == "while a shard is on its way" else ".tar"
    end = time.monotonic() + 60
    while not any(key.endswith(ending) for key in faulty_s3.keys()):  # noqa: SIM118 - a method of the store
        assert child.poll() is None and time.monotonic() < end
    family = psutil.Process(child.pid).children(recursive=True)
    child.send_signal(signal.SIGKILL)
    child.wait()
    _, alive = psutil.wait_procs(family, timeout=10)
    assert not alive, "workers outlived the killed run"
    assert "index.json" not in objects(faulty_s3)

    tokenize_documents(config, paths)
    assert objects(faulty_s3) == contents(finished[1].tokens)
    assert not list(paths.logs.glob("*/spool/.*"))
