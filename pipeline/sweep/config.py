"""A sweep's YAML, checked, and the children that its variants and its grid make: one configuration each."""

from __future__ import annotations

import itertools
import re
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import Field, ValidationError

from pipeline.config.load import load_config, load_yaml
from pipeline.config.paths import RunPaths
from pipeline.config.run import RunConfig
from pipeline.config.section import Section
from pipeline.errors import ConfigError
from pipeline.tracking.client import tracking_uri
from pipeline.tracking.default_store import for_children_at_once, for_several_nodes, of_its_own

RESERVED = ("name", "run_dir", "tracking.uri", "tracking.parent_run")  # set by the sweep
MAX_CHILDREN = 1000
VARIANT = "variant"  # its column in the table
Scalar = str | int | float | bool | None
AFTER_VALIDATION = ("relative_deviation_g", "held_out_block", "held_out_cached")
NO_NUMBERS = ("tier", "verdict", "data_fingerprint", "run_id")
COLUMNS = (
    "step",
    "tokens",
    "train_seconds",
    "loss",
    "val_loss_cached",
    "order_parameter",
    "budget",
    *AFTER_VALIDATION,
    *NO_NUMBERS,
)


class PlotConfig(Section):
    """The axes. Names are columns of the table."""

    x: str = "budget"
    y: str = "relative_deviation_g"
    log_x: bool = False
    log_y: bool = True


class CompareConfig(Section):
    """How variants are compared (pipeline/sweep/compare.py): by the smallest `value`. Names are columns of the table and keys
    of the grid."""

    baseline: str
    value: str = "val_loss_cached"
    pairs: str = "seed"
    tune: str | None = None
    log: bool = False  # of positive values: geometric means, and ratios in place of differences


class SweepConfig(Section):
    """A sweep's YAML."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    config: str = Field(min_length=1)
    run_dir: str = Field(min_length=1)
    about: str = ""  # the question that it answers, for the page
    set: dict[str, Any] = Field(default_factory=dict)
    variants: dict[str, dict[str, Any]] = Field(default_factory=dict)
    grid: dict[str, list[Scalar]] = Field(default_factory=dict)
    compare: CompareConfig | None = None
    until: Literal["train", "consolidate", "extract", "validate", "bundle"] = "validate"
    plot: PlotConfig = PlotConfig()


class Child:
    """One combination: its name, the values that are varied, its run."""

    def __init__(self, name: str, values: dict[str, Scalar], config: RunConfig) -> None:
        self.name, self.values, self.config = name, values, config


def child_name(values: dict[str, Scalar]) -> str:
    """`sdpa.max_lr-0.001.seed-2`: the variant, then the last part of each key with its value, fit for a folder's name."""
    parts = [str(value) if key == VARIANT else f"{key.rpartition('.')[2]}-{value}" for key, value in values.items()]
    return re.sub(r"[^A-Za-z0-9._-]+", "_", ".".join(parts))[:120]


