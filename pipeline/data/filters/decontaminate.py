"""Decontamination: text that also occurs in evaluation files is found by its word n-grams, and its document dropped or cut.

An index of the evaluation files is built once, from the hashes of all runs of `ngram` words in every string of every record
(questions, answers, contexts). A document that contains one of them is contaminated. Words are compared ignoring case,
punctuation, invisible characters and Unicode variants; where a script has no spaces, pipeline/data/words.py says what a word
is. Hashes have 64 bits, so a document of a million words matches one of a
million n-grams by chance once in 10**7.

Decision: a string with fewer words than `ngram`, but at least SHORTEST, has to match completely; shorter ones ("Make a new
plan") occur everywhere and are ignored.
Decision: `cut` removes only the matching words, from the first to the last of a run: the text around them was not in the
evaluation.
"""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import regex
from datatrove.data import Document
from datatrove.pipeline.filters.base_filter import BaseFilter

from pipeline.data.dedup.sorted_rows import NUMBER, Rows
from pipeline.data.dedup.word_hashes import WordHashes, ngrams
from pipeline.data.normal_form import normalize
from pipeline.data.readers.decompress import DAMAGE, OverLimit
from pipeline.data.readers.sources import InputFile, check_unchanged, list_sources
from pipeline.data.readers.text import JSON_DEPTH, is_too_deep, next_line, no_memory, open_input, read_unit
from pipeline.data.readers.units import SKIP, Rejected, Unit
from pipeline.data.words import FOLDED_WORD, INVISIBLE, PLAIN_FOLDED_WORD
from pipeline.errors import UserError, first_line
from pipeline.io.storage import explain_os_error, publish, sha256_file

log = logging.getLogger(__name__)
SHORTEST = 8  # words of the shortest string that is looked for
BITS = 24  # of a hash, that index a table of what occurs at all: for most words no search is needed


@dataclass(frozen=True)
class _Evaluation:
    """An entry of `data.clean.decontaminate.files` in the form that `find_files` expects."""

    url: str
    name: str | None = None
    text_key: str = "text"
    license: str | None = None
    split_at: str | None = None


_INVISIBLE = regex.compile(f"[{INVISIBLE}]+")


class _FoldedHashes(WordHashes):
    """Hashes of words, ignoring case, compatibility forms, composition and invisible characters."""

    word = FOLDED_WORD
    plain = PLAIN_FOLDED_WORD

    def hash_of(self, word: str) -> int:
        if not word.isascii():
            word = normalize("NFKC", _INVISIBLE.sub("", word))
        return super().hash_of(normalize("NFKC", word.casefold()))


def evaluation_files(files: list[str], outputs: Iterable[str] = ()) -> list[InputFile]:
    """The files that these paths, globs and URLs name, each once. outputs: folders that this run writes. Raises UserError for
    one that matches no file."""
    found: dict[str, InputFile] = {}
    for url in files:
        try:
            listing = list_sources([_Evaluation(url)], outputs=outputs)
        except UserError as error:
            what = str(error).removeprefix("data.sources: ").replace("data.sources reads", "supported are")
            raise UserError(f"data.clean.decontaminate.files: {what}") from None
        if ignored := listing.ignored + len(listing.hidden):
            log.warning(
                "data.clean.decontaminate.files: %d entries in %s that are hidden or with an unknown extension are not read",
                ignored,
                url,
            )
        found.update({file.url: file for file in listing.files})
    return list(found.values())


