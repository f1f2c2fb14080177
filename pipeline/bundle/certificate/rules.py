"""What may differ between schemas: by which thresholds, checks and words a certificate is judged. verdict.py applies them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel, ValidationError

from pipeline.bundle.certificate.checks import Check, Tier

FULL_PROMPTS = 100  # with fewer held-out prompts than these the statement says so
Tree = Mapping[str, Any]


@dataclass(frozen=True)
class Rules:
    """Rules of one schema. config: the thresholds and settings with their bounds and defaults. above, below: thresholds, by
    which values ask less of a model; less: settings with which less was tried when they are smaller; settings: all of them.

    checks(certificate, config); tier(certificate, config); statement(certificate, tier, names of failed checks, looser);
    inconsistent(certificate): the first summary among the measures that their details contradict, or None.
    """

    config: type[BaseModel]
    above: tuple[str, ...]
    below: tuple[str, ...]
    less: tuple[str, ...]
    settings: tuple[str, ...]
    checks: Callable[[Tree, Any], list[Check]]
    tier: Callable[[Tree, Any], Tier]
    statement: Callable[[Tree, Tier, list[str], str], str]
    inconsistent: Callable[[Tree], str | None]

    @property
    def thresholds(self) -> tuple[str, ...]:
        """The names of all thresholds."""
        return (*self.above, *self.below)

    def config_of(self, certificate: Tree) -> Any:
        """The configuration with these thresholds and settings. Raises ValueError, one line: what it refuses certifies
        nothing."""
        found = {"thresholds": self.thresholds, "settings": self.settings}
        for part, known in found.items():
            if odd := certificate[part].keys() ^ set(known):
                raise ValueError(f"{part}: not the keys of a certificate ({', '.join(sorted(odd))})")
        try:
            return self.config.model_validate({**certificate["thresholds"], **certificate["settings"]})
        except ValidationError as error:
            first = error.errors()[0]
            where = "".join(f".{part}" for part in first["loc"])
            raise ValueError(f"post{where}: {first['msg'].removeprefix('Value error, ')}") from None

    def looser(self, certificate: Tree) -> str:
        """Thresholds and settings looser than the defaults: "name value (default ...), ..."; empty when there are none."""
        values = {**certificate["thresholds"], **certificate["settings"]}
        found = []
        for name in (*self.thresholds, *self.less):
            default = self.config.model_fields[name].default
            if values[name] > default if name in self.above else values[name] < default:
                found.append(f"{name} {values[name]:g} (default {default:g})")
        return ", ".join(found)
