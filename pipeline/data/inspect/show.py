"""Showing a stored sequence as text, with document ends and padding marked.

The files are not trusted: blocks are checked, and control characters are made visible, because a document may contain sequences
that move a terminal's cursor.
"""

from __future__ import annotations

import bisect
import hashlib
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate, groupby
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from pipeline.data.tokens.index import TOKENIZE_AGAIN, TokenIndex, TokenShard, missing, wrong_sha256
from pipeline.errors import UserError, first_line
from pipeline.io.remote import open_retrying, read_range
from pipeline.io.storage import safe_member
from pipeline.io.urls import join, public_url
from pipeline.tokenizer import Tokenizer

END_MARK = "⏎ end of document"
CUT_MARK = "⏎ another document"
SPACE = "\u2581"  # SentencePiece's symbol for a space
HIDDEN = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


@dataclass(frozen=True)
class Sequence:
    """A stored sequence of context_length + 1 ids, and its location. `segments`: document number of each token within the
    row, from 1, 0 for padding; None if the tokens were made without boundaries."""

    split: str
    number: int
    of: int
    shard: str
    block: int
    row: int
    ids: tuple[int, ...]
    segments: tuple[int, ...] | None


@dataclass(frozen=True)
class Span:
    """A part of a decoded sequence. `kind`: text, byte (of a character that is cut), end (of a document), cut (another
    document begins although none ended), pad (text: the count), special (text: its name)."""

    kind: str
    text: str = ""


def tokenizer_of(index: TokenIndex) -> Tokenizer:
    """The tokenizer next to the tokens. Raises UserError if it is missing or damaged."""
    url = join(index.folder, safe_member(index.tokenizer["name"]))
    try:
        with open_retrying(url) as stream:
            data = stream.read()
    except FileNotFoundError:
        raise UserError(missing(url)) from None
    if hashlib.sha256(data).hexdigest() != index.tokenizer["sha256"]:
        raise UserError(wrong_sha256(url))
    return Tokenizer.from_bytes(data, path=Path(url))


def read_sequence(index: TokenIndex, split: str, number: int) -> Sequence:
    """A sequence by number, from 0, through the split's shards in index order. Only its block is read and checked.

    Raises UserError for a number out of range, or a missing or damaged block.
    """
    return next(read_sequences(index, split, number))


def read_sequences(index: TokenIndex, split: str, number: int) -> Iterator[Sequence]:
    """`read_sequence`, followed by the later sequences of the same block, with one read of the file."""
    total = index.num_sequences(split)
    if not total:
        known = ", ".join(dict.fromkeys(shard.split for shard in index.shards))
        raise UserError(f"{public_url(index.folder)}: no split {split!r} with sequences; there are: {known}")
    if not 0 <= number < total:
        raise UserError(f"sequence {number}: the {split} split has sequences 0 to {total - 1}; name one of these")
    shards = index.of_split(split)
    ends = list(accumulate(shard.sequences for shard in shards))
    position = bisect.bisect_right(ends, number)
    shard = shards[position]
    block, row = divmod(number - (ends[position] - shard.sequences), index.block_sequences)
    ids = _block(index, shard, block, shard.offsets, shard.block_sha256, index.dtype)
    segments = None
    if index.boundaries:
        segments = _block(index, shard, block, shard.segment_offsets, shard.segment_sha256, "uint16")
    for offset in range(len(ids) - row):
        numbers = None if segments is None else tuple(segments[row + offset].tolist())
        location = (split, number + offset, total, shard.name, block, row + offset)
        yield Sequence(*location, tuple(ids[row + offset].tolist()), numbers)


