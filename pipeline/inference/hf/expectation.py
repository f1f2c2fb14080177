"""What an export must reproduce: logits, greedy tokens and ids, computed by our own model and tokenizer.

Decision: prompts are random pieces of the vocabulary, drawn by the model's hash, so that nothing but the model is needed and the
same model gives the same prompts. Texts are the run's held-out ones where a run is exported; from a bundle alone, which has
none, paragraphs of the documentation of Python's standard library. Strings that tokenizers stumble over are added to both.
"""

from __future__ import annotations

import ast
import random
import sysconfig
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pipeline.tokenizer import Tokenizer
from pldr_model.generation import generate
from pldr_model.model import PLDRModel

NUM_PROMPTS = 20
MAX_PROMPT = 64  # tokens
MAX_NEW = 32
MAX_TEXTS = 2000
MODULES = ("argparse", "ast", "datetime", "decimal", "difflib", "fractions", "ftplib", "imaplib", "ipaddress", "locale",
           "mailbox", "optparse", "pathlib", "pickletools", "random", "shutil", "smtplib", "statistics", "string", "tarfile",
           "textwrap", "threading", "trace", "turtle", "typing", "zipfile", "subprocess", "tempfile", "inspect", "heapq",
           "calendar", "cmd", "configparser", "contextlib", "copy", "csv", "doctest", "functools", "gettext", "glob")  # fmt: skip
ODD = (
    "", " ", "  a  b ", "\n\n x\n", "\r\nCRLF\r\n", "tab\tx", "\x00\x01", "123456", "a" * 300, "[END]", "a [PAD] b",
    "<0x41>", "x<0x41>y [UNK]", "[START][END]", "\u2581under", "\u2581\u2581a", "\u200bzero", "\ufeffmark", "\u3000 wide",
    "h\u00e9llo w\u00f6rld", "e\u0301 \u00a0space", "\uff26\uff35\uff2c\uff2c \ufb01 \u2460", "\u03a9\u2248\u00e7\u221a",
    "\u65e5\u672c\u8a9e\u306e\u30c6\u30ad\u30b9\u30c8", "\u0645\u0631\u062d\u0628\u0627", "\u041f\u0440\u0438\u0432\u0435\u0442",
    "\u0928\u092e\u0938\u094d\u0924\u0947", "\u0e2a\u0e27\u0e31\u0e2a\u0e14\u0e35", "\U0001f44d\U0001f3fd\U0001f1e9\U0001f1ea",
)  # fmt: skip


@dataclass(frozen=True)
class Expectation:
    """greedy: the new tokens of each prompt. logits of `sequences`: the prompts, and a full context. ids, decoded: of `texts`."""

    prompts: list[list[int]]
    max_new_tokens: int
    greedy: list[list[int]]
    sequences: list[list[int]]
    texts: list[str]
    ids: list[list[int]]
    decoded: list[str]

    def to_dict(self) -> dict[str, Any]:
        """JSON-able form."""
        return asdict(self)


@torch.inference_mode()
def expect(
    model: PLDRModel, tokenizer: Tokenizer, *, seed: str, texts: Sequence[str]
) -> tuple[Expectation, dict[str, Tensor]]:
    """What this model and tokenizer give, and the logits [S,V] of each sequence by its number. A model that learns its G reads
    every prompt with the prompt's own G."""
    config = model.config
    draw = random.Random(seed)
    pieces = [token for token in range(4, tokenizer.vocab_size) if tokenizer.byte(token) is None] or [3]
    longest = max(1, min(MAX_PROMPT, config.context_length // 2))
    lengths = [1 + i * (longest - 1) // (NUM_PROMPTS - 1) for i in range(NUM_PROMPTS)]
    prompts = [draw.choices(pieces, k=length) for length in lengths]
    max_new = max(1, min(MAX_NEW, config.context_length - longest))
    sequences = [*prompts, draw.choices(pieces, k=config.context_length)]
    logits = {str(i): model(torch.tensor([ids]), padded=False)[0].contiguous() for i, ids in enumerate(sequences)}
    checked = [*texts, *ODD]
    ids = tokenizer.encode_batch(checked)
    expected = Expectation(
        prompts=prompts,
        max_new_tokens=max_new,
        greedy=generate(model, prompts, max_new_tokens=max_new, eos_id=config.eos_id),
        sequences=sequences,
        texts=checked,
        ids=ids,
        decoded=[tokenizer.decode(one) for one in ids],
    )
    return expected, logits


def library_texts() -> list[str]:
    """Paragraphs of at least eight words from docstrings of Python's standard library, which is read and not imported."""
    folder = Path(sysconfig.get_paths()["stdlib"])
    texts: dict[str, None] = {}
    for name in MODULES:
        file = folder / f"{name}.py" if (folder / f"{name}.py").is_file() else folder / name / "__init__.py"
        if not file.is_file():
            continue
        for node in ast.walk(ast.parse(file.read_bytes())):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
                paragraphs = (ast.get_docstring(node) or "").split("\n\n")
                texts |= dict.fromkeys(paragraph for paragraph in paragraphs if len(paragraph.split()) >= 8)
    return list(texts)[:MAX_TEXTS]
