"""The style that all pages share: legible in both color schemes, and light on paper."""

from __future__ import annotations

import re

import pytest

from pipeline.report.html import HERE

CSS = (HERE / "page.css").read_text()


def palette(css: str) -> dict[str, str]:
    """The colors that a part of the style defines."""
    return dict(re.findall(r"--([a-z0-9-]+): (#[0-9a-f]{6})", css))


def luminance(color: str) -> float:
    parts = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    red, green, blue = (part / 12.92 if part <= 0.03928 else ((part + 0.055) / 1.055) ** 2.4 for part in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def contrast(one: str, other: str) -> float:
    """WCAG 2: 4.5 for text, 3 for graphics."""
    high, low = sorted((luminance(one), luminance(other)), reverse=True)
    return (high + 0.05) / (low + 0.05)


LIGHT, DARK = CSS.split("@media screen and (prefers-color-scheme: dark)", 1)


@pytest.mark.parametrize("colors", [palette(LIGHT), palette(DARK.split("* {", 1)[0])], ids=["light", "dark"])
def test_text_and_lines_have_contrast(colors: dict[str, str]) -> None:
    text = [("page", name) for name in ("ink", "soft", "kept")] + [
        ("card", name) for name in ("ink", "soft", "bad", "good")
    ]
    text += [
        ("good-bg", "good"),
        ("bad-bg", "bad"),
        ("bad-bg", "ink"),
        ("good-bg", "ink"),
        ("warn-bg", "warn"),
        ("mark-bg", "mark"),
    ]
    assert {
        pair: contrast(*(colors[name] for name in pair)) for pair in text if contrast(*(colors[n] for n in pair)) < 4.5
    } == {}
    assert {name for name in (f"line-{i}" for i in range(4)) if contrast(colors["card"], colors[name]) < 3} == set()


def test_paper_is_light_whatever_the_screen_is() -> None:
    assert len(re.findall("prefers-color-scheme", CSS)) == 1, (
        "only for screens, so that printing takes the light colors"
    )
    for template in HERE.parent.rglob("*.html"):
        assert "prefers-color-scheme" not in template.read_text(), template
