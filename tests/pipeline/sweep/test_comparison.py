"""A comparison as it is shown: words, tables, plots, the sweep's page, the page over several sweeps, Markdown, small copies."""

import json
import math
import subprocess
import sys
from dataclasses import replace

import pytest

from pipeline.errors import UserError
from pipeline.io.storage import read_json
from pipeline.sweep import amounts, describe, forest
from pipeline.sweep.compare import Interval, compared
from pipeline.sweep.config import CompareConfig
from pipeline.sweep.curves import curves_of, mean_curve
from pipeline.sweep.markdown import block, blocks, markdown, put_into
from pipeline.sweep.page import main
from pipeline.sweep.panels import panels
from pipeline.sweep.saved import read_saved, render_small, small
from tests.helpers.comparisons import PLAIN, TUNED, children, row, sweep_file
from tests.helpers.html_page import Page, browser, too_wide
from tests.pipeline.sweep.test_compare import tuned


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("sweeps")


@pytest.fixture(scope="module")
def fair(folder):
    return sweep_file(folder)


def line(difference):
    every, rows = tuned()
    return replace(compared(every, rows, TUNED)[1], difference=difference)


@pytest.mark.parametrize(
    ("difference", "words"),
    [
        (Interval(3, -0.0118, 0.0043), "below by 0.0118 ± 0.0043 (3 seeds)"),
        (Interval(3, 0.0118, 0.0043), "above by 0.0118 ± 0.0043 (3 seeds)"),
        (Interval(3, 0.012, 0.0121), "cannot be told apart: +0.012 ± 0.012 (3 seeds)"),
        (Interval(3, 0.0, 0.0), "equal (3 seeds)"),
        (Interval(1, -0.012, None), "below by 0.0120 in one pair: no interval"),
        (Interval(1, 0.0, None), "equal in one pair"),
        (Interval(2, -30.0, 12.7), "below by 30 ± 13 (2 seeds)"),
        (None, "no pair with the baseline yet"),
    ],
)
def test_what_is_significant_in_words(difference, words):
    assert describe.verdict(line(difference), TUNED) == words
    assert describe.is_told_apart(line(difference)) is (" ± " in words and "cannot" not in words)


def test_the_baseline_and_pairs_that_are_no_seeds():
    every, rows = tuned()
    sdpa = compared(every, rows, TUNED)[0]
    assert describe.verdict(sdpa, TUNED) == "the baseline"
    other = TUNED.model_copy(update={"pairs": "train.steps"})
    assert describe.verdict(line(Interval(3, 0.2, 0.1)), other) == "above by 0.20 ± 0.10 (3 pairs)"


@pytest.mark.parametrize(
    ("interval", "text"),
    [
        (Interval(3, 4.17234, 0.0102), "4.172 ± 0.010"),
        (Interval(3, 4.17234, 0.4), "4.17 ± 0.40"),
        (Interval(3, 1234.5, 55.0), "1234 ± 55"),
        (Interval(1, 4.17234, None), "4.1723"),
        (Interval(3, 2.1e-7, 1.3e-8), "2.1e-7 ± 1.3e-8"),
        (Interval(3, 0.0, 0.0), "0.0000 ± 0.0000"),
    ],
)
def test_as_many_digits_as_the_interval_has(interval, text):
    assert amounts.with_half(interval) == text


