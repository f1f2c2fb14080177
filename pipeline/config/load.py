"""Reading a configuration: the YAML and what it extends, overrides, and errors that name the file, the key and the fix.

extends: ../quickstart.yaml     # one file, relative to this one; it may extend another
name: ablation-sdpa             # keys of this file win: mappings are merged, anything else is replaced
model: {g_source: identity}
"""

from __future__ import annotations

import contextlib
import difflib
import os
import re
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any, get_type_hints

import yaml
from pydantic import ValidationError

from pipeline.config.run import RunConfig
from pipeline.config.section import section_in
from pipeline.errors import ConfigError
from pipeline.io.urls import without_secrets
from pldr_model.config import ModelConfig
from pldr_model.rope_scaling import RopeScaling

EXTENDS = "extends"
COMMAND_LINE = "command line"
SHIPPED = Path(__file__).parent / "deepspeed"  # DeepSpeed's own keys for each ZeRO stage
Location = tuple[str | int, ...]  # a key's path: ("train", "steps")
Origins = dict[Location, str]  # the file that each value comes from, or COMMAND_LINE


def load_config(path: str | Path, overrides: list[str] | None = None) -> RunConfig:
    """Read a YAML and what it extends, apply `key=value` overrides, check everything.

    Raises ConfigError: one line that names the file, the key and the fix.
    """
    return load_with_origins(path, overrides)[0]


def load_with_origins(path: str | Path, overrides: list[str] | None = None) -> tuple[RunConfig, Origins]:
    """`load_config`, and where each value that is not a default comes from."""
    path = Path(path)
    origins: Origins = {}
    tree = _read_chain(path, origins)
    for override in overrides or []:
        location = _apply_override(tree, override)
        _forget(origins, location)
        origins[location] = COMMAND_LINE
    config = parse_config(tree, where=str(path), origins=origins)
    _check_g_file(config)
    return _with_deepspeed_keys(config), origins


def parse_config(tree: dict[str, Any], *, where: str, origins: Origins | None = None) -> RunConfig:
    """Check a tree of plain values, without reading the files it names. `where`: what an error names, unless `origins` knows
    the file that the key comes from."""
    try:
        return RunConfig.model_validate(tree)
    except ValidationError as error:
        raise ConfigError(_one_line(error, where, origins or {})) from None
    except TypeError as error:
        raise ConfigError(f"{where}: {error}") from None


def _read_chain(path: Path, origins: Origins) -> dict[str, Any]:
    """The tree of a YAML, merged into those that it extends; notes in `origins` where each value comes from."""
    chain: list[tuple[Path, dict[str, Any]]] = []  # the file, what it extends, what that extends, ...
    following: Path | None = path
    while following is not None:
        file = following
        if os.path.realpath(file) in [os.path.realpath(seen) for seen, _ in chain]:
            names = " -> ".join(str(seen) for seen in [*(seen for seen, _ in chain), file])
            raise ConfigError(f"{path}: {EXTENDS}: a cycle ({names}); remove one of them")
        tree = _read(file, named_by=chain[-1][0] if chain else None)
        parent = tree.pop(EXTENDS, None)
        if not (parent is None or (isinstance(parent, str) and parent)):
            raise ConfigError(f"{file}: {EXTENDS}: {parent!r} must be the name of one YAML, relative to this file")
        chain.append((file, tree))
        following = None if parent is None else file.parent / parent
    merged: dict[str, Any] = {}
    for file, tree in reversed(chain):
        _merge(merged, tree, (), str(file), origins)
    return merged


def load_yaml(path: Path) -> Any:
    """The values in a YAML file. Raises OSError, yaml.YAMLError, or ValueError for what YAML allows and Python does not."""
    try:
        return yaml.safe_load(path.read_text(encoding="utf-8"))
    except RecursionError:
        raise ValueError("nested too deeply") from None


def _read(path: Path, *, named_by: Path | None) -> dict[str, Any]:
    """The tree in one file."""
    try:
        tree = load_yaml(path)
    except FileNotFoundError:
        if named_by is not None:
            raise ConfigError(f"{named_by}: {EXTENDS}: {path}: no such file; name it relative to this one") from None
        raise ConfigError(f"{path}: no such file; name a YAML such as configs/quickstart.yaml") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from None
    except (ValueError, yaml.YAMLError) as error:
        raise ConfigError(f"{path}: not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: must be a mapping of sections (name, run_dir, data, model, ...)")
    return tree


def _merge(into: dict[str, Any], tree: dict[str, Any], at: Location, file: str, origins: Origins) -> None:
    """Put a tree's values into another: mappings key by key, anything else as it is."""
    for key, value in tree.items():
        location = (*at, key)
        if isinstance(value, dict):
            if not isinstance(into.get(key), dict):
                into[key] = {}
                _forget(origins, location)
            if not value and not into[key]:
                origins[location] = file
            _merge(into[key], value, location, file, origins)
        else:
            into[key] = value
            _forget(origins, location)
            origins[location] = file


def _forget(origins: Origins, location: Location) -> None:
    """A value and what is below it come from elsewhere now."""
    for known in [known for known in origins if known[: len(location)] == location]:
        del origins[known]


