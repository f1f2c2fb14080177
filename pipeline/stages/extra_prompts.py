"""Kinds of prompts from files, `post.extra_prompts: {code: PATH}`: what users want to see measured beside held-out text.

Each paragraph of a text file is a prompt (paragraphs end at blank lines), of a `.jsonl` file the `text` of each line. They are
tokenized with the run's tokenizer and cut to the context. Of more than `post.prompts` in a file that many are taken, evenly
spaced.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from pipeline.config.paths import expanded
from pipeline.errors import ConfigError
from pipeline.io.storage import sha256_file

if TYPE_CHECKING:
    from torch import Tensor

    from pipeline.tokenizer import Tokenizer

T = TypeVar("T")
MOST_BYTES = 1 << 26  # of a file, which is read whole
BLANK = re.compile(r"\n[ \t\r\f\v]*\n")


def extra_files(given: Mapping[str, str]) -> dict[str, str]:
    """The sha256 of each file of `post.extra_prompts`, by its kind. Raises ConfigError for one that cannot be read."""
    return {name: _reading(name, path, sha256_file) for name, path in given.items()}


def read_extra(given: Mapping[str, str], tokenizer: Tokenizer, *, context_length: int, limit: int) -> dict[str, Tensor]:
    """The prompts of each kind as ids [N, <= context_length] (`joined` in pipeline/post/measure/prompts.py).

    Raises ConfigError naming the key and the file: it cannot be read, is too large, not UTF-8, not JSON lines, or without text.
    """
    import torch

    from pipeline.post.measure.prompts import joined

    kinds = {}
    for name, texts in texts_of(given).items():
        few = [texts[len(texts) * i // limit] for i in range(limit)] if len(texts) > limit else texts
        prompts = [ids[:context_length] for ids in tokenizer.encode_batch(few) if ids]
        if not prompts:
            raise ConfigError(f"post.extra_prompts.{name}: no tokens in it; write a prompt into each paragraph")
        kinds[name] = joined([torch.tensor(ids) for ids in prompts])
    return kinds


def texts_of(given: Mapping[str, str]) -> dict[str, list[str]]:
    """The texts of each kind, at least one. Raises ConfigError like `read_extra`."""
    found = {}
    for name, path in given.items():
        found[name] = _texts(name, path)
        if not found[name]:
            raise ConfigError(f"{_where(name, path)}: no text in it; write a prompt into each paragraph")
    return found


def _texts(name: str, path: str) -> list[str]:
    file, data = _where(name, path), _reading(name, path, Path.read_bytes)
    try:
        text = data.decode("utf-8-sig").replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{file}: not UTF-8 at byte {error.start}; save it as UTF-8") from None
    if path.endswith(".jsonl"):
        found = [_text_of(line, f"{file}, line {n}") for n, line in enumerate(text.split("\n"), 1) if line.strip()]
    else:
        found = BLANK.split(text)
    return [one.strip("\n") for one in found if one.strip()]


def _text_of(line: str, where: str) -> str:
    try:
        text = json.loads(line)["text"]
    except (ValueError, TypeError, KeyError, IndexError, RecursionError):
        text = None
    if not isinstance(text, str):
        raise ConfigError(f'{where}: not {{"text": "..."}}; write one such object a line')
    try:
        text.encode()
    except UnicodeEncodeError as error:  # JSON may escape half a character
        raise ConfigError(f"{where}: half a character (\\u{ord(text[error.start]):x}) in `text`; remove it") from None
    return text


def _reading(name: str, path: str, read: Callable[[Path], T]) -> T:
    """What `read` gives for the file, or a ConfigError that names key and file."""
    file = expanded(path, f"post.extra_prompts.{name}")
    try:
        if not file.is_file():
            raise ConfigError(f"{_where(name, path)}: no such file; name a text file or a .jsonl")
        if file.stat().st_size > MOST_BYTES:
            raise ConfigError(f"{_where(name, path)}: larger than {MOST_BYTES >> 20} MB; name a file of fewer prompts")
        return read(file)
    except OSError as error:
        raise ConfigError(f"{_where(name, path)}: cannot be read ({error.strerror}); name a text file") from None


def _where(name: str, path: str) -> str:
    return f"post.extra_prompts.{name}: {path}"
