"""Reading a configuration: the YAML, overrides, and errors that name the file, the key and the fix."""

from __future__ import annotations

import contextlib
import difflib
from pathlib import Path
from typing import Any, Literal, get_args

import yaml
from pydantic import BaseModel, ValidationError

from pipeline.config.run import RunConfig
from pipeline.errors import ConfigError
from pipeline.io.urls import without_secrets
from pldr_model.config import ModelConfig


def load_config(path: str | Path, overrides: list[str] | None = None) -> RunConfig:
    """Read a YAML, apply `key=value` overrides, check everything.

    Raises ConfigError: one line that names the file, the key and the mend.
    """
    path = Path(path)
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file; name a YAML such as configs/quickstart.yaml") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: must be a mapping of sections (name, run_dir, data, model, ...)")
    for override in overrides or []:
        _apply_override(tree, override)
    return parse_config(tree, where=str(path), base=path.absolute().parent)


def parse_config(tree: dict[str, Any], *, where: str, base: Path | None = None) -> RunConfig:
    """Check a tree of plain values. `base`: what relative file names in it are relative to (the YAML's folder)."""
    try:
        config = RunConfig.model_validate(tree)
    except ValidationError as error:
        raise ConfigError(f"{where}: " + "; ".join(_explain(e) for e in error.errors())) from None
    except TypeError as error:
        raise ConfigError(f"{where}: {error}") from None
    return _resolve(config, base) if base is not None else config


def _resolve(config: RunConfig, base: Path) -> RunConfig:
    """`train.deepspeed` becomes absolute; a `model.g_file` has to be there and to fit."""
    updates: dict[str, Any] = {}
    if config.train.deepspeed is not None:
        name = config.train.deepspeed.replace("{stage}", str(config.train.zero_stage))
        updates["train"] = config.train.model_copy(update={"deepspeed": str((base / name).resolve())})
    if config.model.g_source == "file":
        if config.model.g_file is None:
            raise ConfigError(
                "model.g_file: missing; model.g_source=file needs a safetensors file with one G_LM tensor"
            )
        from pldr_model.model import load_g_file  # imports torch, which takes seconds

        try:
            load_g_file(config.model.g_file, config.model)
        except ValueError as error:
            raise ConfigError(f"model.g_file: {error}") from None
    return config.model_copy(update=updates)


def _apply_override(tree: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise ConfigError(f"override {override!r}: write key=value, for example train.steps=100")
    try:
        value = yaml.safe_load(text) if text else ""
    except yaml.YAMLError:
        raise ConfigError(f"override {override!r}: the value is not YAML; quote it") from None
    if isinstance(value, str):  # YAML 1.1 reads 1e-3 as text
        with contextlib.suppress(ValueError):
            value = float(value) if any(c.isdigit() for c in value) else value
    node = tree
    *parents, last = key.split(".")
    for part in parents:
        node = node.setdefault(part, {})
        if not isinstance(node, dict):
            raise ConfigError(f"override {override!r}: {part} is a value, not a section")
    node[last] = value


def known_keys(path: tuple[str | int, ...] = ()) -> list[str]:
    """The keys of the section at `path`, for suggestions."""
    section: Any = RunConfig
    for part in path:
        if isinstance(part, int):  # an entry of a list
            continue
        field = getattr(section, "model_fields", {}).get(part)
        section = None if field is None else _section_in(field.annotation)
    if section is ModelConfig:
        return list(ModelConfig.__dataclass_fields__)
    return list(getattr(section, "model_fields", {}))


def _section_in(annotation: Any) -> Any:
    """The section that an annotation such as `list[Source]` or `LanguageFilter | None` is about; else the annotation."""
    for inner in get_args(annotation):
        found = _section_in(inner)
        if found is ModelConfig or (isinstance(found, type) and issubclass(found, BaseModel)):
            return found
    return annotation


def _explain(error: Any) -> str:
    """One pydantic error in words: the key, what is wrong, the nearest known key."""
    location = tuple(part for part in error["loc"] if part not in get_args(Literal["ModelConfig"]))
    key = ".".join(str(part) for part in location)
    kind = error["type"]
    if kind in ("extra_forbidden", "unexpected_keyword_argument"):
        known = known_keys(location[:-1])
        section = "".join(f"{part}." for part in location[:-1])
        near = [section + name for name in difflib.get_close_matches(str(location[-1]), known, n=1, cutoff=0.5)]
        if not near:  # right name, wrong section
            near = [f"{s}.{location[-1]}" for s in RunConfig.model_fields if str(location[-1]) in known_keys((s,))][:1]
        return f"unknown key {key}" + (f"; did you mean {near[0]}?" if near else f"; known: {', '.join(known)}")
    if kind in ("missing", "missing_keyword_only_argument", "missing_argument"):
        return f"key {key} is missing"
    got = "" if isinstance(error.get("input"), dict | list) else without_secrets(f" (got {error.get('input')!r})")
    message = error["msg"].removeprefix("Value error, ")
    return f"{key}: {message}{got}" if key else message
