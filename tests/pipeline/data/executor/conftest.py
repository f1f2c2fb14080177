"""The job of engine_steps.py as a fixture."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipeline.data.executor.jobs import LOCAL, Engine, run_tasks
from tests.pipeline.data.executor import engine_steps
from tests.pipeline.data.executor.engine_steps import TASKS


@pytest.fixture
def job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, repository: Path) -> Callable[..., Any]:
    """`job(engine, wrong={rank: how})` runs three tasks in tmp_path; the records."""
    monkeypatch.setenv("PYTHONPATH", str(repository))

    def run(engine: Engine = LOCAL, *, wrong: dict[int, str] | None = None, tasks: int = TASKS, **more: Any) -> Any:
        plan, work, out = tmp_path / "plan.json", tmp_path / "a work" / "job", tmp_path / "out"
        plan.write_text(json.dumps(wrong or {}))
        steps = [engine_steps.Read(plan), engine_steps.Publish(out, work)]
        options = {"workers": 1, "workers_key": "data.workers", "label": "shard: test", **more}
        return run_tasks(steps, tasks=tasks, work=work, output=out, engine=engine, **options)

    return run
