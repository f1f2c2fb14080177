"""A loaded bundle: text in, text out, with KV-cache and G-cache.

Decision: prompts are encoded as the training text was, without bos. A completion is decoded as the continuation of a text,
so that the space between prompt and completion is kept (SentencePiece drops a leading one). Stop strings are searched in that
text and not in tokens: a stop string may begin inside one token and end inside another.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from pipeline.bundle.read import BundleParts, read_bundle
from pipeline.errors import UserError
from pldr_model.generation import generate_steps
from pldr_model.model import PLDRModel

INCOMPLETE = "\N{REPLACEMENT CHARACTER}"


class Bundle:
    """A verified bundle, ready to generate. `certificate`, `manifest`, `config` and `tokenizer` are public and read-only."""

    def __init__(self, parts: BundleParts) -> None:
        self.config, self.weight_format, self.tokenizer = parts.config, parts.weight_format, parts.tokenizer
        self.certificate, self.manifest, self.generation = parts.certificate, parts.manifest, parts.generation
        self.certified: bool = parts.manifest["certified"]
        self.model = PLDRModel(parts.config, g_lm_LHKK=parts.g_lm)
        self.model.load_state_dict({**parts.weights, "g_lm": parts.g_lm})
        self.model.eval()
        # A piece that is decoded before the new ids, so that they keep their leading space, whatever the prompt was.
        self._anchor = self.tokenizer.encode("a")[-1:]

    @classmethod
    def load(cls, path: str | Path) -> Bundle:
        """Verify and load; an uncertified bundle warns. Raises UserError, one line, for a damaged or foreign folder."""
        parts = read_bundle(Path(path))
        if not parts.manifest["certified"]:
            failed = ", ".join(failure["measure"] for failure in parts.certificate["failed"]) or "none"
            warnings.warn(
                f"{path}: UNCERTIFIED bundle (failed checks: {failed}): its cached G_LM may change the model's outputs",
                stacklevel=2,
            )
        return cls(parts)

    def generate(
        self,
        prompts: Sequence[str],
        *,
        max_new_tokens: int = 128,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        stop: Sequence[str] = (),
        seed: int | None = 0,
    ) -> list[str]:
        """Continue each prompt; returns the completions without the prompts, in their order.

        A completion ends after `max_new_tokens`, at a full context, at eos, or before the first `stop` string.
        temperature 0 is greedy; `top_k` 0 and `top_p` 1 disable those; the token that crosses `top_p` is kept. The same seed
        gives the same text; None draws a new one. Prompts of a batch do not affect each other.
        Raises UserError for empty prompts, prompts that leave no room in the context, and settings out of range.
        """
        *_, new = self._steps(
            prompts,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            stop=stop,
            seed=seed,
        )
        return [self._cut(ids, stop) for ids in new]

    def stream(self, prompt: str, *, stop: Sequence[str] = (), **settings: Any) -> Iterator[str]:
        """The completion that `generate` gives for one prompt, in pieces as they come. Settings and errors are those of
        `generate`; errors come with the first piece.

        A piece never ends inside a character, nor in what may become a stop string.
        """
        sent = text = ""
        for (ids,) in self._steps([prompt], stop=stop, **settings):
            text = self._cut(ids, stop)
            if piece := settled(text, stop)[len(sent) :]:
                sent += piece
                yield piece
        if text != sent:
            yield text[len(sent) :]

    def _steps(
        self,
        prompts: Sequence[str],
        *,
        max_new_tokens: int = 128,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        stop: Sequence[str] = (),
        seed: int | None = 0,
    ) -> Iterator[list[list[int]]]:
        """The new tokens of every prompt after each step."""
        if isinstance(prompts, str):
            raise UserError("prompts: a list of texts is needed, not one text; write [text]")
        if isinstance(stop, str) or not all(stop):
            raise UserError("stop: a list of non-empty strings is needed; write [text]")
        for index, prompt in enumerate(prompts):
            try:
                prompt.encode()
            except UnicodeEncodeError:
                raise UserError(f"prompts[{index}]: not valid UTF-8; convert it first") from None
        prefix = self.generation["prompt_prefix_ids"]
        encoded = [prefix + ids for ids in self.tokenizer.encode_batch(list(prompts))]
        for index, ids in enumerate(encoded):
            if not ids:
                raise UserError(f"prompts[{index}]: empty; give at least one character")
            if len(ids) >= self.config.context_length:
                raise UserError(
                    f"prompts[{index}]: {len(ids)} tokens leave no room in the context of "
                    f"{self.config.context_length}; shorten it"
                )
        try:
            yield from generate_steps(
                self.model,
                encoded,
                max_new_tokens=max_new_tokens,
                temperature=temperature,
                top_k=top_k,
                top_p=top_p,
                eos_id=self.generation["eos_id"],
                stop=(lambda ids: _find(self._text(ids), stop) is not None) if stop else None,
                seed=seed,
            )
        except ValueError as error:
            raise UserError(f"generate: {error}") from None

    def _cut(self, new_ids: list[int], stop: Sequence[str]) -> str:
        """The text of these ids, up to the first stop string."""
        text = self._text(new_ids)
        return text[: _find(text, stop)]

    def _text(self, new_ids: list[int]) -> str:
        """The text that these ids add to a text before them."""
        before = self.tokenizer.decode(self._anchor)
        return self.tokenizer.decode(self._anchor + new_ids)[len(before) :]

    def describe(self) -> dict[str, Any]:
        """What this bundle is, as plain values for logs and endpoints."""
        return {
            "bundle_sha256": self.manifest["bundle_sha256"],
            "certified": self.certified,
            "weight_format": self.weight_format,
            "statement": self.certificate["statement"],
            "context_length": self.config.context_length,
        }


def _find(text: str, stop: Sequence[str]) -> int | None:
    """Where the first stop string begins; None when there is none."""
    return min((start for start in (text.find(ending) for ending in stop) if start >= 0), default=None)


def settled(text: str, stop: Sequence[str]) -> str:
    """The beginning of a growing text that no further token changes: without a character whose bytes are not all there (they
    are decoded as U+FFFD), and without an end that may become a stop string."""
    text = text.rstrip(INCOMPLETE)
    held = (size for ending in stop for size in range(1, len(ending)) if text.endswith(ending[:size]))
    return text[: len(text) - max(held, default=0)]
