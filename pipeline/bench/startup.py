"""How fast the command line starts: whole `pldr` commands, each in a new process, interleaved; the median counts.

The commands are those that do little work, so that imports are most of their time: `--help`, a run with a wrong key,
`check`, `runs` on a store with one run, and, with a bundle, `bundle verify` (less the time to hash the bundle's files here).
On a busy machine look at the processor's seconds. `python -X importtime -m launch.cli ...` shows which import takes how long.
"""

from __future__ import annotations

import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pipeline.errors import UserError
from pipeline.io.storage import sha256_file
from pipeline.tracking.client import client

PLDR = [sys.executable, "-m", "launch.cli"]
LIMITS_S = {
    "help": 0.3,
    "wrong_key": 1.0,
    "check": 2.0,
    "runs": 3.0,
    "bundle_verify": 3.0,
}  # on an idle machine with a warm disk cache
CONFIG = """
name: startup
run_dir: {folder}/run
data: {{sources: [{{url: {folder}/corpus.txt}}]}}
model: {{vocab_size: 420, context_length: 48, num_layers: 2, num_heads: 2, head_dim: 16}}
train: {{steps: 10, warmup_steps: 1}}
"""


def bench(*, bundle: str | None, repeats: int, report: Callable[[str], None]) -> dict[str, Any]:
    """{"command": {"seconds", "cpu_seconds" (medians), "slowest", "limit_s"}}. bundle_verify also has "hashing_s",
    which is already subtracted.

    Raises UserError when a command does not end as it should.
    """
    with tempfile.TemporaryDirectory(prefix="pldr-startup-") as name:
        config = _make_run(Path(name))
        commands = {
            "help": (["--help"], 0),
            "wrong_key": (["run", str(config), "trian.steps=3"], 2),
            "check": (["check", str(config)], 0),
            "runs": (["runs", str(config)], 0),
        }
        if bundle is not None:
            commands["bundle_verify"] = (["bundle", "verify", bundle], 0)
        times: dict[str, list[tuple[float, float]]] = {command: [] for command in commands}
        for _ in range(repeats):
            for command, (words, exit_code) in commands.items():
                times[command].append(_seconds(words, exit_code))
    hashing_s = 0.0 if bundle is None else _hashing(Path(bundle))
    result: dict[str, Any] = {}
    report(f"{'command':<16} {'seconds':>8} {'cpu':>8} {'slowest':>8} {'limit':>8}")
    for command, measured in times.items():
        less = hashing_s if command == "bundle_verify" else 0.0
        row = {
            "seconds": statistics.median(seconds for seconds, _ in measured) - less,
            "cpu_seconds": statistics.median(cpu for _, cpu in measured) - less,
            "slowest": max(seconds for seconds, _ in measured) - less,
            "limit_s": LIMITS_S[command],
        }
        result[command] = {**row, "hashing_s": hashing_s} if command == "bundle_verify" else row
        over = "" if row["seconds"] <= row["limit_s"] else "  over the limit"
        numbers = f"{row['seconds']:>8.2f} {row['cpu_seconds']:>8.2f} {row['slowest']:>8.2f} {row['limit_s']:>8.1f}"
        report(f"{command:<16} {numbers}{over}")
    return result


def _make_run(folder: Path) -> Path:
    """The YAML of a run, with an MLflow store that has one training run."""
    config = folder / "startup.yaml"
    (folder / "corpus.txt").write_text("To be, or not to be, that is the question.\n", encoding="utf-8")
    config.write_text(CONFIG.format(folder=folder), encoding="utf-8")
    mlflow = client(f"sqlite:///{folder / 'run' / 'mlflow.db'}")
    run = mlflow.create_run(mlflow.create_experiment("pldr"))
    mlflow.log_param(run.info.run_id, "train.steps", "10")
    mlflow.set_tag(run.info.run_id, "pldr.checkpoints", "")
    return config


def _seconds(words: list[str], exit_code: int) -> tuple[float, float]:
    """How long a command takes, and how much processor time."""
    started, cpu_started = time.perf_counter(), _cpu_of_children()
    done = subprocess.run([*PLDR, *words], capture_output=True, text=True)
    seconds, cpu_seconds = time.perf_counter() - started, _cpu_of_children() - cpu_started
    if done.returncode != exit_code:
        raise UserError(f"pldr {' '.join(words)}: exit code {done.returncode}: {done.stderr.strip()[-300:]}")
    return seconds, cpu_seconds


def _cpu_of_children() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def _hashing(bundle: Path) -> float:
    started = time.perf_counter()
    for file in bundle.iterdir():
        sha256_file(file)
    return time.perf_counter() - started
