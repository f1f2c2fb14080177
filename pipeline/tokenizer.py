"""The tokenizer that data, training and serving share: a SentencePiece model and the four special ids of the papers.

A `.model` file is a protocol buffer, not a pickle: loading one from a user runs no code.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import sentencepiece

from pipeline.errors import UserError

SPECIAL_IDS = {"pad": 0, "unk": 1, "bos": 2, "eos": 3}  # the papers' [PAD], [UNK], [START], [END]


class Tokenizer:
    """Text to ids and back. Neither bos nor eos is added here: the code that concatenates documents does that."""

    def __init__(self, processor: sentencepiece.SentencePieceProcessor, *, path: Path, sha256: str) -> None:
        self._processor = processor
        self.path = path
        self.sha256 = sha256  # of the model file: tokens and bundles record it
        self.vocab_size: int = processor.get_piece_size()
        self.pad_id, self.unk_id, self.bos_id, self.eos_id = SPECIAL_IDS.values()

    @classmethod
    def load(cls, path: str | Path) -> Tokenizer:
        """Read a SentencePiece model.

        Raises UserError if the file is absent, is not a SentencePiece model, or has other special ids.
        """
        path = Path(path)
        try:
            data = path.read_bytes()
        except FileNotFoundError:
            raise UserError(f"{path}: no such tokenizer; run `pldr tokenizer CONFIG` or set tokenizer.model") from None
        except OSError as error:
            raise UserError(f"{path}: cannot be read ({error.strerror}); name a .model file") from None
        return cls.from_bytes(data, path=path)

    @classmethod
    def from_bytes(cls, data: bytes, *, path: Path) -> Tokenizer:
        """`load` for the bytes of a model; `path` is for error messages."""
        processor = sentencepiece.SentencePieceProcessor()
        try:
            loaded = processor.LoadFromSerializedProto(data) if data else False
            processor.id_to_piece(list(range(processor.get_piece_size())))  # each of them is UTF-8
        except Exception:  # a damaged model fails in any way: RuntimeError, KeyError, ValueError
            loaded = False
        if not loaded:
            raise UserError(f"{path}: not a SentencePiece model; tokenizer.model must name a .model file")
        found = {name: getattr(processor, f"{name}_id")() for name in SPECIAL_IDS}
        if found != SPECIAL_IDS:
            raise UserError(f"{path}: special ids are {found}, must be {SPECIAL_IDS}; train it with those")
        return cls(processor, path=path, sha256=hashlib.sha256(data).hexdigest())

    @property
    def model_bytes(self) -> bytes:
        """The SentencePiece model, as its file holds it."""
        data: bytes = self._processor.serialized_model_proto()
        return data

    def encode(self, text: str) -> list[int]:
        """Ids of one text."""
        ids: list[int] = self._processor.encode(text)
        return ids

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        """Ids of each text, on one thread: parallelism is over processes, one core per worker."""
        ids: list[list[int]] = self._processor.encode(texts, num_threads=1)
        return ids

    def encode_arrays(self, texts: list[str] | list[bytes]) -> list[npt.NDArray[np.int32]]:
        """`encode_batch` of texts, or of their UTF-8, without a Python object for each id, which would add half of the time."""
        arrays: list[npt.NDArray[np.int32]] = self._processor.encode(texts, num_threads=1, return_type="numpy")
        return arrays

    def decode(self, ids: Iterable[int]) -> str:
        """Text of ids; special ids give no text. Invalid UTF-8 (a character cut in two) becomes U+FFFD."""
        text: str = self._processor.decode([int(i) for i in ids])
        return text

    def pieces(self, text: str) -> list[str]:
        """The pieces of one text, as in the model (U+2581 for a space)."""
        pieces: list[str] = self._processor.encode(text, out_type=str)
        return pieces

    def spans(self, text: str) -> list[tuple[int, str, int]]:
        """Of each token of a text its id, the part of the text that it stands for, and where that begins, in characters. Of a
        character of several byte pieces the last one has it all, the others stand for nothing."""
        data, found = text.encode(), []
        offset = end = 0
        for piece in self._processor.encode(text, return_type="proto").pieces:  # begin, end: in bytes
            offset += len(data[end : piece.begin].decode())  # white space that the tokenizer drops
            found.append((piece.id, piece.surface, offset))
            offset, end = offset + len(piece.surface), piece.end
        return found

    def piece(self, token: int) -> str:
        """The piece with this id."""
        piece: str = self._processor.id_to_piece(token)
        return piece

    @property
    def has_byte_fallback(self) -> bool:
        """Whether a character without a piece becomes bytes, and not the unknown token."""
        return any(self._processor.is_byte(token) for token in range(min(self.vocab_size, 512)))

    def byte(self, token: int) -> int | None:
        """The byte of a byte piece; None for any other id."""
        if token >= self.vocab_size or not self._processor.is_byte(token):
            return None
        return int(self.piece(token)[3:5], 16)
