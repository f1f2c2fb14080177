"""`pldr sweep --at-once 2` as a user runs it: variants at their best rate, stopped in the middle, started again."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import yaml

from pipeline.sweep.describe import headings
from pipeline.sweep.saved import read_saved

PLDR = [sys.executable, "-m", "launch.cli"]
pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]


def write(folder: Path, **changes) -> Path:
    """The sweep's YAML; its directory."""
    tree = {"name": "tuned", "config": "tiny.yaml", "run_dir": str(folder / "sweep"), "until": "train", **changes}
    (folder / "sweep.yaml").write_text(yaml.safe_dump(tree, sort_keys=False))
    return folder / "sweep"


def ours(folder: Path) -> list[str]:
    """The processes that work for a sweep below this folder."""
    found = []
    for process in psutil.process_iter(["cmdline", "cwd"]):
        words = " ".join(process.info["cmdline"] or [])
        if str(folder) in words or process.info["cwd"] == str(folder):
            found.append(f"{process.pid}: {words}")
    return found


def test_a_stopped_sweep_goes_on_and_compares_each_variant_at_its_best_rate(tmp_path, make_run):
    make_run(tmp_path, steps=60, warmup_steps=5, validate_every=20, checkpoint_every=10, ranks=1)
    sweep = write(
        tmp_path,
        about="Which G?",
        variants={"sdpa": {"model.g_source": "identity"}, "constant": {"model.g_source": "constant"}},
        grid={"train.max_lr": [1e-6, 1e-2], "seed": [1, 2]},
        compare={"baseline": "sdpa", "tune": "train.max_lr"},
        plot={"x": "train_seconds", "y": "val_loss_cached"},
    )
    command = [*PLDR, "sweep", "sweep.yaml", "--at-once", "2", "--json"]
    first = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    end = time.monotonic() + 900
    while not list((sweep / "children").glob("*/checkpoints/step-*/COMMITTED")):
        assert first.poll() is None, first.stdout.read()
        assert time.monotonic() < end
        time.sleep(0.05)
    first.send_signal(signal.SIGTERM)
    out = first.communicate(timeout=600)[0]
    assert first.returncode == 1 and "SIGTERM: 2 children save and stop" in out, out
    assert "stopped by SIGTERM; start again to continue" in out and ours(tmp_path) == []

    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=1500)
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["children"] == 6 and {row["status"] for row in result["table"]} == {"finished"}
    ran = [row["child"] for row in result["table"]]
    assert ran[:4] == [
        f"{variant}.max_lr-{rate}.seed-1" for variant in ("sdpa", "constant") for rate in ("1e-06", "0.01")
    ]
    assert ran[4:] == ["sdpa.max_lr-0.01.seed-2", "constant.max_lr-0.01.seed-2"]
    assert {folder.name for folder in (sweep / "children").iterdir()} == set(ran), "the others were not even begun"
    records = [json.loads((sweep / "children" / name / "stages/train.json").read_bytes()) for name in ran]
    resumed = [record["result"]["resumed_from"] for record in records]
    assert any(resumed), "what was saved on SIGTERM is where it went on"

    saved = read_saved(Path(result["files"]["table"]))
    assert [(line.variant, line.best, line.at_edge, line.value.n) for line in saved.lines] == [
        ("sdpa", 0.01, True, 2), ("constant", 0.01, True, 2),
    ]  # fmt: skip
    sdpa, constant = (dict(zip(line.pairs, line.values, strict=True)) for line in saved.lines)
    losses = {row["child"]: row["val_loss_cached"] for row in result["table"]}
    assert sdpa == {seed: losses[f"sdpa.max_lr-0.01.seed-{seed}"] for seed in (1, 2)}
    difference = saved.lines[1].difference
    assert difference.n == 2 and difference.mean == pytest.approx(sum(constant[s] - sdpa[s] for s in (1, 2)) / 2)
    assert [step for step, _ in saved.curves["sdpa.max_lr-0.01.seed-1"]["val/loss_cached"]] == [20, 40, 60]
    shown = done.stdout.splitlines()
    assert any(line.split() == " ".join(headings(saved.compare)).split() for line in shown)
    assert any(line.startswith("constant") and "2 seeds" in line for line in shown)
    page = Path(result["files"]["page"]).read_text()
    assert "Which G?" in page and "Against sdpa" in page and 'class="forest"' in page


def test_a_child_that_fails_stops_no_other_and_is_named_at_the_end(tmp_path, make_run):
    make_run(tmp_path, steps=4, warmup_steps=1, validate_every=4, checkpoint_every=4, ranks=1)
    write(
        tmp_path,
        variants={"broken": {"data.sources": [{"url": str(tmp_path / "absent.jsonl")}]}, "good": {}, "too": {}},
    )
    done = subprocess.run(
        [*PLDR, "sweep", "sweep.yaml", "--at-once", "2", "--json"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 1
    assert "1 of 3 children failed, broken with: " in done.stderr and "absent.jsonl" in done.stderr
    rows = json.loads((tmp_path / "sweep/report/sweep.json").read_bytes())["rows"]
    assert [(row["child"], row["status"]) for row in rows] == [
        ("broken", "failed"),
        ("good", "finished"),
        ("too", "finished"),
    ]
    assert "absent.jsonl" in rows[0]["error"] and ours(tmp_path) == []
