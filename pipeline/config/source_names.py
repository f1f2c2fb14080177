"""The names of `data.sources`, which `data.phases` uses: as given, or from their URLs."""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Iterable
from typing import Protocol

from pipeline.errors import ConfigError
from pipeline.io.urls import public_url

MAGIC = re.compile(r"[*?[]")
NOTHING = "corpus"  # where a URL has no name in it


class Named(Protocol):
    """What is used of a source."""

    @property
    def url(self) -> str: ...
    @property
    def name(self) -> str | None: ...


class Drawing(Protocol):
    """What is used of a phase."""

    @property
    def weights(self) -> dict[str, float]: ...


def parts_of(url: str) -> list[str]:
    """The components of a URL's path."""
    return [part for part in public_url(url).rpartition("://")[2].split("/") if part not in ("", ".", "..")]


def as_name(component: str) -> str:
    """A component of a URL as a source's name."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", component).strip("-._") or NOTHING


def unknown_source(phases: Iterable[Drawing], sources: Iterable[Named]) -> str | None:
    """What is wrong with the first source in `phases` that is none of these, one line. What a URL without a name is called
    depends on the files there (pipeline/data/readers/sources.py): whatever it could be is accepted."""
    listed = list(sources)
    given = {source.name for source in listed if source.name is not None}
    possible = {name for source in listed if source.name is None for name in possible_names(source.url)}
    for name in (name for phase in phases for name in phase.weights):
        if name not in given and name not in possible and re.sub(r"-\d+$", "", name) not in possible:
            known = given | {min(possible_names(source.url), key=len) for source in listed if source.name is None}
            return f"phases: no source is named {name!r}; sources: {', '.join(sorted(known))}"
    return None


def possible_names(url: str) -> set[str]:
    """What a source without a name can be called: the last component, or the last before a glob, with any of its extensions."""
    parts = parts_of(url)
    fixed = parts[: next((i for i, part in enumerate(parts) if MAGIC.search(part)), len(parts))]
    last = {each[-1] if each else NOTHING for each in (parts, fixed)}
    while shorter := {os.path.splitext(name)[0] for name in last} - last:
        last |= shorter
    return {as_name(name) for name in last}


def require_sources(phases: Iterable[Drawing] | None, names: Collection[str]) -> None:
    """Raise ConfigError for a source in `phases` that is none of these names."""
    for name in (name for phase in phases or () for name in phase.weights):
        if name not in names:
            raise ConfigError(
                f"data.phases: no source is named {name!r}; sources: {', '.join(sorted(names))}; correct the name"
            )