def test_on_a_logarithmic_scale_ratios_are_compared():
    compare = CompareConfig(baseline="sdpa", value="order_parameter", log=True)
    every = children("sdpa", "paper", "zero", seeds=(1, 2))
    values = dict(zip((child.name for child in every), (1e-1, 4e-1, 1e-5, 1e-5, 0.0, 1e-7), strict=True))
    rows = {child.name: row(child, None, order_parameter=values[child.name]) for child in every}
    sdpa, paper, zero = compared(every, rows, compare)
    assert amounts.bounds(sdpa.value, log=True)[1] == pytest.approx(0.2)
    spread = (
        math.log(2) * 12.706
    )  # half the logarithms' distance, times Student's t over the root of 2 times the root of 2
    assert sdpa.value.half == pytest.approx(spread) and amounts.mean(sdpa.value, log=True) == "0.2 x/÷ 6.7e3"
    assert math.exp(paper.difference.mean) == pytest.approx(5e-5) and not math.isclose(paper.difference.half, 0)
    assert describe.verdict(paper, compare) == "below by a factor of 2e4 x/÷ 6.7e3 (2 seeds)"
    assert (
        zero.missing == ("zero.seed-1",)
        and describe.verdict(zero, compare) == "below by a factor of 4e6 in one pair: no interval"
    )
    assert "order parameter" not in describe.headings(compare)
    assert "without a positive order_parameter" in " ".join(describe.unknown([sdpa, paper, zero], compare, 0))
    assert "A ratio of up to 6.7e3 can go unseen" in " ".join(describe.unknown([sdpa, paper, zero], compare, 0))
    drawn = forest.differences([sdpa, paper, zero], compare)
    assert drawn["log"] and drawn["title"] == "ratio to sdpa" and len(drawn["rows"][0]["dots"]) == 2
    assert forest.values([sdpa, paper, zero], compare)["log"]


def test_the_terminal_has_a_line_for_each_variant_and_marks_the_edge():
    every, rows = tuned()
    lines = describe.comparison_lines(compared(every, rows, TUNED), TUNED)
    assert lines[0].split()[:6] == ["variant", "against", "sdpa", "val_loss_cached", "n", "best"]
    assert lines[1].startswith("sdpa ") and "the baseline" in lines[1] and "0.003 " in lines[1]
    assert "cannot be told apart: +0.020 ± 0.025 (3 seeds)" in lines[2] and "0.006*" in lines[2]
    assert lines[3].startswith("* the smallest or largest tried")


def test_conclusions_and_what_they_leave_open():
    every, rows = tuned()
    rows["paper.max_lr-0.006.seed-3"] |= {"status": "failed"}
    lines = compared(every, rows, TUNED)
    assert describe.conclusions(lines, TUNED) == [
        "No variant is below sdpa.", "Cannot be told apart from sdpa: paper (+0.025 ± 0.064).",
    ]  # fmt: skip
    edge, missing, unseen = describe.unknown(lines, TUNED, 0)
    assert edge.startswith("Best train.max_lr at the edge of those tried: paper.")
    assert "not in the means: paper.max_lr-0.006.seed-3" in missing and "up to 0.064 " in unseen and "2 seeds" in unseen
    assert describe.unknown(lines, TUNED, 4)[0].startswith("4 children are still to run")
    assert describe.counted(lines[1]) == "2 of 3"
    single = replace(lines[1], variant="single", difference=None)
    lower = [lines[0], replace(lines[1], difference=Interval(3, -0.03, 0.01)), single]
    assert describe.conclusions(lower, TUNED) == [
        "Below sdpa: paper (-0.030 ± 0.010).", "With one pair or none, so without an interval: single.",
    ]  # fmt: skip
    assert describe.costs(lines, TUNED) == "sdpa 60 s; paper x 1.00."
    assert describe.costs(lines[1:], TUNED) == ""


def test_curves_and_their_means():
    histories = {
        "val/loss_cached": [(100, 5.0), (200, float("nan")), (300, 4.0), (300, 4.1)],
        "invariance/order_parameter_G": [(100, 1e-2), (200, 1.8e308)],
        "train/loss": [(1, 9.0)],
    }
    assert curves_of(histories) == {
        "val/loss_cached": [(100, 5.0), (300, 4.1)],  # a step that was trained again: the later one
        "invariance/order_parameter_G": [(100, 1e-2)],
    }
    one, other = [[100, 1e-2], [200, 1e-4], [300, 1.0]], [[100, 1e-4], [200, 0.0]]
    assert mean_curve([one, other], log=False) == [(100, 5.05e-3), (200, 5e-5)]
    assert mean_curve([one, other], log=True) == [(100, pytest.approx(1e-3))]
    assert mean_curve([], log=True) == []


