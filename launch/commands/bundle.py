"""`pldr bundle verify BUNDLE`, also `pldr verify BUNDLE`: every byte, the schemas, the certificate against the files."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from typing import Any

Result = dict[str, Any]
Show = Callable[[str], None]


def add_bundle_verbs(verbs: Any, common: argparse.ArgumentParser) -> None:
    """The verb `verify`, whose long name is `bundle verify`."""
    about = "check every byte of a bundle, its schemas, and its certificate against its files"
    verify = verbs.add_parser("verify", help=about, description=about, parents=[common])
    verify.add_argument("bundle", metavar="BUNDLE", help="a bundle folder")
    verify.set_defaults(work=_verify)


def long_name(words: Sequence[str]) -> list[str]:
    """`bundle verify …` as `verify …`: the stage `bundle CONFIG` leaves argparse no room for verbs of its own."""
    return ["verify", *words[2:]] if list(words[:2]) == ["bundle", "verify"] else list(words)


def _verify(arguments: Any, show: Show) -> Result:
    from pipeline.bundle.read import verify_bundle

    result = verify_bundle(arguments.bundle)
    state = "certified" if result["certified"] else "UNCERTIFIED"
    show(
        f"{arguments.bundle}: {result['files']} files, every byte as in its manifest; the certificate is of these files"
    )
    show(f"{state}, G_LM {result['tier']}, weights {result['weight_format']}, sha256 {result['bundle_sha256']}")
    return result
