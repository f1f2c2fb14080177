"""A sweep's table, plot and page."""

import json
from pathlib import Path

import pytest

from pipeline.report.plots import Limit
from pipeline.sweep.plot import scatter
from pipeline.sweep.report import headline, table_lines, write_sweep_report
from tests.helpers.html_page import Page, browser, too_wide

AXES = {"x": "budget", "y": "relative_deviation_g", "log_x": False, "log_y": True}
FACTS = {
    "name": "s", "run_id": "r", "config": "base.yaml", "set": {"train.steps": "5"}, "grid": ["decay", "seed"], "children": 8,
    "plot": AXES,
}  # fmt: skip


def shipped(name="decay"):
    """The eight children of docs/experiments.md."""
    found = {0.1: (0.03, 1.13, 1.01), 10: (3.3, 0.97, 0.41), 20: (6.5, 5.3e-6, 0.1), 40: (13.1, 2.8e-6, 4.1e-8)}
    return [
        {**row(f"{name}-{decay}.seed-{seed}", budget, deviation, decay=decay, seed=seed), "run_id": "abc",
         "verdict": "certified" if deviation <= 1e-5 else "failed"}
        for decay, (budget, *both) in found.items() for seed, deviation in enumerate(both, start=1)
    ]  # fmt: skip


def row(child, x, y, **more):
    return {"child": child, "seed": 1, "budget": x, "relative_deviation_g": y, "status": "finished", **more}


def test_the_plot_places_points_by_hand_computed_geometry_and_counts_what_has_no_place(tmp_path):
    rows = [row("a", 0.0, 1e-1), row("b", 10.0, 1e-5), row("c", 5.0, 0.0), row("d", None, 1e-3), row("e", 5.0, 1e-3)]
    drawn = scatter(rows, x="budget", y="relative_deviation_g", log_x=False, log_y=True)
    assert drawn["left_out"] == 2
    points = [(p["x"], p["y"]) for p in drawn["points"]]
    # x: [-0.5, 10.5] on 64..640; y: log10 in [-5, -1] on 282..24.
    assert points == [(90.2, 24.0), (613.8, 282.0), (352.0, 153.0)]
    assert [label for _, label in drawn["y_marks"]] == ["1e-5", "1e-4", "1e-3", "1e-2", "0.1"]
    failed = row("f", 7.0, 1e-9, status="failed")
    assert scatter([*rows, failed], x="budget", y="relative_deviation_g", log_x=False, log_y=True) == {
        **drawn,
        "left_out": 3,
    }
    assert scatter([row("a", None, 1.0)], x="budget", y="relative_deviation_g", log_x=False, log_y=True) is None


def test_the_page_escapes_what_it_shows_and_loads_nothing(tmp_path):
    rows = [row("<script>alert(1)</script>", 1.0, float("nan")), row("b", 2.0, 1e-3)]
    facts = {
        "name": "s",
        "run_id": "r",
        "config": "base.yaml",
        "set": {"train.steps": "5"},
        "grid": ["seed"],
        "children": 2,
    }
    plot = {"x": "budget", "y": "relative_deviation_g", "log_x": False, "log_y": True}
    result = write_sweep_report({**facts, "plot": plot}, rows, tmp_path)
    page = Path(result["files"]["page"]).read_text()
    assert "<script" not in page and "&lt;script&gt;" in page and "http" not in page.replace("http-equiv", "")
    assert "<circle" in page and "default-src 'none'" in page
    table = json.loads(Path(result["files"]["table"]).read_text())
    assert table["rows"][0]["relative_deviation_g"] is None and table["rows"][1]["relative_deviation_g"] == 1e-3
    lines = table_lines(["seed"], rows)
    assert len(lines) == 3 and lines[0].split()[:2] == ["seed", "budget"] and "1e-3" in lines[2]


def test_the_page_leads_with_how_many_were_certified_and_links_the_children(tmp_path):
    for child in ("decay-0.1.seed-1", "decay-20.seed-1"):
        (tmp_path / "children" / child / "certificate").mkdir(parents=True)
        (tmp_path / "children" / child / "certificate" / "certificate.html").write_text("page")
    result = write_sweep_report(FACTS, shipped(), tmp_path / "report", limit=1e-5, uri="http://host")
    text = Path(result["files"]["page"]).read_text()
    page = Page(text)
    assert not page.faults and "s: 3 of 8 certified; 5 did not pass" in page.text
    figure = text[text.index('<svg viewBox="0 0 660') :]
    figure = figure[: figure.index("</figure>")]
    assert figure.count('"point certified"') == 3 and figure.count('"point failed"') == 5
    assert "1e-5: certified below" in page.text and "9: invariance is expected" in page.text and "20, 2" in page.text
    assert text.count("certificate/certificate.html") == 2
    for link in ("../children/decay-0.1.seed-1", "../children/decay-20.seed-1"):
        assert (tmp_path / "report" / link / "certificate" / "certificate.html").is_file()
        assert f'href="{link}/certificate/certificate.html"' in text
    assert page.links["MLflow"] == "http://host/#/runs/abc"


def test_headlines():
    rows = shipped()
    assert headline(rows[:6], 8) == "1 of 8 certified; 5 did not pass; 2 to come"
    assert headline([{"status": "failed"}, {"status": "finished", "verdict": "certified"}], 2) == (
        "1 of 2 certified; 1 broke off with an error"
    )
    assert headline([{"status": "finished"}], 3) == "1 of 3 finished; none was judged; 2 to come"


def test_labels_and_thresholds_of_the_plot():
    limits = {"relative_deviation_g": [Limit(1e-5, "allowed")], "seed": [Limit(1.0, "another column")]}
    drawn = scatter(shipped(), **AXES, grid=["decay", "seed"], limits=limits)
    assert drawn["x_limits"] == [] and drawn["y_limits"] == [{"y": 196.0, "label": "allowed"}]
    assert [point["label"] for point in drawn["points"]][:3] == ["0.1, 1", "0.1, 2", "10, 1"]
    boxes = []
    for point in drawn["points"]:
        assert point["at"] is not None
        width = 5.6 * len(point["label"])
        left = point["at"]["x"] - {"start": 0, "middle": width / 2, "end": width}[point["at"]["anchor"]]
        box = (left, point["at"]["y"] - 8, left + width, point["at"]["y"] + 3)
        assert not any(box[0] < b[2] and b[0] < box[2] and box[1] < b[3] and b[1] < box[3] for b in boxes)
        boxes.append(box)
    many = scatter([row(f"c{i}", i, 10.0 ** -(i % 9)) for i in range(60)], **AXES, grid=["seed"])
    assert [point["label"] for point in many["points"]][:2] == ["1", "2"], "by their numbers in the table"


@pytest.mark.slow
@pytest.mark.skipif(browser() is None, reason="no Chromium")
@pytest.mark.parametrize("width", [420, 1280])
def test_nothing_is_wider_than_its_place(tmp_path, width):
    long = "a_long_word" * 40
    facts = {**FACTS, "name": long, "config": long, "grid": [long], "set": {long: long}}
    rows = [{**one, long: 1.5e300, "error": long} for one in shipped(long)]
    page = Path(write_sweep_report(facts, rows, tmp_path, limit=1e-5, uri=f"sqlite:////{long}")["files"]["page"])
    assert too_wide(page, width, tmp_path) == "none"
