"""The model ids that a server answers to, and the engine behind each."""

from __future__ import annotations

import difflib

from pipeline.inference.serve.engine import Engine
from pipeline.inference.serve.errors import ApiError, wrong


class Models:
    """`NAME` (with the cached G), and `NAME:live` where the metric learner is there. The first is the default."""

    def __init__(self, engines: dict[str, Engine]) -> None:
        self.engines = engines
        self.default = next(iter(engines))

    def find(self, name: str | None) -> str:
        """The model of this name, or the default. Raises ApiError 404."""
        name = self.default if name is None else name
        if name not in self.engines:
            near = difflib.get_close_matches(name[:200], self.engines, n=1, cutoff=0.3) or [self.default]
            raise wrong(
                "model",
                f"model: there is no {name[:100]!r}; did you mean {near[0]!r}?",
                status=404,
                code="model_not_found",
            )
        return name

    def ready(self, name: str | None) -> tuple[str, Engine]:
        """The model of this name and its engine. Raises ApiError: 404 if there is none, 503 if it is not ready."""
        name = self.find(name)
        engine = self.engines[name]
        if problem := engine.problem():
            raise ApiError(503, f"{name}: {problem}", code="not_ready", headers={"retry-after": "2"})
        return name, engine

    def problem(self) -> str | None:
        """Why this server cannot answer now; None when every engine is ready."""
        for name, engine in self.engines.items():
            if problem := engine.problem():
                return f"{name}: {problem}"
        return None
