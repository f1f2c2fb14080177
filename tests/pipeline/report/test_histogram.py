"""Length histograms as bars."""

from __future__ import annotations

from pipeline.report.histogram import bars, median, power, share


def test_bars_are_as_high_as_their_counts() -> None:
    shown = bars([0, 0, 10, 40, 0, 1, 0, 0], 2, 5)
    assert [bar["height"] for bar in shown] == [25.0, 100.0, 0.0, 2.5, 0.0]
    assert [bar["label"] for bar in shown] == ["4", "8", "16", "32", "64"]
    assert all(bar["y"] + bar["height"] == 125.0 for bar in shown)
    assert shown[1]["title"] == "8 to 15: 40 documents" and shown[1]["share"] == "78%"
    assert median([0, 0, 10, 40]) == "16" and power(13) == "8k" and share(1, 1000) == "<1%"
