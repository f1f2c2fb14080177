"""How fast answers are scored: our `Scorer` against `lm_eval --model hf` on the same model's export. `pldr bench evaluate`.

Both get the same token ids, made up with the sizes of real tasks, and run in turn in one process, so that a busy machine slows
both alike; a ratio is the median of each round's. On a busy CPU read that of the CPU seconds. A request counts with all its
tokens, context and answer, on both sides: who reads a context once for all of its answers is faster by that.

Decision: the export is built in memory (`pipeline.inference.hf.load.build_model`), from the code and the tensors that
`pldr export hf` writes, and lm-eval's own `HFLM` scores with it. Its tokenizer is of no account.
"""

from __future__ import annotations

import logging
import math
import random
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch

from pipeline.config.load import load_config
from pipeline.config.paths import RunPaths
from pipeline.inference.extras import require
from pipeline.inference.scoring import Request, Scorer
from pipeline.inference.source import open_model
from pldr_model.bench import in_turn
from pldr_model.model import PLDRModel, g_shape

WANTED = 0.8  # of lm-eval's tokens a second
FIRST_ID = 4  # past the special ids


class Shape(NamedTuple):
    """Of a task's questions: number of answers; tokens of the context and of an answer, mean and standard deviation."""

    answers: int
    context: tuple[float, float]
    answer: tuple[float, float]


# As counted over all questions of those sets with a tokenizer of 32,000 pieces (2026-11-28).
SHAPES = {
    "nothing shared": Shape(1, (50.6, 18.5), (30.1, 14.4)),  # hellaswag, one answer of each
    "lambada": Shape(1, (78.2, 12.6), (1.3, 0.6)),
    "piqa": Shape(2, (12.5, 4.2), (22.8, 23.2)),
    "arc_easy": Shape(4, (27.2, 15.6), (4.7, 3.5)),
    "hellaswag": Shape(4, (50.6, 18.5), (30.1, 14.4)),
}


def bench(
    source: str | Path,
    overrides: list[str],
    *,
    questions: int = 16,
    rounds: int = 3,
    batch: int = 8,
    report: Callable[[str], None] = lambda _: None,
) -> dict[str, Any]:
    """Tokens a second of both on each shape. A run without weights gets random ones, of its sizes.

    batch: lm-eval's batch size. Returns, of each shape, {"tokens", "ours", "hf", "ratio", "cpu_ratio", "difference"}; the
    last is the largest of log-likelihoods between the two.
    """
    require("lm_eval", "transformers", "tokenizers", extra="eval")
    model, is_random = _model(source, overrides)
    config = model.config
    scorer, theirs = Scorer(model, eos_id=config.eos_id), _hflm(model, batch)
    result: dict[str, Any] = {
        "parameters": config.num_parameters()["total"],
        "random_weights": is_random,
        "threads": torch.get_num_threads(),
        "device": str(model.embedding.weight.device),
        "batch": batch,
        "questions": questions,
        "rounds": rounds,
        "wanted": WANTED,
        "tasks": {},
    }
    for name, shape in SHAPES.items():
        requests = make_requests(shape, questions, vocab_size=config.vocab_size, context_length=config.context_length)
        result["tasks"][name] = found = _compare(scorer, theirs, requests, rounds)
        report(row(name, found))
    return result


def row(name: str, found: dict[str, Any]) -> str:
    """One line of the table."""
    met = "met" if found["ratio"] >= WANTED else "NOT met"
    return (
        f"{name:<16} {found['tokens']:>7,} tokens   ours {found['ours']:>9,.0f} /s   lm_eval hf {found['hf']:>9,.0f} /s   "
        f"ratio {found['ratio']:.2f} (at least {WANTED}: {met}), of CPU seconds {found['cpu_ratio']:.2f}   "
        f"largest difference {found['difference']:.1e}"
    )


def make_requests(shape: Shape, questions: int, *, vocab_size: int, context_length: int) -> list[Request]:
    """Made-up questions of a shape, the same each time; sizes that a small model's context does not hold are cut."""
    draw = random.Random(0)

    def ids(size: tuple[float, float], limit: int) -> list[int]:
        mean, deviation = size
        spread = math.log(1 + (deviation / mean) ** 2)
        length = round(draw.lognormvariate(math.log(mean) - spread / 2, math.sqrt(spread)))
        return [draw.randrange(min(FIRST_ID, vocab_size - 1), vocab_size) for _ in range(min(max(1, length), limit))]

    found: list[Request] = []
    for _ in range(questions):
        context = ids(shape.context, context_length // 2)
        found += [(context, ids(shape.answer, context_length // 2)) for _ in range(shape.answers)]
    return found


def _model(source: str | Path, overrides: list[str]) -> tuple[PLDRModel, bool]:
    """The model to score with; whether its weights are random."""
    if Path(source).is_file():
        config = load_config(source, overrides)
        if not RunPaths(config.run_dir).weights.is_dir():
            torch.manual_seed(config.seed)
            return PLDRModel(config.model.with_constant_g(), g_lm_LHKK=torch.randn(g_shape(config.model))).eval(), True
    return open_model(source, overrides).model, False


def _hflm(model: PLDRModel, batch: int) -> Any:
    """lm-eval's `hf` over the model's export."""
    logging.getLogger("lm_eval").setLevel(logging.ERROR)  # it comments on models that are no path
    from lm_eval.models.huggingface import HFLM
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    from pipeline.inference.hf.load import build_model

    words = Tokenizer(models.WordLevel({"<unk>": 0, "<eos>": 1}, unk_token="<unk>"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>", eos_token="<eos>", pad_token="<eos>")
    device = str(model.embedding.weight.device)
    return HFLM(pretrained=build_model(model), tokenizer=tokenizer, batch_size=batch, device=device)


def _compare(scorer: Scorer, theirs: Any, requests: list[Request], rounds: int) -> dict[str, Any]:
    found: dict[str, list[float]] = {}

    def ours() -> None:
        found["ours"] = [one.logprob for one in scorer.score(requests)]

    def hf() -> None:
        # The first part would be the texts, which its cache of answers asks for.
        pairs = [(None, list(context), list(answer)) for context, answer in requests]
        found["hf"] = [logprob for logprob, _ in theirs._loglikelihood_tokens(pairs, disable_tqdm=True)]

    cpu: dict[Callable[[], None], list[float]] = {ours: [], hf: []}

    def timed(run: Callable[[], None]) -> Callable[[], None]:
        def work() -> None:
            started = time.process_time()
            run()
            cpu[run].append(time.process_time() - started)

        return work

    ours()
    hf()
    seconds, their_seconds, ratio = in_turn(timed(ours), timed(hf), rounds, scorer.decoder.device)
    tokens = sum(len(context) + len(answer) for context, answer in requests)
    return {
        "tokens": tokens,
        "ours": tokens / seconds,
        "hf": tokens / their_seconds,
        "ratio": 1 / ratio,
        "cpu_ratio": statistics.median(theirs / mine for mine, theirs in zip(cpu[ours], cpu[hf], strict=True)),
        "difference": max(abs(a - b) for a, b in zip(found["ours"], found["hf"], strict=True)),
    }