def read(
    path: Path, overrides: list[str], *, nodes: int = 1, apart: bool = False
) -> tuple[SweepConfig, RunConfig, list[Child]]:
    """The sweep, its parent's configuration (where its MLflow run is, and what all children share), and its children, which
    train on so many nodes. apart: several of them at once, on any nodes.

    Raises ConfigError, one line, for a mistake in the sweep's YAML or in any child's configuration.
    """
    settings = _read(path)
    root = RunPaths(settings.run_dir).root
    base = path.absolute().parent / settings.config
    common = [_override(k, v) for k, v in settings.set.items()] + overrides
    given = [*settings.set, *(override.partition("=")[0] for override in overrides)]
    of_variants = [key for keys in settings.variants.values() for key in keys]
    for key in [*given, *of_variants, *settings.grid]:
        if key in RESERVED:
            raise ConfigError(f"{path}: {key} is set by the sweep; remove it")
    for key in settings.grid:
        if any(other == key or other.startswith(f"{key}.") for other in given):
            raise ConfigError(f"{path}: {key} is varied by the grid; remove it from `set` or the command line")
        if any(other == key or other.startswith(f"{key}.") for other in of_variants):
            raise ConfigError(f"{path}: {key} is varied by the grid; remove it from `variants`")
    parent = load_config(base, [*common, _override("run_dir", str(root)), _override("name", settings.name)])
    parent = for_children_at_once(parent) if apart else for_several_nodes(parent, nodes)
    variants: list[str | None] = [*settings.variants] or [None]
    combinations = [
        (variant, combination) for variant in variants for combination in itertools.product(*settings.grid.values())
    ]
    if not combinations or len(combinations) > MAX_CHILDREN:
        raise ConfigError(f"{path}: variants and grid make {len(combinations)} children; give 1 to {MAX_CHILDREN}")
    children = []
    for variant, combination in combinations:
        varied = {} if variant is None else {VARIANT: variant}
        values = dict(zip(settings.grid, combination, strict=True))
        name = child_name({**varied, **values})
        own = [_override(k, v) for k, v in {**settings.variants.get(variant or "", {}), **values}.items()]
        own_paths = {"run_dir": str(root / "children" / name), "tracking.uri": tracking_uri(parent)}
        own += [_override(k, v) for k, v in {**own_paths, "name": f"{settings.name}.{name}"}.items()]
        config = load_config(base, [*common, *own])
        config = of_its_own(config) if apart else config
        children.append(Child(name, {**varied, **{key: _value_of(config, key) for key in values}}, config))
    names = [child.name for child in children]
    if len(set(names)) < len(names):
        raise ConfigError(
            f"{path}: grid: two children would be called {max(names, key=names.count)!r}; remove the value that stands twice"
        )
    return settings, parent, children


def _read(path: Path) -> SweepConfig:
    try:
        tree = load_yaml(path)
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file; name a YAML such as configs/sweeps/invariance_budget.yaml") from None
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise ConfigError(f"{path}: cannot be read as YAML: {' '.join(str(error).split())}") from None
    try:
        settings = SweepConfig.model_validate(tree)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        known = f"; known keys: {', '.join(SweepConfig.model_fields)}" if first["type"] == "extra_forbidden" else ""
        raise ConfigError(f"{path}: {key or 'the file'}: {first['msg'].removeprefix('Value error, ')}{known}") from None
    if not settings.grid and not settings.variants:
        raise ConfigError(f"{path}: nothing is varied; give grid, variants or both")
    columns = (VARIANT, *settings.grid, *COLUMNS)
    for axis in (settings.plot.x, settings.plot.y):
        if axis not in columns:
            raise ConfigError(f"{path}: plot: {axis!r} is not a column; there are: {', '.join(columns)}")
    if settings.compare is not None:
        _check_compare(path, settings, settings.compare)
    return settings


def _check_compare(path: Path, settings: SweepConfig, compare: CompareConfig) -> None:
    given = {"baseline": compare.baseline, "value": compare.value, "pairs": compare.pairs, "tune": compare.tune}
    is_judged = settings.until in ("validate", "bundle")
    numbers = [c for c in COLUMNS if c not in NO_NUMBERS and (is_judged or c not in AFTER_VALIDATION)]
    allowed = {"baseline": settings.variants, "value": numbers, "pairs": settings.grid, "tune": settings.grid}
    for key, name in given.items():
        if name is not None and name not in allowed[key]:
            known = ", ".join(allowed[key]) or "none"
            raise ConfigError(f"{path}: compare.{key}: {name!r} is not there; there are: {known}")
    if compare.tune == compare.pairs:
        raise ConfigError(f"{path}: compare.tune and compare.pairs are both {compare.tune}; tune another key")
    for key in settings.grid:
        if key not in (compare.tune, compare.pairs):
            raise ConfigError(f"{path}: grid: {key} is neither compare.tune nor compare.pairs; set it in `variants`")


def _value_of(config: RunConfig, key: str) -> Scalar:
    """A key's checked value: YAML 1.1 reads 1e-3 as text, the configuration as a number."""
    found: Any = config.as_dict()
    for part in key.split("."):
        found = found[part]
    return found if isinstance(found, Scalar) else str(found)


def _override(key: str, value: Any) -> str:
    """`key=value` as the command line would have it."""
    text = yaml.safe_dump(value, default_flow_style=True, width=10**6).strip().removesuffix("...").strip()
    return f"{key}={text}"