def _block(index: TokenIndex, shard: TokenShard, block: int, offsets: Any, hashes: Any, dtype: str) -> npt.NDArray[Any]:
    """The rows of a block [n, context_length + 1], checked."""
    shape = index.rows(shard, block), index.context_length + 1
    numbers = np.dtype(dtype).newbyteorder("<")
    url = join(index.folder, shard.name)
    try:
        data = read_range(url, offsets[block], offsets[block] + math.prod(shape) * numbers.itemsize)
    except FileNotFoundError:
        raise UserError(missing(url)) from None
    except (UserError, IsADirectoryError) as error:
        raise UserError(f"{first_line(error)}; {TOKENIZE_AGAIN}") from None
    if not hashes[block] or not hashlib.sha256(data).hexdigest().startswith(hashes[block]):
        raise UserError(wrong_sha256(url, f", block {block}"))
    return np.frombuffer(data, dtype=numbers).reshape(shape)


def spans(sequence: Sequence, tokenizer: Tokenizer) -> Iterator[Span]:
    """The sequence as text, with document ends and padding marked. Bytes that form complete characters are text."""
    for is_text, group in groupby(_joined(_atoms(sequence, tokenizer)), key=lambda span: span.kind == "text"):
        if is_text:
            yield Span("text", "".join(span.text for span in group))
        else:
            yield from group


def _atoms(sequence: Sequence, tokenizer: Tokenizer) -> Iterator[Span]:
    """A span for each token (a byte as two hex digits), and one where another document begins."""
    leading = tokenizer.pieces("a")[0].startswith(SPACE)  # it adds a space before a text, which decoding removes
    for position, token in enumerate(sequence.ids):
        if position and _begins_document(sequence, position, tokenizer):
            yield Span("cut")
        if (byte := tokenizer.byte(token)) is not None:
            yield Span("byte", f"{byte:02X}")
        elif token == tokenizer.pad_id:
            yield Span("pad")
        elif token == tokenizer.eos_id:
            yield Span("end")
        elif token >= tokenizer.vocab_size:
            yield Span("special", f"id {token}")
        elif token in (tokenizer.unk_id, tokenizer.bos_id):
            yield Span("special", tokenizer.piece(token))
        else:
            piece = tokenizer.piece(token)
            begins = leading and position and sequence.ids[position - 1] == tokenizer.eos_id
            yield Span("text", (piece.removeprefix(SPACE) if begins else piece).replace(SPACE, " "))


def _joined(atoms: Iterator[Span]) -> Iterator[Span]:
    """Consecutive bytes as characters where possible, consecutive padding as one span with its count."""
    for kind, group in groupby(atoms, key=lambda span: span.kind):
        if kind == "byte":
            yield from _characters(bytes.fromhex("".join(span.text for span in group)))
        elif kind == "pad":
            yield Span("pad", str(sum(1 for _ in group)))
        else:
            yield from group


def _characters(raw: bytes) -> Iterator[Span]:
    while raw:
        try:
            yield Span("text", raw.decode("utf-8"))
            return
        except UnicodeDecodeError as error:
            if error.start:
                yield Span("text", raw[: error.start].decode("utf-8"))
            yield Span("byte", raw[error.start : error.end].hex(" ").upper())
            raw = raw[error.end :]


def _begins_document(sequence: Sequence, position: int, tokenizer: Tokenizer) -> bool:
    """Whether another document begins here although none ended: the one before continues in another sequence."""
    if sequence.segments is None:
        return False
    before, now = sequence.segments[position - 1], sequence.segments[position]
    return before != now and 0 not in (before, now) and sequence.ids[position - 1] != tokenizer.eos_id


def as_text(parts: Iterator[Span]) -> str:
    """Spans for a terminal."""
    marks = {"end": f" {END_MARK}\n", "cut": f" {CUT_MARK}\n", "pad": "[{} x padding]", "byte": "[byte {}]"}
    return "".join(
        visible(part.text) if part.kind == "text" else marks.get(part.kind, "[{}]").format(visible(part.text))
        for part in parts
    )


def visible(text: str) -> str:
    """The text with control characters and changes of writing direction as symbols; line ends and tabs are kept."""
    return text if text.isprintable() else HIDDEN.sub(lambda found: _symbol(found[0]), text)


def _symbol(character: str) -> str:
    code = ord(character)
    if code < 0x20:
        return chr(0x2400 + code)
    return "\u2421" if code == 0x7F else f"[U+{code:04X}]"