def build_index(
    files: list[str], ngram: int, target: Path, max_document_bytes: int, outputs: Iterable[str] = ()
) -> str:
    """Write the index of the evaluation files to `target` (.npz); returns its sha256. outputs: folders that this run writes.

    Raises UserError for a file that cannot be read, a line that is not JSON, or files without one usable string.
    """
    grams: list[Rows] = []
    owners: list[Rows] = []
    short: list[Rows] = []  # [first SHORTEST words, all words] of strings shorter than ngram
    lengths: set[int] = set()
    hashes = _FoldedHashes()
    inputs = evaluation_files(files, outputs)
    for number, file in enumerate(inputs):
        texts = used = 0
        for text in _readable(file, max_document_bytes):
            texts += 1
            words = hashes.of(text)
            used += len(words) >= min(ngram, SHORTEST)
            if len(words) >= ngram:
                grams.append(ngrams(words, ngram))
                owners.append(np.full(len(grams[-1]), number, NUMBER))
            elif len(words) >= SHORTEST:
                short.append(np.array([ngrams(words[:SHORTEST], SHORTEST)[0], ngrams(words, len(words))[0]], NUMBER))
                lengths.add(len(words))
        if not texts:
            raise UserError(f"{file.shown}: no text in this evaluation file; fix it or remove it from the list")
        if not used:
            log.warning(
                "data.clean.decontaminate.files: none of the %d texts in %s has %d words or more: nothing is removed for it",
                texts,
                file.shown,
                min(ngram, SHORTEST),
            )
    if not grams and not short:
        raise UserError(
            f"data.clean.decontaminate.files: no text of {min(ngram, SHORTEST)} words or more in {len(inputs)} files; name "
            "other files or lower data.clean.decontaminate.ngram"
        )
    hashed, first = np.unique(np.concatenate([*grams, np.empty(0, NUMBER)]), return_index=True)
    arrays: dict[str, Any] = {
        "grams": hashed,
        "owners": np.concatenate([*owners, np.empty(0, NUMBER)])[first].astype(np.uint32),
        "short_first": np.unique(np.array([row[0] for row in short], NUMBER)),
        "short_whole": np.unique(np.array([row[1] for row in short], NUMBER)),
        "short_lengths": np.array(sorted(lengths), np.int64),
        "names": np.frombuffer(json.dumps([file.name for file in inputs]).encode(), np.uint8),
    }

    def write(temporary: Path) -> None:
        with open(temporary, "wb") as stream:
            np.savez(stream, **arrays)

    publish(target, write)
    return sha256_file(target)


def _readable(file: InputFile, limit: int) -> Iterator[str]:
    try:
        yield from _strings_of(file, limit)
        check_unchanged(file)
    except OverLimit as error:
        raise UserError(f"{file.shown}: {error}") from None
    except MemoryError as error:
        raise no_memory(file, error) from None
    except (*DAMAGE, OSError) as error:  # bz2 reports damage as an OSError without an errno
        if isinstance(error, OSError) and error.errno is not None:
            raise explain_os_error(error, file.shown, reading=True) from error
        raise UserError(f"{file.shown}: truncated or damaged ({first_line(error)}); download it again") from None


def _strings_of(file: InputFile, limit: int) -> Iterator[str]:
    """Every string in a file; of records all values, at any depth."""
    if file.kind == "jsonl":
        with closing(open_input(file, 0)) as stream:
            number = 0
            while (found := next_line(stream, limit))[1]:
                number += 1
                line = found[0]
                if line is None:
                    raise UserError(
                        f"{file.shown}, line {number}: longer than data.max_document_megabytes allows; raise it"
                    )
                if not line.strip():
                    continue
                try:
                    yield from _strings_in(orjson.loads(line.removeprefix(b"\xef\xbb\xbf")))
                except orjson.JSONDecodeError as error:
                    if not _is_utf8(line):
                        raise UserError(f"{file.shown}, line {number}: not UTF-8; convert it (iconv)") from None
                    what = f"nested more than {JSON_DEPTH} deep" if is_too_deep(error) else f"not JSON ({error})"
                    raise UserError(f"{file.shown}, line {number}: {what}; fix the line") from None
    elif file.kind == "parquet":
        from pipeline.data.readers.parquet import read_rows

        for row in read_rows(Unit(0, file, 0, 1, file.size)):
            yield from _strings_in(row)
    else:
        for item in read_unit(Unit(0, file, 0, 1, file.size), max_document_bytes=limit):
            if isinstance(item, Rejected):
                raise UserError(item.message.removesuffix(SKIP).rstrip())
            yield item.text


def _is_utf8(line: bytes) -> bool:
    try:
        line.decode()
    except UnicodeDecodeError:
        return False
    return True


def _strings_in(value: Any) -> Iterator[str]:
    """Every string in a value of JSON or Parquet, in order; bytes count as text if they are UTF-8 (others may be images)."""
    left = [value]
    while left:
        found = left.pop()
        if isinstance(found, str):
            yield found
        elif isinstance(found, bytes):
            if _is_utf8(found):
                yield found.decode()
        elif isinstance(found, dict):
            left.extend(reversed(found.values()))
        elif isinstance(found, list | tuple):  # a map of Parquet is a list of tuples
            left.extend(reversed(found))


