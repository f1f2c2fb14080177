"""What a data stage would replace, and whether it may: data of another configuration, and data that a model was trained with,
only with `--replace`."""

from __future__ import annotations

from typing import Any

from pipeline.checkpoint.format import committed
from pipeline.config.keys import of_stage
from pipeline.config.load import parse_config
from pipeline.config.paths import RunPaths, documents_folder, tokens_folder
from pipeline.config.run import RunConfig
from pipeline.errors import ConfigError, UserError
from pipeline.io import storage
from pipeline.io.sealed import read_sealed
from pipeline.io.urls import join, public_url
from pipeline.stages.table import Stage, stages_before

SETTINGS = "settings"  # of a record: a digest of the configuration that the stage reads, without its files


def settings_digest(config: RunConfig, stage: Stage) -> str:
    """A digest of the configuration that decides a stage's output."""
    return storage.sha256_json(of_stage(config, stage.name))


def require_replaceable(
    config: RunConfig, paths: RunPaths, stage: Stage, record: dict[str, Any] | None, digest: str
) -> None:
    """Raise ConfigError, saying what would be lost, where a data stage that is about to run would replace what another
    configuration made, or what a model here was trained with. Data that would only be made again are replaced without a word.

    record: of what is there (None: unfinished, or its record is damaged); digest: of the inputs today.
    """
    if stage.data is None or (record is not None and record["inputs"] == digest):
        return
    checkpoints = committed(paths.checkpoints)
    trained = checkpoints[-1].name if checkpoints else None
    ours = _made_with(config, paths, stage, record)
    if ours and (trained is None or _is_old(record)):
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
    raise ConfigError(f"{problem}; use another run_dir, or `pldr {stage.name} CONFIG --replace`: {lost}")


def _made_with(config: RunConfig, paths: RunPaths, stage: Stage, record: dict[str, Any] | None) -> bool:
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
    folder = {"shard": config.data.output, "tokenize": config.tokens.output}.get(stage.name)
    return folder is not None and storage.exists(join(folder, "index.json"))
