"""What a run leaves behind, area by area: its files, what a user does next with them, and what must come out the same."""

from __future__ import annotations

import json
import shutil
import sqlite3
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from pipeline.io.sealed import publish_sealed

HALF = 250  # the step up to which the store of "spool" has the metrics
MORE = ("train", "tiny.yaml", "--prepare", "1")  # all that a resume does before ranks start


@dataclass(frozen=True)
class Area:
    """files: globs below the run directory. commands: of a user, in order, in the folder of tiny.yaml. prepare: what happened
    before. same: files (globs) whose bytes must be those of the undamaged run when every command succeeds; of mlflow.db what it
    holds. covered: whether every wrong value must be found."""

    files: tuple[str, ...]
    commands: tuple[tuple[str, ...], ...]
    prepare: Callable[[Path], None] = lambda run: None
    same: tuple[str, ...] = ()
    covered: bool = True


def _unfinished(run: Path) -> None:
    """Killed after the last task and before the index."""
    for name in ("shard", "tokenize"):
        (run / "stages" / f"{name}.json").unlink()
    shutil.rmtree(run / "checkpoints")
    shutil.rmtree(run / "stages")


def _elsewhere(run: Path) -> None:
    """The run directory has no checkpoint: they come from MLflow's artifacts."""
    shutil.rmtree(run / "checkpoints")
    (run / "stages" / "train.json").unlink()


def _outage(run: Path) -> None:
    """MLflow has never heard of the run; everything waits in the run directory."""
    shutil.copy2(run.parent / "empty.db", run / "mlflow.db")
    record = json.loads((run / "run.json").read_bytes())
    record.pop("digest")
    publish_sealed(run / "run.json", {**record, "run_id": None}, free=("tracking_uri",))
    publish_sealed(spool(run).with_suffix(".sent"), {"sent": 0, "written": spool(run).stat().st_size})
    _pending(run)


def _half_sent(run: Path) -> None:
    """MLflow was lost in the middle of the run."""
    with sqlite3.connect(run / "mlflow.db") as database:
        database.execute("DELETE FROM metrics WHERE step > ?", (HALF,))
        database.execute("DELETE FROM latest_metrics")
        database.execute(
            "INSERT INTO latest_metrics (key, value, timestamp, step, is_nan, run_uuid) SELECT key, value, timestamp, "
            "max(step), is_nan, run_uuid FROM metrics GROUP BY run_uuid, key"
        )
    lines = spool(run).read_bytes().splitlines(keepends=True)
    sent = sum(len(line) for line in lines if json.loads(line)["step"] <= HALF)
    publish_sealed(spool(run).with_suffix(".sent"), {"sent": sent, "written": spool(run).stat().st_size})
    _pending(run)


def _pending(run: Path) -> None:
    """The certificate, a tag and the end wait, too."""
    from pipeline.config.paths import RunPaths
    from pipeline.tracking.outbox import Pending

    Pending(
        {"certificate/certificate.json": "again"}, {"pldr.verdict": "certified"}, "FINISHED", 1_800_000_000_000
    ).write(RunPaths(str(run)))


def spool(run: Path) -> Path:
    """The run's metrics."""
    return next((run / "logs").glob("metrics-*.jsonl"))


Y = "tiny.yaml"
SAY = ("generate", "run/bundle", "--prompt", "ab", "--max-new-tokens", "12", "--seed", "1")
AREAS = {
    "documents": Area(
        ("documents/*",),
        (("data", "verify", Y), ("tokenize", Y, "--force"), ("data", "report", Y), ("shard", Y), ("tokenize", Y)),
        same=("documents/*", "tokens/*"),
    ),
    "tokens": Area(
        ("tokens/*",),
        (
            ("data", "verify", Y),
            ("data", "show", "run/tokens", "17"),
            ("extract", Y, "--force"),
            ("validate", Y, "--force"),
            MORE,
            ("tokenize", Y),
        ),
        same=("tokens/*", "g_lm/*", "certificate/certificate.json"),
    ),
    "tokenizer": Area(
        ("tokenizer/*",),
        (("tokenize", Y, "--force"), MORE, ("bundle", Y, "--force"), ("tokenizer", Y)),
        same=("tokens/*", "bundle/*", "tokenizer/*"),
    ),
    "tasks": Area(
        ("logs/shard-*/**/*", "logs/tokenize-*/**/*"),
        (("shard", Y), ("tokenizer", Y), ("tokenize", Y)),
        prepare=_unfinished,
        same=("documents/*", "tokens/*"),
    ),
    "checkpoints": Area(
        ("checkpoints/**/*",), (("consolidate", Y, "--force"), MORE, ("train", Y)), same=("weights/*",)
    ),
    "published": Area(("mlartifacts/**/checkpoints/**/*",), (MORE,), prepare=_elsewhere, same=("checkpoints/**/*",)),
    "run.json": Area(
        ("run.json",), (("report", Y), ("track", "replay", Y), ("bundle", Y, "--force"), MORE), same=("mlflow.db",)
    ),
    "outage": Area(
        ("run.json", "logs/pending.json", "logs/metrics-*.jsonl"),
        (("track", "replay", Y),),
        prepare=_outage,
        same=("mlflow.db",),
    ),
    "spool": Area(
        ("logs/pending.json", "logs/metrics-*.jsonl", "logs/metrics-*.sent"),
        (("track", "replay", Y),),
        prepare=_half_sent,
        same=("mlflow.db",),
    ),
    "records": Area(
        ("stages/*.json",),
        (("run", Y), ("bundle", Y)),
        same=("weights/*", "g_lm/*", "certificate/certificate.json", "bundle/*"),
    ),
    "job": Area(("logs/job.json",), (("report", "run"), ("track", "replay", "run")), same=("mlflow.db",)),
    "weights": Area(
        ("weights/*",),
        (
            ("export", "run/weights", "run/out.safetensors"),
            ("extract", Y, "--force"),
            ("validate", Y, "--force"),
            ("bundle", Y, "--force"),
        ),
        same=("out.safetensors", "g_lm/*", "certificate/certificate.json", "bundle/*"),
    ),
    "g_lm": Area(
        ("g_lm/*",),
        (("validate", Y, "--force"), ("bundle", Y, "--force")),
        same=("certificate/certificate.json", "bundle/*"),
    ),
    "certificate": Area(
        ("certificate/certificate.json",), (("bundle", Y, "--force"), ("validate", Y), ("run", Y)), same=("bundle/*",)
    ),
    "bundle": Area(("bundle/*",), (("bundle", "verify", "run/bundle"), SAY, ("run", Y)), same=("bundle/*",)),
    "store": Area(("mlflow.db",), (("runs", Y), ("report", Y), ("track", "replay", Y)), covered=False),
}
