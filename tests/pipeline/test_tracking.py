"""The MLflow seam against a real store, a SQLite file. Servers that are away: test_outage.py."""

import pytest

from pipeline import tracking
from pipeline.config import parse_config
from pipeline.errors import ConfigError

TREE = {
    "name": "t",
    "data": {"sources": [{"url": "x.txt"}]},
    "model": {"vocab_size": 300, "num_layers": 1, "num_heads": 1, "head_dim": 4, "context_length": 8},
}


def configuration(folder, **sections):
    return parse_config({**TREE, "run_dir": str(folder), **sections}, where="test")


def history(config, run_id, key):
    points = tracking.client(tracking.tracking_uri(config)).get_metric_history(run_id, key)
    return [(p.step, p.value) for p in sorted(points, key=lambda p: p.step)]


def test_one_run_without_gap_or_double_over_a_resume(tmp_path):
    config = configuration(tmp_path)
    run_id = tracking.open_run(config)
    assert tracking.open_run(config) == run_id  # the run directory remembers
    spool = tmp_path / "logs" / "m.jsonl"
    first = tracking.Tracker(tracking.tracking_uri(config), run_id, spool)
    for step in (10, 20, 30):
        first.log(step, {"train/loss": float(step)})
    first.log(30, {"val/loss_block": 1.0})
    assert first.close()
    spool.write_bytes(spool.read_bytes() + b'{"step": 40, "val')  # killed inside a write
    second = tracking.Tracker(tracking.tracking_uri(config), run_id, spool)
    for step in (20, 30, 40):  # resumed from step 10
        second.log(step, {"train/loss": float(step)})
    assert second.close("FINISHED")
    assert history(config, run_id, "train/loss") == [(10, 10.0), (20, 20.0), (30, 30.0), (40, 40.0)]
    assert history(config, run_id, "val/loss_block") == [(30, 1.0)]
    run = tracking.client(tracking.tracking_uri(config)).get_run(run_id)
    assert run.info.status == "FINISHED" and run.data.params["model.head_dim"] == "4"
    # On another machine the spool is not there: MLflow knows how far the run came.
    third = tracking.Tracker(tracking.tracking_uri(config), run_id, tmp_path / "elsewhere" / "m.jsonl")
    third.log(40, {"train/loss": 40.0})
    third.log(50, {"train/loss": 50.0})
    assert third.close()
    assert [step for step, _ in history(config, run_id, "train/loss")] == [10, 20, 30, 40, 50]


@pytest.mark.parametrize("content", ["{", "[]", '{"tracking_uri": 3}'])
def test_a_damaged_run_file_begins_a_new_run_where_nothing_was_trained(tmp_path, content):
    first = tracking.open_run(configuration(tmp_path))
    (tmp_path / "run.json").write_text(content)
    second = tracking.open_run(configuration(tmp_path))
    assert second != first and tracking.open_run(configuration(tmp_path)) == second


def test_a_damaged_spool_does_not_end_a_run(tmp_path):
    config = configuration(tmp_path)
    run_id = tracking.open_run(config)
    spool = tmp_path / "m.jsonl"
    first = tracking.Tracker(tracking.tracking_uri(config), run_id, spool)
    first.log(1, {"train/loss": 1.0})
    assert first.close()
    spool.write_bytes(b'{"step": 5, "va\n[]\n' + spool.read_bytes())
    spool.with_suffix(".sent").write_text("xx")
    second = tracking.Tracker(tracking.tracking_uri(config), run_id, spool)
    second.log(2, {"train/loss": 2.0})
    assert second.close("FINISHED")
    assert history(config, run_id, "train/loss") == [(1, 1.0), (2, 2.0)]


def test_a_run_of_another_configuration_is_refused(tmp_path):
    run_id = tracking.open_run(configuration(tmp_path))
    with pytest.raises(ConfigError, match=rf"run {run_id} was made with seed=1, this configuration has 2"):
        tracking.open_run(configuration(tmp_path, seed=2))
    with pytest.raises(ConfigError, match="not found"):
        tracking.open_run(configuration(tmp_path), run_id="0" * 32)
    tracking.open_run(configuration(tmp_path, train={"log_every": 7}))  # changes nothing of the run
