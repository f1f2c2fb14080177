"""Scoring a model on tasks: each with the cached G_LM, then live.

A folder holds one evaluation: `answers.jsonl` (what was scored, so that a start after a kill continues), `results.json`,
written again after each task, and `evaluation.html`. Results are always computed anew from the documents and the answers.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import math
import tempfile
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from pipeline.errors import UserError, first_line
from pipeline.inference.evaluate import tasks as definitions
from pipeline.inference.evaluate.answers import AnswersFile
from pipeline.inference.evaluate.scores import Items, Tree, chance, compare, finite, largest_change, plain
from pipeline.inference.evaluate.tasks import Definition
from pipeline.inference.opened import OpenModel
from pipeline.inference.scoring import Scorer
from pipeline.io.storage import publish_bytes, render_json, sha256_json

Report = Callable[[str], None]
SCHEMA_VERSION = 1
ANSWERS, RESULTS, PAGE = "answers.jsonl", "results.json", "evaluation.html"
SCORING = 1  # of how requests are scored: another number, and no earlier answer is taken
EVERY_S = 0.5  # between two lines of progress
LEAKS = (
    "this model is not certified: its live G_LM is computed from context and answer together, so a live score above the "
    "cached one is a leak and no ability"
)


def evaluate(
    opened: OpenModel,
    tasks: Sequence[str],
    *,
    out: Path,
    limit: int | None = None,
    data: Path | None = None,
    report: Report = print,
    status: Report = lambda _: None,
    every_s: float = EVERY_S,
) -> Tree:
    """Score `opened` on these tasks and write `out`; returns what `results.json` holds.

    limit: only the first items of each task. data: a folder of JSONL files; None for the hub. report gets lines that stay,
    status those that the next one replaces. All documents are read first. A task that cannot be scored is in `failed`, with
    the reason; the others are scored all the same. Raises ConfigError and UserError for names and files that are not there, a
    hub that cannot be reached, and where no task can be scored.
    """
    began = time.monotonic()
    definitions.quiet(offline=data is not None)
    found = definitions.find(tasks, data)
    askers = {name: _asker(opened, name) for name in ("cached", "live")}
    results = _head(opened, limit)
    with AnswersFile(out / ANSWERS, askers.values()) as answers, tempfile.TemporaryDirectory() as folder:
        models: dict[str, Scorer] = {"cached": Scorer(opened.decoder, eos_id=opened.tokenizer.eos_id)}
        if opened.live is not None:
            models["live"] = Scorer(opened.live, live=True, eos_id=opened.tokenizer.eos_id)
        loaded = _load(found, Path(folder), results["failed"], report)
        for number, (definition, task) in enumerate(loaded, 1):
            line = _Status(status, f"{number}/{len(loaded)} {definition.name}", every_s)
            one = _Task(definition, task, opened, limit)
            try:
                items = {
                    name: one.score(scorer.score, answers.of(askers[name]), line.of(name))
                    for name, scorer in models.items()
                }
            except UserError as error:
                _failed(definition, error, results["failed"], report)
            else:
                results["tasks"][definition.name] = one.result(items["cached"], items.get("live"))
            results["seconds"] = round(time.monotonic() - began, 1)
            results["complete"] = number == len(loaded)
            publish_bytes(out / RESULTS, render_json(finite(results)))
    if not results["tasks"]:
        raise UserError(next(f"{name}: {reason}" for name, reason in results["failed"].items()))
    done: Tree = finite(results)
    return done


def _load(
    found: Sequence[Definition], folder: Path, failed: dict[str, str], report: Report
) -> list[tuple[Definition, Any]]:
    """The tasks with their documents; those that cannot be had are in `failed`."""
    loaded = []
    for definition in found:
        try:
            loaded.append((definition, definitions.load(definition, folder)))
        except definitions.HubUnreachable:
            raise
        except UserError as error:
            _failed(definition, error, failed, report)
    return loaded


def _failed(definition: Definition, error: UserError, failed: dict[str, str], report: Report) -> None:
    failed[definition.name] = first_line(error)
    report(f"{definition.name}: {first_line(error)}")


def _head(opened: OpenModel, limit: int | None) -> Tree:
    """What the results are of."""
    return {
        "schema_version": SCHEMA_VERSION,
        "source": {
            "kind": opened.kind,
            "path": str(opened.path),
            "name": opened.name,
            "sha256": opened.sha256,
            "parameters": opened.config.num_parameters()["total"],
            "context_length": opened.config.context_length,
        },
        "certified": opened.certified,
        "no_live": None if opened.live is not None else _why_not_live(opened),
        "leak": None if opened.certified or opened.live is None else LEAKS,
        "limit": limit,
        "versions": _versions(),
        "tasks": {},
        "failed": {},
        "complete": False,
        "seconds": 0.0,
    }


def _why_not_live(opened: OpenModel) -> str:
    """Why there is no live score."""
    if opened.kind == "run":
        return f"G_LM of this model is no function of its input (model.g_source: {opened.config.g_source})"
    return (
        f"this {'bundle' if opened.kind == 'bundle' else 'export'} holds no metric learner; evaluate the run's YAML, or a "
        "bundle made with --with-metric-learner"
    )


def _versions() -> dict[str, str]:
    return {"torch": torch.__version__, **{name: version(name) for name in ("pldr", "lm_eval", "datasets")}}


def _asker(opened: OpenModel, which: str) -> str:
    """A digest of everything that an answer depends on, beside the request."""
    g_lm = hashlib.sha256(opened.g_lm.contiguous().numpy().tobytes()).hexdigest() if which == "cached" else None
    return sha256_json([SCORING, which, opened.sha256, g_lm, torch.__version__])


class _Task:
    """One task while it is scored."""

    def __init__(self, definition: Definition, task: Any, opened: OpenModel, limit: int | None) -> None:
        self._definition, self._task, self._opened, self._limit = definition, task, opened, limit
        self._samples: list[Tree] = []
        self._left_out = 0

    def score(self, score: Any, answers: Any, progress: Callable[[int, int], None]) -> Items:
        """Every item, with one G_LM."""
        from lm_eval.evaluator import evaluate as harness

        from pipeline.inference.evaluate.adapter import ScoringLM

        lm = ScoringLM(
            score,
            self._opened.tokenizer,
            context_length=self._opened.config.context_length,
            answers=answers,
            progress=progress,
        )
        name = self._definition.name
        try:
            with contextlib.redirect_stderr(io.StringIO()):  # its progress bars
                found = harness(lm, {"tasks": {name: self._task}}, limit=self._limit, bootstrap_iters=0)
        except UserError:
            raise
        except Exception as error:  # a document that does not fit the task's templates: any kind
            if error is lm.error:
                raise
            raise UserError(f"{self._definition.where}: lm-eval refused it ({first_line(error)})") from error
        samples = found["samples"][name]
        self._samples = [sample for sample in samples if not math.isnan(sum(_logprobs(sample["filtered_resps"])))]
        self._left_out = len(samples) - len(self._samples)
        if not self._samples:
            raise UserError(
                f"every item has an answer longer than the model's context of {self._opened.config.context_length}"
            )
        metrics = {
            metric: [plain(sample[metric]) for sample in self._samples] for metric in self._samples[0]["metrics"]
        }
        logprobs = [answer for sample in self._samples for answer in _logprobs(sample["filtered_resps"])]
        return Items(metrics, logprobs, lm.cut)

    def result(self, cached: Items, live: Items | None) -> Tree:
        """What is said of the task: its main metric, and all of them."""
        from lm_eval.api.registry import get_aggregation

        mean = get_aggregation("mean")
        aggregates = {metric: self._task.aggregation().get(metric, mean) for metric in cached.metrics}
        metrics = compare(cached, live, aggregates)
        main = definitions.main_metric(self._definition.name, list(metrics))
        head = metrics[main]
        leak = self._opened.certified or head["difference"] is None
        return {
            "metric": main,
            **head,
            "leak_gain": None if leak else -head["difference"],
            "chance": chance(self._task, self._samples) if main.startswith("acc") else None,
            "metrics": metrics,
            "max_logprob_difference": largest_change(cached, live),
            "left_out": self._left_out,
            "cut_contexts": cached.cut,
            "requests": len(cached.logprobs),
            "documents": self._definition.where,
            "data_sha256": sha256_json([sample["doc_hash"] for sample in self._samples]),
            "definition_sha256": self._definition.sha256,
        }


def _logprobs(responses: Sequence[Any]) -> list[float]:
    """Of an item's answers; of a rolling score, its own."""
    return [float(one[0] if isinstance(one, tuple | list) else one) for one in responses]


class _Status:
    """Lines of progress, not too many."""

    def __init__(self, status: Report, head: str, every_s: float) -> None:
        self._status, self._head, self._every = status, head, every_s
        self._last = -every_s

    def of(self, which: str) -> Callable[[int, int], None]:
        """The progress of one G_LM."""
        first: tuple[float, int] | None = (
            None  # when requests were first done, and how many: earlier, texts were prepared
        )

        def progress(done: int, of: int) -> None:
            nonlocal first
            now = time.monotonic()
            first = first or (now, done)
            if now - self._last < self._every and done < of:
                return
            self._last = now
            left = (now - first[0]) / (done - first[1]) * (of - done) if done > first[1] else 0.0
            time_left = f"  {int(left // 60)}:{int(left % 60):02d} left" if left else ""
            bar = "█" * round(20 * done / of)
            self._status(f"{self._head} {which:<6} {bar:░<20} {done:,}/{of:,}{time_left}")

        return progress
