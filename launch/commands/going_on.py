"""`--resume` and `--anneal-from` of `pldr run` and `pldr train`: the configuration and data that they stand for."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launch.commands.verbs import Report
from pipeline.checkpoint.format import committed
from pipeline.errors import AnotherRunError, ConfigError
from pipeline.stages.borrow import with_data_of
from pipeline.stages.compatible import newest_stable
from pipeline.stages.resume import parse_resume

if TYPE_CHECKING:
    from pipeline.config.run import RunConfig
    from pipeline.stages.runner import Pipeline


def annealed(arguments: Any, report: Report) -> RunConfig:
    """The configuration of the run that `--anneal-from` begins or continues."""
    from pipeline.stages.anneal import branch

    begins = branch(arguments.config, arguments.overrides, arguments.anneal_from, report)
    arguments.resume = begins.resume
    report(f"anneal      from {begins.checkpoint}, in {begins.config.run_dir}")
    return begins.config


def with_data(config: RunConfig, arguments: Any, report: Report) -> RunConfig:
    """The configuration with the data of the run that this one goes on from."""
    path = parse_resume(getattr(arguments, "resume", "auto")).path
    return config if path is None else with_data_of(config, path, report)


@contextmanager
def with_command(pipeline: Pipeline, arguments: Any) -> Iterator[None]:
    """Where training is refused because the recipe is another run's: name the command that goes on in a new one."""
    try:
        yield
    except AnotherRunError as error:
        if not committed(pipeline.paths.checkpoints):
            raise
        own = [word for word in arguments.overrides if word.partition("=")[0] != "run_dir"]
        old = pipeline.config.run_dir.rstrip("/")
        if branched := getattr(arguments, "anneal_from", None):  # without it the rate would not decay from there
            words = [
                arguments.config,
                *own,
                f"run_dir={_free(old, error.key, pipeline.config)}",
                "--anneal-from",
                branched,
            ]
            command = f"pldr {arguments.verb} {shlex.join(words)}"
            raise ConfigError(f"{error}; to decay from {branched} once more: {command}") from None
        stable = newest_stable(pipeline.paths.checkpoints, pipeline.config.train)
        source, what = (old, "") if stable is None else (f"{old}/checkpoints/{stable.name}", " of the stable part")
        words = [arguments.config, *own, f"run_dir={_free(old, error.key, pipeline.config)}", "--resume", source]
        command = f"pldr {arguments.verb} {shlex.join(words)}"
        raise ConfigError(f"{error}; to go on from its newest checkpoint{what} with the same data: {command}") from None


def _free(run_dir: str, key: str, config: RunConfig) -> str:
    """A run directory that does not exist: with the steps in its name, or a number."""
    name = f"{run_dir}-{config.train.steps}" if key == "train.steps" else run_dir
    candidates = [name] if key == "train.steps" else []
    candidates += [f"{name}-{number}" for number in range(2, 1000)]
    return next(one for one in candidates if not Path(one).expanduser().exists())
