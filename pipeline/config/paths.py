"""Where a run keeps what."""

from __future__ import annotations

import contextlib
from pathlib import Path

from pipeline.config.run import RunConfig
from pipeline.errors import ConfigError, UserError
from pipeline.io.storage import read_json, sha256_json

OF = "of"  # in a stage's record: the run directory that its outputs are in, when it is another run's


class RunPaths:
    """Where a run keeps what. All under `run_dir`."""

    def __init__(self, run_dir: str | Path) -> None:
        self.root = expanded(run_dir, "run_dir")
        self.documents = self.root / "documents"
        self.tokenizer = self.root / "tokenizer" / "tokenizer.model"
        self.tokens = self.root / "tokens"
        self.checkpoints = self.root / "checkpoints"
        self.weights = self.root / "weights"
        self.g_lm = self.root / "g_lm"
        self.certificate = self.root / "certificate"
        self.bundle = self.root / "bundle"
        self.evaluations = self.root / "evaluations"
        self.stages = self.root / "stages"
        self.logs = self.root / "logs"
        self.profiles = self.logs / "profile"
        self.memory = self.logs / "memory"
        self.recordings = self.recordings_of(self.logs / "job.json")

    @staticmethod
    def ranks_of(job_file: Path) -> Path:
        """Where the ranks of a job write their heartbeats: beside its file, in logs/."""
        return job_file.parent / "ranks"

    @staticmethod
    def recordings_of(job_file: Path) -> Path:
        """Where the ranks of a job write their last collectives, as `recordings`."""
        return job_file.parent / "flight-recorder"


def expanded(path: str | Path, key: str) -> Path:
    """An absolute path; `~` is the user's home. Raises ConfigError naming the key for a user without one (in a container)."""
    try:
        return Path(path).expanduser().absolute()
    except RuntimeError:
        raise ConfigError(f"{key} {path}: this user has no home directory; set HOME, or write the path out") from None


def data_paths(config: RunConfig) -> RunPaths:
    """The run directory with a run's documents, tokenizer and tokens: its own, or another run's, whose data it uses in place
    (`data.of`; without it what the run took before)."""
    own = RunPaths(config.run_dir)
    if config.data.of is None:
        return RunPaths(borrowed_from(own) or own.root)
    theirs = RunPaths(expanded(config.data.of, "data.of"))
    return RunPaths(borrowed_from(theirs) or theirs.root)


def borrowed_from(paths: RunPaths) -> str | None:
    """The run directory whose data a run directory uses in place, by its stage records (pipeline/stages/borrow.py)."""
    for stage in ("shard", "tokenizer", "tokenize"):
        with contextlib.suppress(UserError, OSError, AttributeError):  # damaged: found by whoever needs the record
            of = read_json(paths.stages / f"{stage}.json").get(OF)
            if isinstance(of, str):
                return of
    return None


def documents_folder(config: RunConfig) -> str:
    """Where the document tars are: a path, or the URL `data.output`."""
    return config.data.output or str(data_paths(config).documents)


def tokens_folder(config: RunConfig) -> str:
    """Where the token tars are: a path, or the URL `tokens.output`."""
    return config.tokens.output or str(data_paths(config).tokens)


def staging_folder(config: RunConfig) -> Path | None:
    """Where this run's checkpoints are written first on each node, below `train.staging`: its own folder, or None."""
    if config.train.staging is None:
        return None
    root = str(RunPaths(config.run_dir).root)
    return expanded(config.train.staging, "train.staging") / f"{config.name}-{sha256_json(root)[:12]}"
