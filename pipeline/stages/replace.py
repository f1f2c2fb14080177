"""What a data stage would replace, and whether it may: data of another configuration, and data that a model was trained with,
only with `--replace`."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from typing import Any

from pipeline.checkpoint.format import committed
from pipeline.config.keys import of_stage
from pipeline.config.load import parse_config
from pipeline.config.paths import RunPaths, documents_folder, tokens_folder
from pipeline.config.run import RunConfig
from pipeline.errors import ConfigError, UserError
from pipeline.io import locks, storage
from pipeline.io.sealed import read_sealed
from pipeline.io.urls import is_local, join, local_path, public_url
from pipeline.stages.compatible import Report
from pipeline.stages.table import Stage, stages_before

LOCK = ".lock"  # in a folder of data.output or tokens.output
log = logging.getLogger(__name__)
SETTINGS = "settings"  # of a record: a digest of the configuration that the stage reads, without its files


def settings_digest(config: RunConfig, stage: Stage) -> str:
    """A digest of the configuration that decides a stage's output."""
    return storage.sha256_json(of_stage(config, stage.name))


def require_replaceable(
    config: RunConfig, paths: RunPaths, stage: Stage, record: dict[str, Any] | None, digest: str, report: Report
) -> None:
    """Raise ConfigError, saying what would be lost, where a data stage that is about to run would replace what another
    configuration made, or what a model here was trained with. Data that are only made again because their input changed are
    replaced after a line that says so.

    record: of what is there (None: unfinished, or its record is damaged); digest: of the inputs today.
    """
    if stage.data is None or (record is not None and record["inputs"] == digest):
        return
    checkpoints = committed(paths.checkpoints)
    trained = checkpoints[-1].name if checkpoints else None
    ours = made_with(config, paths, stage, record)
    if ours and (trained is None or _is_old(record)):
        if record is not None:
            lost = "" if trained is None else f"; {trained} in {paths.checkpoints} was trained with what is there now"
            report(f"{stage.name:<12} makes {stage.data} again, because the input has changed since{lost}")
        return
    if not ours and record is None and trained is None and not _is_of_another_run(config, stage):
        return
    folder = {"shard": documents_folder(config), "tokenize": tokens_folder(config)}.get(
        stage.name, str(paths.tokenizer.parent)
    )
    problem = f"{public_url(folder)}: holds {stage.data} that "
    problem += "came of other input than there is now" if ours else "another run or configuration made"
    lost = "what is there is lost then"
    if trained is not None:
        problem += f", and {trained} in {paths.checkpoints} was trained with"
        lost += f", and {trained} can neither be resumed nor validated without it"
    if ours and stage.name == "shard":  # a file is known by its path, size and times
        lost = (
            f"nothing changes if the same files only have other times or paths (a new .venv, a copy); otherwise {lost}"
        )
    raise ConfigError(f"{problem}; use another run_dir, or `pldr {stage.name} CONFIG --replace`: {lost}")


@contextlib.contextmanager
def only_writer(config: RunConfig, stage: Stage) -> Iterator[None]:
    """Be the only one who writes to the folder of `data.output` or `tokens.output`, which other runs may name, too. Raises
    UserError at once when another process writes there: this one would have to replace its data. Object stores and file
    systems without locks have none: there, whose index is written last wins."""
    folder = _output_of(config, stage)
    if folder is None or not is_local(folder):
        yield
        return
    file = local_path(folder).absolute() / LOCK
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        stream = open(file, "a+", encoding="utf-8")  # noqa: SIM115 - closed below
    except OSError as error:
        raise storage.explain_os_error(error, str(file.parent)) from error
    with stream:
        try:
            if not locks.lock(stream):
                raise UserError(
                    f"{file.parent}: process {locks.lock_holder(stream)} writes {stage.data} there; wait for it, or name "
                    f"another folder in {'data' if stage.name == 'shard' else 'tokens'}.output"
                )
        except locks.NoLocks as error:
            log.warning("%s", error)
        yield


def _output_of(config: RunConfig, stage: Stage) -> str | None:
    """The folder outside of the run directory that a stage writes to, if it does."""
    return {"shard": config.data.output, "tokenize": config.tokens.output}.get(stage.name)


def made_with(config: RunConfig, paths: RunPaths, stage: Stage, record: dict[str, Any] | None) -> bool:
    """Whether what is there was made with today's configuration. Records of before December 2026 do not say: there, and
    without a record, the configuration of the last training here decides."""
    if record is not None and SETTINGS in record:
        return bool(record[SETTINGS] == settings_digest(config, stage))
    job = paths.logs / "job.json"
    try:
        trained = parse_config(read_sealed(job, schema_version=1)["config"], where=str(job)) if job.exists() else None
    except (UserError, KeyError, TypeError):
        trained = None
    if trained is None:
        return False
    stages = (*stages_before(stage.name), stage)
    return all(settings_digest(trained, one) == settings_digest(config, one) for one in stages)


def _is_old(record: dict[str, Any] | None) -> bool:
    return record is None or SETTINGS not in record


def _is_of_another_run(config: RunConfig, stage: Stage) -> bool:
    """Whether the folder of `data.output` or `tokens.output`, which other runs may use, holds finished data."""
    folder = _output_of(config, stage)
    return folder is not None and storage.exists(join(folder, "index.json"))
