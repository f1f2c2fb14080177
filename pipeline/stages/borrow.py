"""Documents, tokenizer and tokens of another run, used in place (`data.of`), so that one corpus is prepared once.

Nothing is copied but the records of the other run's data stages. A copy names the other run directory (paths.py, `OF`) and
each file with its size, time and hash: by it every reader finds the data, and each later stage sees that they are as they
were. Decision: the configuration must describe the data as if the run had made them, so that one YAML is one complete run.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Literal

from pipeline.checkpoint.format import committed
from pipeline.config.keys import all_kinds
from pipeline.config.load import parse_config
from pipeline.config.paths import OF, RunPaths, borrowed_from, data_paths
from pipeline.config.run import RunConfig
from pipeline.errors import ConfigError, UserError
from pipeline.io.sealed import publish_sealed, read_sealed
from pipeline.io.urls import is_local
from pipeline.stages.compatible import Report
from pipeline.stages.records import FREE, first_changed, identity, record_file, record_of
from pipeline.stages.replace import made_with
from pipeline.stages.table import STAGES, Stage

# At which outputs: of all the hash; of all the size and time; or that without the shards in an object store, many requests.
Look = Literal["thorough", "all", "quick"]
DATA_STAGES = tuple(stage for stage in STAGES if stage.data is not None)


def lender(config: RunConfig) -> RunPaths | None:
    """The run directory whose data a run uses; None: it makes its own."""
    theirs = data_paths(config)
    return None if _same(theirs.root, RunPaths(config.run_dir).root) else theirs


def explicit(config: RunConfig) -> RunConfig:
    """The configuration with the lender's absolute path in `data.of`, as it is logged and sent to hosts."""
    theirs = lender(config)
    of = None if theirs is None else str(theirs.root)
    return config.model_copy(update={"data": config.data.model_copy(update={"of": of})})


def take(config: RunConfig, paths: RunPaths, theirs: RunPaths, stage: Stage, *, look: Look) -> dict[str, Any]:
    """The record of a data stage of another run, which is copied into this run directory. Raises UserError or ConfigError, one
    line, for data that are not there, not as they were written, of other settings than the configuration's, or others than a
    model here was trained with."""
    own = record_of(paths, stage)
    if own is not None and OF not in own:
        raise ConfigError(
            f"data.of {theirs.root}: {paths.root} has {stage.data} of its own; use another run_dir, or remove data.of"
        )
    found = require(config, theirs, stage, look=look)
    trained = committed(paths.checkpoints)
    if own is not None and identity(own) != identity(found) and trained:
        raise ConfigError(
            f"data.of {theirs.root}: has other {stage.data} ({_what(found)}) than {trained[-1]} was trained with "
            f"({_what(own)}); make those again there, or use another run_dir"
        )
    outputs = {_absolute(name, theirs.root): facts for name, facts in found["outputs"].items()}
    record = {**found, OF: str(theirs.root), "outputs": outputs}
    if record != own:
        publish_sealed(record_file(paths, stage.name), record, free=FREE)
    return record


def require(config: RunConfig, theirs: RunPaths, stage: Stage, *, look: Look = "quick") -> dict[str, Any]:
    """The record of a finished data stage of a run directory whose outputs are as they were written, with the settings of this
    configuration. Raises UserError or ConfigError, one line."""
    found = record_of(theirs, stage)
    if found is None:
        raise ConfigError(
            f"data.of {theirs.root}: has no finished {stage.data} (stages/{stage.name}.json); set data.of to the run directory "
            f"where they are now, or run `pldr {stage.name}` there"
        )
    if not made_with(config, theirs, stage, found):
        raise ConfigError(
            f"data.of {theirs.root}: made its {stage.data} with other settings{_difference(config, theirs, stage)}; set them "
            "here, too, or remove data.of to make data of this run's own"
        )
    outputs = {
        name: facts
        for name, facts in found["outputs"].items()
        if look != "quick" or is_local(name) or name.endswith("/index.json")
    }
    if changed := first_changed(outputs, theirs.root, thorough=look == "thorough"):
        raise UserError(
            f"{_absolute(changed, theirs.root)}: missing, or changed since `pldr {stage.name}` wrote it; this run uses it in "
            f"place (data.of {theirs.root}): make it again there"
        )
    return found


def with_data_of(config: RunConfig, resumed: Path, report: Report) -> RunConfig:
    """The configuration of a run that continues another one's checkpoint (`--resume PATH`): with that run's data, where its own
    run directory has none and they are what the configuration asks for."""
    own = RunPaths(config.run_dir)
    if config.data.of is not None or any(record_file(own, stage.name).exists() for stage in DATA_STAGES):
        return config
    home = next((one for one in (resumed, *resumed.parents[:2]) if (one / "stages").is_dir()), None)
    if home is None or _same(home, own.root):
        return config
    theirs = RunPaths(borrowed_from(RunPaths(home)) or home)
    try:
        for stage in DATA_STAGES:
            require(config, theirs, stage)
    except UserError as error:
        report(f"this run makes its own data: {error}")
        return config
    return config.model_copy(update={"data": config.data.model_copy(update={"of": str(theirs.root)})})


def _difference(config: RunConfig, theirs: RunPaths, stage: Stage) -> str:
    """The first setting of a stage that is another one there, as far as the last training there tells."""
    job = theirs.logs / "job.json"
    try:
        before = parse_config(read_sealed(job, schema_version=1)["config"], where=str(job)).flat()
    except (UserError, OSError, KeyError, TypeError):
        return ""
    now = config.flat()
    for key, kind in all_kinds().items():
        if kind.decides(stage.name) and before.get(key) != now.get(key):
            return f" ({key}={before.get(key, 'null')}, here {now.get(key, 'null')})"
    return ""


def _what(record: dict[str, Any]) -> str:
    return next((str(value)[:12] for value in identity(record).values()), "unknown")


def _absolute(name: str, root: Path) -> str:
    return str(root / name) if is_local(name) else name


def _same(one: Path, other: Path) -> bool:
    return os.path.realpath(one) == os.path.realpath(other)