def _check_g_file(config: RunConfig) -> None:
    """A `model.g_file` has to be there and to fit."""
    if config.model.g_source != "file":
        return
    if config.model.g_file is None:
        raise ConfigError("model.g_file: missing; model.g_source=file needs a safetensors file with one G_LM tensor")
    from pldr_model.model import load_g_file  # imports torch, which takes seconds

    try:
        load_g_file(config.model.g_file, config.model)
    except ValueError as error:
        raise ConfigError(f"model.g_file: {error}") from None


def _with_deepspeed_keys(config: RunConfig) -> RunConfig:
    """The configuration with DeepSpeed's keys in place of their file's name: this is recorded, and sent to hosts."""
    named = config.train.deepspeed
    if not isinstance(named, str):
        return config
    from pipeline.io.storage import parse_json  # imports fsspec, which a wrong key must not wait for

    name = named.replace("{stage}", str(config.train.zero_stage))
    shipped = SHIPPED / f"{name}.json"
    file = shipped if name in {one.stem for one in SHIPPED.glob("*.json")} else Path(name)
    try:
        keys = parse_json(file.read_bytes())
    except FileNotFoundError:
        raise ConfigError(
            f"train.deepspeed: {name}: no such file; a path is relative to the working directory ({Path.cwd()}), and "
            "`zero{stage}` takes the file that comes with pldr"
        ) from None
    except OSError as error:
        raise ConfigError(f"train.deepspeed: {name}: cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise ConfigError(f"train.deepspeed: {name}: not valid JSON: {error}") from None
    if not isinstance(keys, dict):
        raise ConfigError(f"train.deepspeed: {name}: must be a JSON object of DeepSpeed's keys")
    return config.model_copy(update={"train": config.train.model_copy(update={"deepspeed": keys})})


def _apply_override(tree: dict[str, Any], override: str) -> Location:
    """Set one key of the tree; returns where."""
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise ConfigError(f"override {override!r}: write key=value, for example train.steps=100")
    if key == EXTENDS:
        raise ConfigError(f"override {override!r}: only a YAML can extend another; give that YAML instead")
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
    return (*parents, last)


def known_keys(path: Location = ()) -> list[str]:
    """The keys of the section at `path`, for suggestions."""
    section: Any = RunConfig
    for part in path:
        if isinstance(part, int):  # an entry of a list
            continue
        section = section_in(_annotations(section).get(part), ModelConfig, RopeScaling)
    return list(_annotations(section))


def _annotations(section: Any) -> dict[str, Any]:
    """The annotation of each key of a section or a dataclass; of neither, none."""
    if is_dataclass(section):
        return get_type_hints(section)
    return {name: field.annotation for name, field in getattr(section, "model_fields", {}).items()}


def _one_line(error: ValidationError, where: str, origins: Origins) -> str:
    """All errors, each behind the file that it is about, which is named once for those that follow one another."""
    text, named = "", ""
    for found in error.errors():
        file = _file_of(_location(found), origins) or where
        text += ("; " if text else "") + (f"{file}: " if file != named else "") + _explain(found)
        named = file
    return text


def _file_of(location: Location, origins: Origins) -> str | None:
    """The file that a value comes from, or its section does; None where several files have a part in it."""
    for end in range(len(location), 0, -1):
        if location[:end] in origins:
            return origins[location[:end]]
    files = {file for known, file in origins.items() if known[: len(location)] == location}
    return files.pop() if location and len(files) == 1 else None


def _location(error: Any) -> Location:
    """Where the value stands: without pydantic's names of the types that it tried."""
    return tuple(part for part in error["loc"] if part not in ("ModelConfig", "dict[str,any]", "str"))


def _explain(error: Any) -> str:
    """One pydantic error in words: the key, what is wrong, the nearest known key."""
    location = _location(error)
    key = ".".join(str(part) for part in location)
    kind = error["type"]
    if kind in ("extra_forbidden", "unexpected_keyword_argument"):
        known = known_keys(location[:-1])
        section = "".join(f"{part}." for part in location[:-1])
        near = [f"{s}.{location[-1]}" for s in RunConfig.model_fields if str(location[-1]) in known_keys((s,))][:1]
        if not near:  # no section has this name
            near = [section + name for name in difflib.get_close_matches(str(location[-1]), known, n=1, cutoff=0.5)]
        return f"unknown key {key}" + (f"; did you mean {near[0]}?" if near else f"; known: {', '.join(known)}")
    if kind in ("missing", "missing_keyword_only_argument", "missing_argument"):
        return f"key {key} is missing"
    given = error.get("input")
    got = "" if isinstance(given, dict | list) else without_secrets(f" (got {given!r})")
    message = error["msg"].removeprefix("Value error, ")
    if kind == "literal_error":
        choices = re.findall(r"'([^']+)'", error["ctx"]["expected"])
        near = difflib.get_close_matches(str(given), choices, n=1)
        got += f"; did you mean {near[0]}?" if near else ""
    if kind in ("model_type", "model_attributes_type", "dataclass_type"):
        return f"{key}: must be a section{got}; its keys: {', '.join(known_keys(location))}"
    return f"{key}: {message}{got}" if key else message
