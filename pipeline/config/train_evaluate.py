"""Benchmark scores of checkpoints while training runs: the section `train.evaluate`."""

from __future__ import annotations

import difflib

from pydantic import field_validator

from pipeline.config.section import Kind, Section

# Known here, so that a wrong name is found without importing lm-eval.
TASKS = (
    "arc_easy",
    "arc_challenge",
    "hellaswag",
    "openbookqa",
    "piqa",
    "social_iqa",
    "winogrande",
    "truthfulqa_mc1",
    "truthfulqa_mc2",
    "lambada_openai",
)
beside = Kind("may change", ("train",), result=False, added=True)


class EvaluateConfig(Section):
    """Scores of checkpoints (pipeline/train/evaluations.py): a process of its own on rank 0's node, on CPUs, one at a time."""

    every: int = beside(
        ..., "steps between two evaluations, a multiple of checkpoint_every; the last step has one, too", ge=1
    )
    tasks: tuple[str, ...] = beside(..., f"tasks of lm-evaluation-harness: {', '.join(TASKS)}", min_length=1)
    limit: int | None = beside(200, "only the first items of each task; null: all", ge=1)
    data: str | None = beside(None, "folder of JSONL files with the tasks' documents; null: the Hugging Face hub")
    threads: int = beside(1, "CPU threads of an evaluation", ge=1)
    timeout_s: float = beside(3600.0, "seconds after which an evaluation is ended", gt=0)
    wait_s: float = beside(600.0, "seconds that the end of training waits for the last evaluation", ge=0)

    @field_validator("tasks")
    @classmethod
    def _known(cls, tasks: tuple[str, ...]) -> tuple[str, ...]:
        for task in tasks:
            if task not in TASKS:
                near = difflib.get_close_matches(task, TASKS, n=1, cutoff=0.5)
                fix = f"did you mean {near[0]}?" if near else f"name some of {', '.join(TASKS)}"
                raise ValueError(f"{task!r} is not evaluated during training; {fix}")
        if len(set(tasks)) != len(tasks):
            raise ValueError("a task is named twice")
        return tasks
