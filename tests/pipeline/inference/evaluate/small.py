"""Documents and a model small enough for a test; also for the process that a test kills."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pipeline.inference.opened import OpenModel
from pipeline.post.extract import extract_g
from pipeline.tokenizer import Tokenizer
from pldr_model.model import to_constant_g
from tests.helpers.models import make_model, sample_text

WORDS = ["fox", "dog", "lazy", "quick", "jug", "vow", "jump", "line", "wine", "box"]
NUM = 10


def write_documents(folder: Path) -> Path:
    """NUM documents for each of some stock tasks; arc_easy has one whose answer is not ASCII."""
    (folder / "data_eval").mkdir(parents=True)
    pairs = [(WORDS[i], WORDS[(i + 3) % len(WORDS)]) for i in range(NUM)]
    rows: dict[str, list[dict[str, Any]]] = {
        "arc_easy": [
            {
                "id": str(i),
                "question": f"the {a} or the {b}",
                "choices": {"text": [a, "ééé" if i == 0 else b, f"the {a} {b}"], "label": ["A", "B", "C"]},
                "answerKey": "ABC"[i % 3],
            }
            for i, (a, b) in enumerate(pairs)
        ],
        "data_eval/siqa": [
            {
                "context": f"the {a}",
                "question": f"who is {b}",
                "answerA": a,
                "answerB": b,
                "answerC": "box",
                "label": "2",
            }
            for a, b in pairs
        ],
        "winogrande": [
            {"sentence": f"the {a} and _ jump over", "option1": a, "option2": b, "answer": "1"} for a, b in pairs
        ],
        "truthfulqa": [
            {
                "question": f"is the {a} quick",
                "mc1_targets": {"choices": [a, b], "labels": [1, 0]},
                "mc2_targets": {"choices": [a, b, "box"], "labels": [1, 1, 0]},
            }
            for a, b in pairs
        ],
        "lambada_openai": [{"text": f"the lazy {a} and the quick {b}"} for a, b in pairs],
    }
    for name, documents in rows.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(document) + "\n" for document in documents))
    return folder


def open_tiny(
    tokenizer: Path, *, gain: float = 0.0, certified: bool = True, live: bool = True, seed: int = 0
) -> OpenModel:
    """gain 0: G_LM does not depend on the input."""
    model = make_model(gain=gain, seed=seed)
    g_lm = extract_g(model, sample_text(model, count=4)[:, :-1], "mean").g_lm
    return OpenModel(
        kind="run" if live else "bundle",
        path=Path("tiny.yaml"),
        name="tiny",
        config=model.config.with_constant_g(),
        held=to_constant_g(model, g_lm),
        g_lm=g_lm,
        live=model if live else None,
        tokenizer=Tokenizer.load(tokenizer),
        certificate=None,
        certified=certified,
        sha256=f"tiny-{gain}-{seed}",
        generation={},
    )
