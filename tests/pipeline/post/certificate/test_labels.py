"""Numbers of the page's tables."""

from __future__ import annotations

import math

from pipeline.post.certificate.labels import number


def test_numbers_are_short_and_never_nan() -> None:
    assert [number(x) for x in (None, math.nan, math.inf, 0, 128.0, 1e-5, 4.63e-8, 0.41553, 4.0)] == [
        "-", "-", "-", "0", "128", "1e-05", "4.6e-08", "0.4155", "4",
    ]  # fmt: skip
