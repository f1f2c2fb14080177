"""What is written of a bound is one too: nine digits, and two in the statement, rounded up."""

from __future__ import annotations

import math

import pytest

from pipeline.bundle.certificate.checks import rounded
from pipeline.bundle.certificate.statement import rounded_up
from pipeline.post.every_input.proof import _number


@pytest.mark.parametrize("value", [1.7e-7, 1.70000000000001e-7, 1.2345678949e-8, 9.999999999e-5, 3e-300, 0.0, 2.0])
def test_a_bound_is_written_rounded_up(value: float) -> None:
    written = _number(value)
    assert written is not None and value <= written <= value * (1 + 1.1e-8)
    assert rounded(written) == written  # as it is in the file
    assert written <= rounded_up(written) <= value * 1.11
    assert _number(math.inf) is None
