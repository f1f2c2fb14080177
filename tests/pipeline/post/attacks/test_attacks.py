"""The attack suite: each cheat and each honest model gets the verdict that is right, and docs/certificate.md has their table.

`PLDR_WRITE_TABLE=1 pytest -m slow tests/pipeline/post/attacks` writes that table, when all of them were run and right.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers.models import train_tokenizer
from tests.pipeline.post.attacks import cheats, cheats_on_files, honest
from tests.pipeline.post.attacks.table import names_in, read_table, write_table
from tests.pipeline.post.attacks.trained import SIZES, Lab
from tests.pipeline.post.attacks.verdicts import Case

SUITE: dict[str, dict[str, Case]] = {
    "cheats": {**cheats.CHEATS, **cheats_on_files.CHEATS},
    "honest": honest.HONEST,
}
ALL = {name: case for cases in SUITE.values() for name, case in cases.items()}


@pytest.fixture(scope="session")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Lab:
    """Trains and validates; its models are trained once."""
    folder = tmp_path_factory.mktemp("attacks")
    return Lab(folder, train_tokenizer(folder, vocab_size=SIZES.vocab_size))


@pytest.fixture(scope="session")
def verdicts(repository: Path) -> Iterator[dict[str, str]]:
    """The right verdicts by name, which become the table."""
    found: dict[str, str] = {}
    yield found
    if os.environ.get("PLDR_WRITE_TABLE") and found.keys() == ALL.keys():
        write_table(repository, SUITE, found)


@pytest.mark.slow
@pytest.mark.parametrize("name", ALL)
def test_the_verdict_is_right(name: str, lab: Lab, verdicts: dict[str, str]) -> None:
    case = ALL[name]
    verdict = case.run(lab)
    assert verdict.is_right(case.right), f"{case.what} Right: {case.right}. It was: {verdict.text}"
    verdicts[name] = verdict.text


def test_the_table_of_verdicts_is_of_this_suite(repository: Path) -> None:
    assert names_in(read_table(repository)) == list(ALL)


def test_the_suite_is_as_large_as_promised() -> None:
    assert len(SUITE["cheats"]) >= 20 and len(SUITE["honest"]) >= 20
    assert len(ALL) == len(SUITE["cheats"]) + len(SUITE["honest"])  # no name twice
