"""A loaded bundle: text in, text out, with KV-cache and G-cache.

Decision: prompts are encoded as the training text was, without bos. A completion is decoded as the continuation of a text,
so that the space between prompt and completion is kept (SentencePiece drops a leading one). Stop strings are searched in that
text and not in tokens: a stop string may begin inside one token and end inside another.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from pipeline.bundle.read import BundleParts, read_bundle
from pipeline.errors import UserError
from pipeline.inference.completion import Completion
from pipeline.inference.request import PromptEncoder, read_stop
from pldr_model.generation import NotFiniteError, generate_steps
from pldr_model.model import PLDRModel

NAMED = 5  # prompts in a message


class NotFiniteRows(UserError):
    """The model's logits were NaN or infinite for some prompts of a batch; the others are complete.

    rows: index of the prompt -> its new tokens before that. completions: what `generate` would have returned, with None for
    these prompts.
    """

    def __init__(self, rows: dict[int, int], completions: list[str | None]) -> None:
        named = ", ".join(f"prompts[{index}]" for index in list(rows)[:NAMED])
        more = f" and {len(rows) - NAMED} more" if len(rows) > NAMED else ""
        first = next(iter(rows.values()))
        self.problem = f"{named}{more}: the model's logits are NaN or infinite (after {first} new tokens of the first)"
        done = sum(text is not None for text in completions)
        super().__init__(f"{self.problem}; leave it out, or take the other {done} from `completions` of this error")
        self.rows, self.completions = rows, completions


class Bundle:
    """A verified bundle, ready to generate. `certificate`, `manifest`, `config` and `tokenizer` are public and read-only."""

    def __init__(self, parts: BundleParts) -> None:
        self.config, self.weight_format, self.tokenizer = parts.config, parts.weight_format, parts.tokenizer
        self.certificate, self.manifest, self.generation = parts.certificate, parts.manifest, parts.generation
        self.certified: bool = parts.manifest["certified"]
        self.model = PLDRModel(parts.config, g_lm_LHKK=parts.g_lm)
        self.model.load_state_dict({**parts.weights, "g_lm": parts.g_lm})
        self.model.eval()
        # Bytes for the rows that decode together; None: what `pldr_model.generation.memory_budget` says.
        self.memory: int | None = None
        prefix = self.generation["prompt_prefix_ids"]
        self._encode = PromptEncoder(self.tokenizer, context_length=self.config.context_length, prefix=prefix)
        # A piece that is decoded before the new ids, so that they keep their leading space, whatever the prompt was.
        self._anchor = self.tokenizer.encode("a")[-1:]
        self._anchor_size = len(self.tokenizer.decode(self._anchor))

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
        gives the same text; None draws a new one. Prompts of a batch do not affect each other, and decode together as many as
        fit `memory`.
        Raises UserError, before anything is computed, for empty prompts, prompts that leave no room in the context, and
        settings of a wrong type or out of range. Raises NotFiniteRows (a UserError), after all others have ended, for prompts
        whose logits were NaN or infinite; it holds the completions of the others.
        """
        settings = {"max_new_tokens": max_new_tokens, "temperature": temperature, "top_k": top_k, "top_p": top_p}
        encoded, stops = self._encode(prompts), read_stop(stop)
        texts = [Completion(self._decode, stops) for _ in encoded]
        take = (lambda index, new: texts[index].take(new)) if stops else None
        failed: dict[int, int] = {}
        try:
            *_, new = self._steps(encoded, stop=take, seed=seed, **settings)
        except NotFiniteError as error:
            failed, new = error.rows, error.new
        for text, ids in zip(texts, new, strict=True):
            text.take(ids)
        if failed:
            raise NotFiniteRows(failed, [None if i in failed else text.finish() for i, text in enumerate(texts)])
        return [text.finish() for text in texts]

    def stream(self, prompt: str, *, stop: Sequence[str] = (), **settings: Any) -> Iterator[str]:
        """The completion that `generate` gives for one prompt, in pieces as they come. Settings and errors are those of
        `generate`; errors come with the first piece, except NotFiniteRows, which comes after the last.

        A piece never ends inside a character, nor in what may become a stop string.
        """
        text, sent = Completion(self._decode, read_stop(stop)), 0
        settings = {"max_new_tokens": 128, "seed": 0} | settings
        try:
            for _ in self._steps(self._encode([prompt]), stop=lambda _, new: text.take(new), **settings):
                if piece := text.settled()[sent:]:
                    sent += len(piece)
                    yield piece
        except NotFiniteError as error:
            raise NotFiniteRows(error.rows, [None]) from None
        if piece := text.finish()[sent:]:
            yield piece

    def _steps(
        self, encoded: list[Any], *, stop: Callable[[int, list[int]], bool] | None, **settings: Any
    ) -> Iterator[list[list[int]]]:
        """The new tokens of every prompt after each step."""
        eos_id = self.generation["eos_id"]
        try:
            yield from generate_steps(self.model, encoded, stop=stop, eos_id=eos_id, memory=self.memory, **settings)
        except NotFiniteError:
            raise
        except ValueError as error:
            raise UserError(f"generate: {error}") from None

    def _decode(self, new_ids: list[int]) -> str:
        """The text that these ids add to a text before them."""
        return self.tokenizer.decode(self._anchor + new_ids)[self._anchor_size :]

    def describe(self) -> dict[str, Any]:
        """What this bundle is, as plain values for logs and endpoints."""
        return {
            "bundle_sha256": self.manifest["bundle_sha256"],
            "certified": self.certified,
            "weight_format": self.weight_format,
            "statement": self.certificate["statement"],
            "context_length": self.config.context_length,
        }