def test_panels_share_their_axes_and_the_baseline():
    lines = {
        name: [(0.001, 4.0 + place), (0.01, 3.0 + place)] for place, name in enumerate(["base", "a", "b", "c", "d"])
    }
    made = panels(lines, "base", title="t", unit="u", along="rate", log_x=True, points=True, newest=lambda points: "n")
    assert [[one["name"] for one in plot["lines"]] for plot in made] == [["base", "a", "b", "c"], ["base", "d"]]
    assert [[one["style"] for one in plot["lines"]] for plot in made] == [[0, 1, 2, 3], [0, 1]]
    assert made[0]["marks"] == made[1]["marks"] and made[0]["lines"][0] == made[1]["lines"][0]
    # rates: 0.001 at 52, 0.01 at 480; values: [3, 8] on 188..24
    assert made[1]["lines"][1]["dots"] == [(52.0, 24.0), (480.0, 56.8)] and made[0]["lines"][0]["dots"][1] == (
        480.0,
        188.0,
    )
    assert [label for _, label in made[0]["steps"]] == ["0.001", "0.01"]
    assert panels({"base": []}, "base", title="t", unit="u", along="x", newest=str) == []
    (alone,) = panels({"base": [(3.0, 1e-3)]}, "base", title="t", unit="u", along="x", log_y=True, newest=lambda _: "")
    assert alone["lines"][0]["dots"] and not alone["lines"][0]["pieces"]


def test_the_rows_of_the_forest_plot_by_hand():
    every, rows = tuned()
    lines = compared(every, rows, TUNED)
    drawn = forest.differences(lines, TUNED)
    (row,) = drawn["rows"]
    # dots 0.01 to 0.03 and the line at 0; the interval -0.0048..0.0448, so the axis is that and 3 % more: 8..472
    low, high = 0.02 - 0.024843 - 0.03 * 0.049686, 0.02 + 0.024843 + 0.03 * 0.049686
    assert row["dots"][0][0] == pytest.approx(8 + 464 * (0.02 - low) / (high - low), abs=0.2)
    assert drawn["line"] == pytest.approx(8 + 464 * (0 - low) / (high - low), abs=0.2)
    assert row["kind"] == "same" and not drawn["has_open"]
    wide = [lines[0], replace(lines[1], difference=Interval(2, 0.02, 5.0))]
    drawn = forest.differences(wide, TUNED)
    assert drawn["has_open"] and drawn["rows"][0]["ends"]["open_from"], "a wide interval does not flatten the dots"
    assert drawn["rows"][0]["dots"][2][0] - drawn["rows"][0]["dots"][1][0] < -50
    assert forest.values(lines, TUNED)["log"] is False
    far = [replace(lines[0], values=(1e-8, 2e-8), value=Interval(2, 1.5e-8, 6e-8)), lines[1]]
    assert forest.values(far, TUNED)["log"] is True
    assert forest.differences(lines[1:], TUNED) is None


def test_the_sweeps_file_and_page_lead_with_the_comparison(fair):
    tree = read_json(fair)
    assert [one["variant"] for one in tree["compared"]] == ["sdpa", *(f"variant-{n}" for n in range(1, 6))]
    assert tree["curves"]["sdpa.max_lr-0.003.seed-1"]["val/loss_cached"][-1][0] == 3000
    assert all("curves" not in row for row in tree["rows"]) and len(tree["rows"]) == tree["children"] == 36
    text = fair.with_suffix(".html").read_text()
    page = Page(text)
    assert not page.faults and not page.loaded
    words = page.words()
    assert words.index("Against sdpa") < words.index("Children") and "Does any variant reach" in words
    assert (
        "below by" in words and "0.006*" in words and "Best train.max_lr at the edge of those tried: variant-5" in words
    )
    assert (
        text.count('<figure class="forest">') == 2 and text.count("val_loss_cached against max_lr") == 4
    )  # title, label
    assert "invariance/order_parameter_G" in words


def test_one_page_over_several_sweeps(folder, fair, capsys):
    plain = sweep_file(folder, name="plain", variants=3, tune=False)
    page = folder / "all.html"
    assert main([str(fair), str(plain), "--out", str(page), "--title", "What PLGA buys"]) == 0
    found = Page(page.read_text())
    assert not found.faults and not found.loaded
    words = found.words()
    parts = ("Below sdpa:", "variant-1 x 1.10", "can go unseen", "36 of 36 children")
    assert sorted(parts, key=words.index) == list(parts) and "What PLGA buys" in words
    assert "plain" in found.links and capsys.readouterr().out == ""


