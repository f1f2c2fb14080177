"""What the keys of a configuration mean: read back from the kinds that stand beside them (section.py, `Kind`).

Keys are dotted, as in `RunConfig.flat()`: `train.freeze_g.below`, `data.slurm.sbatch_args.account`, `seed`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from functools import cache
from typing import Any

from pydantic import BaseModel

from pipeline.config.run import MODEL_KEYS, RunConfig
from pipeline.config.section import Kind, OnResume, kind_of, section_in
from pldr_model.config import ModelConfig

UP_TO_TRAINING = ("shard", "tokenizer", "tokenize", "train")
# How a stage's settings are written in its record on disk: keys of these sections stand at the top, those of others below
# their section's name. The digest depends on it: with another form every finished stage would run again.
AT_THE_TOP = {
    "shard": ("data",),
    "tokenizer": ("tokenizer", "model"),
    "tokenize": ("tokens", "model"),
    "extract": ("post",),
    "validate": ("post",),
    "bundle": ("post",),
}


def on_resume(key: str) -> OnResume:
    """Whether a run may be resumed with another value of this key. Raises KeyError for a key that no configuration has."""
    return _find(key).on_resume


def on_resume_in(config: RunConfig, key: str) -> OnResume:
    """The same in this configuration: where a sequence may use another one's G, the micro batch decides whose."""
    return "needs force" if key == "train.micro_batch" and config.train.mixes_g else on_resume(key)


def is_of_training(key: str) -> bool:
    """Whether the key is a setting of training or of a stage before it. A key that existed once is like its section."""
    try:
        stages = set(_find(key).stages)
    except KeyError:
        section = key.partition(".")[0] + "."
        stages = {stage for name, kind in all_kinds().items() if name.startswith(section) for stage in kind.stages}
    return not stages.isdisjoint(UP_TO_TRAINING)


def trained_by(section: str) -> tuple[str, ...]:
    """The keys of a section that trained weights come from: another value, other weights."""
    of_section = {key: kind for key, kind in all_kinds().items() if key.startswith(f"{section}.")}
    return tuple(key.split(".")[1] for key, kind in of_section.items() if key.count(".") == 1 and kind.decides("train"))


def of_stage(config: RunConfig, stage: str) -> dict[str, Any]:
    """The values that decide a stage's output, as plain values: what its record's digest is made from.

    Decision: stage `train` counts every key of `train`. With another value it runs again, and resuming then continues or
    refuses by the key's `on_resume`.
    """
    tree: dict[str, Any] = {}
    for name, value in _deciding(config.as_dict(), RunConfig, "", stage).items():
        tree |= value if name in AT_THE_TOP.get(stage, ()) else {name: value}
    return tree


@cache
def all_kinds() -> dict[str, Kind]:
    """The kind of every key, by its dotted name; also of keys in optional sections (`train.freeze_g.below`), and of those in
    lists (`data.sources.url`). Raises AssertionError for a key without one."""
    found = dict(walk(RunConfig))
    missing = [key for key, kind in found.items() if kind is None]
    assert not missing, f"{', '.join(missing)}: without a Kind; see pipeline/config/section.py"
    return {key: kind for key, kind in found.items() if kind is not None}


def added_defaults() -> dict[str, Any]:
    """The default of each key that is later than the first records (`Kind.added`): what a run from before it had."""
    sections = {name: field.annotation for name, field in RunConfig.model_fields.items()}
    of_model = {
        f"model.{one.name}": one.default
        for one in fields(ModelConfig)
        if one.name in MODEL_KEYS and MODEL_KEYS[one.name].added
    }
    return of_model | {
        f"{name}.{key}": field.default
        for name, section in sections.items()
        if isinstance(section, type) and issubclass(section, BaseModel)
        for key, field in section.model_fields.items()
        if (kind := kind_of(field)) is not None and kind.added
    }


def walk(section: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, Kind | None]]:
    """Every key below a section with its kind; None for a key without one. A section that is always there has none itself."""
    for name, field in section.model_fields.items():
        key, kind, annotation = f"{prefix}{name}", kind_of(field), field.annotation
        if is_dataclass(annotation):  # ModelConfig
            yield from ((f"{key}.{inner.name}", MODEL_KEYS.get(inner.name, kind)) for inner in fields(annotation))
            continue
        inner = section_in(annotation)
        if inner is None or inner is not annotation:
            yield key, kind
        if inner is not None:
            yield from walk(inner, f"{key}.")


def _find(key: str) -> Kind:
    """The kind of a key, or of the value that it is an entry of."""
    name = key
    while name not in all_kinds():
        name, dot, _ = name.rpartition(".")
        if not dot:
            raise KeyError(key)
    return all_kinds()[name]


def _deciding(tree: dict[str, Any], section: type[BaseModel], prefix: str, stage: str) -> dict[str, Any]:
    """What of a section's values decides the stage's output, in the section's form; a section without any is left out."""
    found: dict[str, Any] = {}
    for name, field in section.model_fields.items():
        key, annotation = f"{prefix}{name}", field.annotation
        if is_dataclass(annotation):
            defaults = {f"{key}.{one.name}": one.default for one in fields(annotation)}
            part = {k: v for k, v in tree[name].items() if _counts(f"{key}.{k}", v, defaults[f"{key}.{k}"], stage)}
        elif section_in(annotation) is annotation:
            part = _deciding(tree[name], annotation, f"{key}.", stage)
        else:
            if _counts(key, tree[name], field.default, stage):
                found[name] = tree[name]
            continue
        if part:
            found[name] = part
    return found


def _counts(key: str, value: Any, default: Any, stage: str) -> bool:
    """Whether a key's value is one of those that decide the stage's output."""
    kind = all_kinds()[key]
    decides = kind.decides(stage) or (stage == "train" and key.startswith("train."))
    return decides and not (kind.added and value == default)
