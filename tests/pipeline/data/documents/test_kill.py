"""kill -9 at any time, then start again: the same bytes as without, damaged files are made again, no process survives."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from pipeline.config.paths import RunPaths
from pipeline.config.run import RunConfig
from pipeline.data.documents.shard import shard_documents
from pipeline.data.tokens.tokenize import tokenize_documents
from pipeline.data.tokens.train_tokenizer import make_tokenizer
from pipeline.errors import UserError
from tests.pipeline.data.run_stage import STAGES

MakeConfig = Callable[..., RunConfig]
Contents = Callable[[Path], dict[str, bytes]]
FOLDERS = {"shard": "documents", "tokenize": "tokens"}
PANGRAM = "sphinx of black quartz judge my vow pack five dozen liquor jugs in the box thou hast her"
# What must be in the stage's folder (documents/ or tokens/) or among its markers at the kill.
MOMENTS: dict[str, Callable[[Path, Path], bool]] = {
    "while a tar is written": lambda out, logs: any(out.glob(".*.spool.tmp")),
    "when some tars are published": lambda out, logs: any(out.glob("*.tar")),
    "when one task is marked": lambda out, logs: any(markers(logs)),
}


def markers(logs: Path) -> list[Path]:
    """Markers of the job that writes the tars; stage shard has other jobs before."""
    return [*logs.glob("shard-*/write/completions/*"), *logs.glob("tokenize-*/completions/*")]


@pytest.fixture(scope="module")
def big(tmp_path_factory: pytest.TempPathFactory, make_config: MakeConfig) -> tuple[Path, RunPaths]:
    """Enough small documents for a few seconds of work, and the uninterrupted run."""
    corpus = tmp_path_factory.mktemp("many")
    for number in range(4):
        texts = (
            f"file {number} line {n}\n" + " ".join(PANGRAM.split()[n % 7 :: n % 5 + 1]) + f"\n{n * n}\n"
            for n in range(4000)
        )
        lines = (json.dumps({"text": text}) for text in texts)
        (corpus / f"{number}.jsonl").write_text("\n".join(lines))
    root = tmp_path_factory.mktemp("whole")
    config, paths = configure(make_config, root, corpus, workers=2), RunPaths(root)
    shard_documents(config, paths)
    make_tokenizer(config, paths)
    tokenize_documents(config, paths)
    return corpus, paths


def configure(make_config: MakeConfig, root: Path, corpus: Path, *, workers: int) -> RunConfig:
    data = {"tasks": 4, "workers": workers}
    return make_config(root, str(corpus), data=data, tokens={"workers": workers, "block_sequences": 64}, vocab_size=300)


def prepare(stage: str, root: Path, whole: RunPaths) -> RunPaths:
    paths = RunPaths(root)
    if stage == "tokenize":
        shutil.copytree(whole.documents, paths.documents)
        shutil.copytree(whole.tokenizer.parent, paths.tokenizer.parent)
    return paths


def poll(condition: Callable[[], bool], seconds: float = 60) -> Iterator[None]:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "did not happen"
        yield


CASES = [
    ("shard", "while a tar is written", 1),
    ("tokenize", "when one task is marked", 1),
    pytest.param("shard", "when one task is marked", 2, marks=pytest.mark.slow),
    pytest.param("tokenize", "while a tar is written", 2, marks=pytest.mark.slow),
    *(pytest.param(stage, "when some tars are published", 2, marks=pytest.mark.slow) for stage in STAGES),
]


@pytest.mark.parametrize(("stage", "moment", "workers"), CASES)
def test_killed_and_started_again(
    stage: str,
    moment: str,
    workers: int,
    tmp_path: Path,
    big: tuple[Path, RunPaths],
    make_config: MakeConfig,
    contents: Contents,
    repository: Path,
) -> None:
    corpus, whole = big
    paths = prepare(stage, tmp_path, whole)
    config = configure(make_config, tmp_path, corpus, workers=workers)
    output = tmp_path / FOLDERS[stage]
    command = [sys.executable, "-m", "tests.pipeline.data.run_stage", stage, json.dumps(config.as_dict())]
    child = subprocess.Popen(command, cwd=repository)
    for _ in poll(lambda: MOMENTS[moment](output, paths.logs)):
        assert child.poll() is None, "ended before it could be killed"
        time.sleep(0.0005)
    family = psutil.Process(child.pid).children(recursive=True)
    child.send_signal(signal.SIGKILL)
    child.wait()
    _, alive = psutil.wait_procs(family, timeout=10)
    assert not alive, "workers outlived the killed run"
    assert not (output / "index.json").exists()
    finished = {path.name for path in markers(paths.logs)}
    stamps = {path.name: path.stat().st_mtime_ns for path in output.glob("*.tar")}

    STAGES[stage](config, paths)
    assert contents(output) == contents(getattr(whole, FOLDERS[stage]))
    if stage == "tokenize":  # task i is document shard i
        shards = [shard["name"] for shard in json.loads((paths.documents / "index.json").read_text())["shards"]]
        kept = {shards[int(rank)] for rank in finished}
        assert all(stamps[name] == (output / name).stat().st_mtime_ns for name in kept & set(stamps))
    else:
        kept = {name for name in stamps if name[-9:-4] in finished}
        assert all(stamps[name] == (output / name).stat().st_mtime_ns for name in kept)


def test_a_killed_worker_is_an_error_not_a_hang(
    tmp_path: Path, big: tuple[Path, RunPaths], make_config: MakeConfig, contents: Contents
) -> None:
    corpus, whole = big
    config, paths = configure(make_config, tmp_path, corpus, workers=2), RunPaths(tmp_path)
    errors: list[BaseException] = []

    def run() -> None:
        try:
            shard_documents(config, paths)
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    for _ in poll(lambda: any(paths.documents.glob(".train*.spool.tmp"))):
        assert thread.is_alive()
    spool = next(paths.documents.glob(".train*.spool.tmp"))
    os.kill(int(spool.name.split(".tar.")[1].split(".")[0]), signal.SIGKILL)  # the writer's process id is in the name
    thread.join(timeout=60)
    (error,) = errors
    assert isinstance(error, UserError) and "a worker process died" in str(error) and "data.workers" in str(error)
    shard_documents(config, paths)
    assert contents(paths.documents) == contents(whole.documents)


def test_a_killed_process_leaves_no_temporary_file(tmp_path):
    code = (
        "import os, signal; from datatrove.data import Document; from pipeline.data.documents.write import _Repeats\n"
        "repeats = _Repeats().__enter__(); repeats.add(Document('text', 'a', metadata={}))\n"
        "assert [document.id for document in repeats.read()] == ['a'] == [document.id for document in repeats.read()]\n"
        "print('read', flush=True); os.kill(os.getpid(), signal.SIGKILL)"
    )
    environment = {**os.environ, "TMPDIR": str(tmp_path), "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.stdout == "read\n", done.stderr
    assert not list(tmp_path.iterdir())
