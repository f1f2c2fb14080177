"""A SentencePiece model as a fast tokenizer (`tokenizer.json`).

SentencePiece never reads a control or byte piece out of a text: the five letters `[END]` are letters. Here that takes two
things: special tokens are not looked for in texts (`split_special_tokens`), and where a text spells the name of such a piece,
it is cut after the name's first letter, so that the unigram model never sees the whole name. There is no bos: it was never
trained, so that a sequence begins with eos or with nothing.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from pipeline.errors import UserError, first_line
from pipeline.inference.extras import require
from pipeline.tokenizer import Tokenizer

SPACE = "\u2581"
UNIGRAM = 1  # SentencePiece's model_type
NORMAL, USER_DEFINED = 1, 4  # its types of pieces that a text can contain
HIDDEN = "\ufdd0\ufdd1"  # stands for the unknown piece; no characters, so that they are in no text


def fast_tokenizer(tokenizer: Tokenizer, *, context_length: int) -> Any:
    """A transformers `PreTrainedTokenizerFast` with the ids of this tokenizer.

    Raises UserError for a SentencePiece model of another kind than unigram, which is what `pldr tokenizer` trains.
    """
    require("transformers", "tokenizers", extra="hf")
    from transformers import PreTrainedTokenizerFast

    names = {f"{name}_token": tokenizer.piece(getattr(tokenizer, f"{name}_id")) for name in ("pad", "unk", "eos")}
    return PreTrainedTokenizerFast(
        tokenizer_object=_tokenizer_object(tokenizer),
        model_max_length=context_length,
        model_input_names=["input_ids", "attention_mask"],
        padding_side="left",
        clean_up_tokenization_spaces=False,
        split_special_tokens=True,
        **names,
    )


def save_tokenizer(tokenizer: Tokenizer, folder: Path, *, context_length: int) -> None:
    """Write tokenizer.json, tokenizer_config.json, and the SentencePiece model itself, which is what we read back."""
    fast = fast_tokenizer(tokenizer, context_length=context_length)
    try:
        fast.save_pretrained(folder)
    except OSError:
        raise
    except Exception as error:  # what tokenizers raises for a full disk
        raise UserError(f"{folder}: the tokenizer cannot be written ({first_line(error)})") from None
    file = folder / "tokenizer_config.json"
    settings = json.loads(file.read_bytes())
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"  # the name that every release of transformers knows
    file.write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n")
    (folder / "tokenizer.model").write_bytes(tokenizer.model_bytes)


def _tokenizer_object(tokenizer: Tokenizer) -> Any:
    from sentencepiece import sentencepiece_model_pb2
    from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers
    from tokenizers import Tokenizer as Fast

    proto = sentencepiece_model_pb2.ModelProto.FromString(tokenizer.model_bytes)
    trainer, rules = proto.trainer_spec, proto.normalizer_spec
    if trainer.model_type != UNIGRAM or trainer.treat_whitespace_as_suffix:
        raise UserError(
            f"{tokenizer.path}: only unigram models with spaces before words can be exported; train such a one"
        )
    pieces = [(piece.piece, piece.score) for piece in proto.pieces]
    fast = Fast(models.Unigram(pieces, unk_id=trainer.unk_id, byte_fallback=trainer.byte_fallback))

    steps: list[Any] = []  # in SentencePiece's order
    if rules.precompiled_charsmap:
        steps.append(normalizers.Precompiled(rules.precompiled_charsmap))
    if rules.remove_extra_whitespaces:
        steps += [normalizers.Replace(Regex(r"\A +| +\z"), ""), normalizers.Replace(Regex(" {2,}"), " ")]
    if rules.add_dummy_prefix:
        steps.append(normalizers.Prepend(" "))
    if rules.escape_whitespaces:
        steps.append(normalizers.Replace(" ", SPACE))
    fast.normalizer = normalizers.Sequence(steps)

    names = [piece.piece for piece in proto.pieces if piece.type not in (NORMAL, USER_DEFINED)]
    cuts = "|".join(f"(?<={re.escape(name[0])})(?={re.escape(name[1:])})" for name in names if len(name) > 1)
    fast.pre_tokenizer = pre_tokenizers.Split(Regex(cuts), "isolated")

    # The unknown piece is written last: its text begins with a space, which is not the one before the first word.
    unknown = rf"\A{re.escape(trainer.unk_piece)}\z"
    undo: list[Any] = [decoders.Replace(Regex(unknown), HIDDEN), decoders.Replace(SPACE, " ")]
    undo += [decoders.ByteFallback(), decoders.Fuse()]
    if rules.add_dummy_prefix:
        undo.append(decoders.Strip(content=" ", left=1))
    undo.append(decoders.Replace(HIDDEN, trainer.unk_surface))
    fast.decoder = decoders.Sequence(undo)
    whole = [piece.piece for piece in proto.pieces if piece.type == USER_DEFINED]
    fast.add_tokens([AddedToken(piece, normalized=False, special=False) for piece in whole])
    return fast
