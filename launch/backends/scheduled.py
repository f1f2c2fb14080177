"""What Slurm and Kubernetes share: the sizes of a job, which `--resume` a scheduler may repeat, and filling in templates.

The files that are handed to schedulers are made from `launch/backends/templates/`, readable, filled in with jinja2.
"""

from __future__ import annotations

import os
import shlex
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from jinja2 import PackageLoader, StrictUndefined, TemplateError
from jinja2.sandbox import SandboxedEnvironment

from pipeline.checkpoint.format import is_checkpoint_name
from pipeline.config.paths import RunPaths
from pipeline.errors import ConfigError


@dataclass(frozen=True)
class ScheduledJob:
    """A training job for a scheduler, as the options of `pldr launch slurm | kubernetes` describe it. Raises ConfigError."""

    nodes: int
    ranks_per_node: int
    gpus_per_node: int  # 0: train on CPUs
    cpus_per_rank: int
    resume: str
    force: bool
    template: str | None  # the user's own file

    def __post_init__(self) -> None:
        for option in ("nodes", "ranks_per_node", "cpus_per_rank"):
            if getattr(self, option) < 1:
                raise ConfigError(f"--{option.replace('_', '-')} {getattr(self, option)}: at least 1")
        if self.gpus_per_node < 0:
            raise ConfigError(f"--gpus-per-node {self.gpus_per_node}: at least 0, which trains on CPUs")

    @property
    def ranks(self) -> int:
        """How many train, on all nodes."""
        return self.nodes * self.ranks_per_node

    def node_arguments(self) -> list[str]:
        """What the `pldr launch torchrun` of each node gets besides the configuration."""
        resume = [] if self.resume == "auto" else ["--resume", self.resume]
        return [*resume, *(["--force"] if self.force else [])]

    def check_resume(self, paths: RunPaths, *, base: Path) -> None:
        """A scheduler repeats its command: a `--resume` that goes back to an earlier checkpoint would do so at every start.

        base: the directory that the job runs in, which a relative `--resume` is below. Raises ConfigError.
        """
        if self.resume.startswith("runs:/"):
            goes_back = "/checkpoints/step-" in self.resume
        else:
            path = Path(os.path.normpath(base / Path(self.resume).expanduser()))
            goes_back = str(path.parent) == os.path.normpath(paths.checkpoints) and is_checkpoint_name(path.name)
        if goes_back:
            raise ConfigError(
                f"--resume {self.resume}: would go back to it at every start; go back once with `pldr train CONFIG --resume "
                f"{self.resume} --prepare N`, then launch without --resume"
            )


def fill_in(name: str, values: dict[str, Any], *, own: str | None = None) -> str:
    """A template of the package, or the user's `own` file, with its values. Raises ConfigError naming the file."""
    where = own or name
    try:
        text = (
            Path(own).read_text(encoding="utf-8")
            if own
            else (resources.files("launch") / "backends" / "templates" / name).read_text()
        )
        environment = SandboxedEnvironment(
            loader=PackageLoader("launch.backends"),  # for what templates include
            undefined=StrictUndefined,
            trim_blocks=True,
            lstrip_blocks=True,
            keep_trailing_newline=True,
        )
        environment.filters["sh"] = shlex.quote
        return environment.from_string(text).render(values)
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--template {where}: cannot be read ({error})") from None
    except TemplateError as error:
        raise ConfigError(f"--template {where}: {error}; it may use: {', '.join(sorted(values))}") from None
