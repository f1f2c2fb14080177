"""`pldr bundle verify BUNDLE` (also `pldr verify BUNDLE`), and `pldr generate`: what is done with a finished bundle."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from launch.commands.verbs import Report, Result, Verbs
from pipeline.errors import UserError


def add_bundle_verbs(verbs: Verbs) -> None:
    """The verbs `generate` and `verify`; the long name of the latter is `bundle verify`."""
    sub = verbs.add("generate", _generate, "continue prompts with a bundle")
    sub.add_argument(
        "bundle", metavar="BUNDLE", help="a bundle folder; also an export of `pldr export hf`, or a run's YAML"
    )
    sub.add_argument("--prompt", action="append", required=True, help="text to continue; several make a batch")
    sub.add_argument("--max-new-tokens", type=int, default=100)
    sub.add_argument("--temperature", type=float, default=0.0, help="0 is greedy")
    sub.add_argument("--top-k", type=int, default=0, help="of the best tokens; 0 for all")
    sub.add_argument("--top-p", type=float, default=1.0, help="the best tokens that reach this probability")
    sub.add_argument(
        "--min-p", type=float, default=0.0, help="tokens of at least this share of the best one's probability"
    )
    sub.add_argument(
        "--repetition-penalty", type=float, default=1.0, help="above 1 against tokens of the prompt and the text so far"
    )
    sub.add_argument("--stop", action="append", default=[], help="end before this text; may be given several times")
    sub.add_argument("--seed", type=int, default=None)
    sub.add_argument(
        "--no-speculate", action="store_true", help="read one token after another, also where a text repeats itself"
    )
    for name in ("verify", "bundle verify"):
        sub = verbs.add(
            name, _verify, "check every byte of a bundle, its schemas, and its certificate against its files"
        )
        sub.add_argument("bundle", metavar="BUNDLE", help="a bundle folder")


def _generate(arguments: Any, report: Report) -> Result:
    from pipeline.inference.runtime import Bundle, NotFiniteRows

    bundle = Bundle.load(arguments.bundle)
    texts: Sequence[str | None]
    refused = None
    try:
        texts = bundle.generate(
            arguments.prompt,
            max_new_tokens=arguments.max_new_tokens,
            temperature=arguments.temperature,
            top_k=arguments.top_k,
            top_p=arguments.top_p,
            min_p=arguments.min_p,
            repetition_penalty=arguments.repetition_penalty,
            stop=arguments.stop,
            seed=arguments.seed,
            speculate=False if arguments.no_speculate else None,
        )
    except NotFiniteRows as error:
        refused, texts = error, error.completions
    for prompt, text in zip(arguments.prompt, texts, strict=True):
        if text is not None:
            report(f"{prompt}{text}\n")
    if refused is not None:
        raise UserError(f"{refused.problem}; leave it out", details={"completions": texts})
    return {"completions": texts, "certified": bundle.certified}


def _verify(arguments: Any, report: Report) -> Result:
    from pipeline.bundle.read import verify_bundle

    result = verify_bundle(arguments.bundle)
    state = "certified" if result["certified"] else "UNCERTIFIED"
    report(
        f"{arguments.bundle}: {result['files']} files, every byte as in its manifest; the certificate is of these files"
    )
    numbers = result["numbers_per_key"]
    keys = "" if numbers is None else f"keys of {numbers:.3g} numbers on average, "
    weights = f"weights {result['weight_format']}"
    report(f"{state}, G_LM {result['tier']}, {weights}, {keys}sha256 {result['bundle_sha256']}")
    return result