class _Index:
    """An index, loaded into a worker's memory."""

    def __init__(self, path: Path, ngram: int) -> None:
        self.ngram = ngram
        with np.load(path, allow_pickle=False) as arrays:
            self.grams, self.owners = arrays["grams"], arrays["owners"]
            self.first, self.whole = arrays["short_first"], set(arrays["short_whole"].tolist())
            self.lengths = arrays["short_lengths"].tolist()
            self.names = json.loads(arrays["names"].tobytes())
        self._table = np.zeros(1 << BITS, bool)
        self._table[self.grams >> np.uint64(64 - BITS)] = True
        self.hashes = _FoldedHashes()

    def matches(self, text: str) -> list[tuple[int, int, str]]:
        """(first word, after the last word, file) of each run of words that occurs in an evaluation file."""
        words = self.hashes.of(text)
        grams = ngrams(words, self.ngram)
        maybe = np.flatnonzero(self._table[grams >> np.uint64(64 - BITS)])
        places = np.searchsorted(self.grams, grams[maybe])
        places[places == len(self.grams)] = 0
        hits = self.grams[places] == grams[maybe] if len(self.grams) else np.zeros(0, bool)
        found = [
            (int(start), int(start) + self.ngram, self.names[self.owners[place]])
            for start, place in zip(maybe[hits], places[hits], strict=True)
        ]
        if self.lengths:
            for start in np.flatnonzero(np.isin(ngrams(words, SHORTEST), self.first)).tolist():
                for length in self.lengths:
                    run = ngrams(words[start : start + length], length)
                    if len(run) and int(run[0]) in self.whole:
                        found.append((start, start + length, "a short text"))
        return sorted(found)


class Decontaminate(BaseFilter):  # type: ignore[misc]  # datatrove has no types
    """Drops documents that share a run of words with the evaluation files, or cuts these runs out.

    index: the file of `build_index`. exclusion_writer: receives the documents, or each passage that was cut.
    """

    name = "decontaminate"

    def __init__(self, index: Path, ngram: int, *, cut: bool, exclusion_writer: Any = None) -> None:
        super().__init__(exclusion_writer)
        self.index = index
        self.ngram = ngram
        self.cut = cut
        self._index: _Index | None = None

    def run(self, data: Iterable[Document], rank: int = 0, world_size: int = 1) -> Iterator[Document]:
        self._index = _Index(self.index, self.ngram)
        yield from (self._run_cutting(data, rank) if self.cut else super().run(data, rank, world_size))
        self._index = None

    def filter(self, doc: Document) -> bool | tuple[bool, str]:
        assert self._index is not None
        found = self._index.matches(doc.text)
        if not found:
            return True
        start, end, file = found[0]
        spans = _word_spans(doc.text)
        doc.metadata["detail"] = f"{file}: {doc.text[spans[start][0] : spans[end - 1][1]]}"
        return False, "contaminated"

    def _run_cutting(self, data: Iterable[Document], rank: int) -> Iterator[Document]:
        assert self._index is not None
        with self.exclusion_writer or contextlib.nullcontext() as writer:
            for document in data:
                self.stat_update("total", "forwarded")
                found = self._index.matches(document.text)
                if found:
                    text, passages = cut_words(document.text, found)
                    self.stat_update("changed")
                    self.stat_update("characters_cut", value=len(document.text) - len(text))
                    if writer:
                        for passage, file in passages:
                            known = {"filter_reason": "passage_cut", "detail": file}
                            cut = Document(passage, document.id, metadata={**document.metadata, **known})
                            writer.write(cut, rank)
                    document.text = text
                yield document


def cut_words(text: str, found: list[tuple[int, int, str]]) -> tuple[str, list[tuple[str, str]]]:
    """(the text without these runs of words, [(passage, file)] that were cut). Runs that overlap or touch are one passage;
    the punctuation after it is cut too, and the white space before it if there is white space on both sides."""
    runs: list[list[Any]] = []
    for start, end, file in found:
        if runs and start <= runs[-1][1]:
            runs[-1][1] = max(runs[-1][1], end)
        else:
            runs.append([start, end, file])
    spans = _word_spans(text)
    kept: list[str] = []
    passages: list[tuple[str, str]] = []
    position = 0
    for start, end, file in runs:
        first, last = spans[start][0], spans[end - 1][1]
        while last < len(text) and not text[last].isspace() and not FOLDED_WORD.match(text, last):
            last += 1
        passages.append((text[first:last], file))
        before = text[position:first]
        kept.append(before.rstrip(" \t") if last == len(text) or text[last].isspace() else before)
        position = last
    return "".join([*kept, text[position:]]), passages


def _word_spans(text: str) -> list[tuple[int, int]]:
    return [found.span() for found in FOLDED_WORD.finditer(text)]