def test_a_copy_is_small_names_no_run_and_gives_the_same_tables(folder, fair):
    copies = folder / "copies"
    assert main([str(fair), "--copy-to", str(copies)]) == 0
    copy = copies / "fair.json"
    text = copy.read_text()
    assert "id-sdpa" not in text and "parent" not in text and "is not finite" not in text and str(folder) not in text
    assert copy.stat().st_size < 0.5 * fair.stat().st_size
    assert markdown(read_saved(copy)) == markdown(read_saved(fair))
    assert render_small(small(json.loads(text))) == copy.read_bytes(), "a copy of a copy is the copy"


def test_tables_are_put_between_their_comments(folder, fair):
    saved = read_saved(fair)
    places = [f"<!-- sweep: {name} -->\nbefore\n<!-- end of sweep -->\n" for name in ("fair", "other")]
    page = "# Page\n\n" + "\nMore.\n\n".join(places)
    made = put_into(page, saved, "page.md")
    assert blocks(made) == {"fair": markdown(saved), "other": "before\n"} and made.endswith("<!-- end of sweep -->\n")
    assert made.startswith("# Page\n\n<!-- sweep: fair -->\n| variant | against sdpa |") and made.count("before") == 1
    assert put_into(made, saved, "page.md") == made and block(saved) in made
    with pytest.raises(UserError, match=r"page\.md: has no lines `<!-- sweep: fair -->`"):
        put_into("# Page\n", saved, "page.md")


def test_names_do_not_break_a_table(fair):
    saved = read_saved(fair)
    hostile = replace(saved, lines=tuple(replace(one, variant="a|b<script>") for one in saved.lines[1:2]))
    assert "| a\\|b\\<script> |" in markdown(hostile)


def test_a_sweep_without_a_comparison_shows_its_children(folder, tmp_path, fair):
    tree = read_json(fair) | {"compare": None, "compared": []}
    (tmp_path / "grid.json").write_text(json.dumps(tree))
    text = markdown(read_saved(tmp_path / "grid.json"))
    assert text.startswith("| variant | max_lr | seed | order_parameter | status |") and text.count("\n") == 2 + 36
    assert main([str(tmp_path / "grid.json"), "--out", str(tmp_path / "page.html")]) == 0
    assert "its children are below" in Page((tmp_path / "page.html").read_text()).words()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "not valid JSON"),
        ('{"schema_version": 9}', "schema_version 9"),
        ('{"schema_version": 1, "rows": []}', "is no table of a sweep (KeyError: 'name')"),
        (
            '{"schema_version": 1, "name": "s", "grid": [], "children": 0, "rows": [], "compare": {}}',
            "is no table of a sweep",
        ),
    ],
)
def test_what_is_no_sweep_is_refused_in_one_line(tmp_path, capsys, content, message):
    (tmp_path / "s.json").write_text(content)
    assert main([str(tmp_path / "s.json"), "--markdown"]) == 1
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_mistakes_on_the_command_line(fair, tmp_path, capsys):
    assert main([str(fair), str(fair), "--markdown"]) == 1
    assert "two files are of the sweep fair" in capsys.readouterr().err
    assert main([str(fair), "--into", str(tmp_path / "none.md")]) == 1
    assert "none.md: no such file" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main([str(fair)])
    done = subprocess.run(
        [sys.executable, "-m", "pipeline.sweep.page", str(fair), "--markdown"], capture_output=True, text=True
    )
    assert done.returncode == 0 and done.stdout == block(read_saved(fair))


@pytest.mark.slow
@pytest.mark.skipif(browser() is None, reason="no Chromium")
@pytest.mark.parametrize("width", [400, 1200])
@pytest.mark.parametrize("which", ["sweep", "several"])
def test_nothing_is_wider_than_its_place(tmp_path, width, which):
    files = [sweep_file(tmp_path), sweep_file(tmp_path, name="many", variants=18, tune=False)]
    page = files[0].with_suffix(".html")
    if which == "several":
        page = tmp_path / "all.html"
        assert main([*map(str, files), "--out", str(page)]) == 0
    assert too_wide(page, width, tmp_path) == "none"


def test_without_results_there_is_no_comparison_yet(tmp_path):
    assert compared([], {}, PLAIN) == []
