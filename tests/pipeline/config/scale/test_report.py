"""`pldr plan --devices …`: the table of world sizes, what it advises, and its words."""

import json
import tarfile

import pytest

from launch.cli import main
from pipeline.config.load import load_config
from pipeline.config.rank_memory import muon_parameters
from pipeline.config.scale.best import judge, stage_table
from pipeline.config.scale.cluster import Cluster
from pipeline.config.scale.input_output import checkpoint_bytes
from pipeline.config.scale.lines import scale_lines
from pipeline.config.scale.report import scale
from pipeline.errors import ConfigError


@pytest.fixture
def load(repository):
    return lambda *overrides: load_config(str(repository / "configs" / "pldr-110m.yaml"), list(overrides))


def test_the_best_way_at_every_size(load):
    report = scale(load("train.global_batch=1024"), Cluster(devices=64, price_per_gpu_hour=2.0))
    rows = {row["devices"]: row for row in report["world_sizes"]}
    assert list(rows) == [8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096]
    for devices, row in rows.items():
        if devices > 1024:
            assert "global_batch 1024 feeds 1024 devices at most" in row["problem"]
            continue
        assert row["fits"] and row["micro_batch"] * row["accumulation"] * devices == 1024
        assert row["cost"] == pytest.approx(2.0 * devices * row["hours"])
        assert 0 < row["goodput"] < 1 and row["step_seconds"]["total"] > row["step_seconds"]["compute"]
    # The table's own claim: nothing that fits is much faster.
    for way in stage_table(load("train.global_batch=1024"), Cluster(devices=64)):
        if way.fits and way.config.train.zero_stage > 0:
            assert way.step.total >= rows[64]["step_seconds"]["total"] / 1.011
    text = "\n".join(scale_lines(report))
    assert "set train.checkpoint_every=" in text and "overlap_comm=true would wait for" in text


def test_a_model_that_fits_only_sharded_or_recomputed(load):
    large = (
        "model.num_layers=300",
        "model.num_heads=64",
        "model.d_ff=null",
        "train.global_batch=1024",
        "train.micro_batch=1",
    )
    report = scale(load(*large), Cluster(devices=256))
    rows = {row["devices"]: row for row in report["world_sizes"]}
    assert "nothing fits 80 GB" in rows[8]["problem"] and rows[256]["zero_stage"] == 3
    assert [one["fits"] for one in report["stages"]][:3] == [False, False, False]
    sharded = scale(load(*large, "train.zero_stage=3"), Cluster(devices=256))
    assert any("weights, backward" in one["what"] for one in sharded["traffic"])


def test_devices_that_do_not_divide_the_batch_are_refused_with_the_fix(load):
    with pytest.raises(
        ConfigError, match="global_batch 32 feeds 32 devices at most: raise train.global_batch to a multiple"
    ):
        scale(load(), Cluster(devices=64))
    with pytest.raises(ConfigError, match="does not divide global_batch 32: set train.micro_batch=2"):
        scale(load(), Cluster(devices=16))
    with pytest.raises(ConfigError, match="is no multiple of 24"):
        scale(load(), Cluster(devices=24))


def test_a_run_whose_batches_grow_takes_the_time_of_its_steps(load):
    """Half of the steps with half of the batch: they compute half as long, but send as much."""
    cluster, common = Cluster(devices=8, mtbf_hours=1e9), ("train.steps=4000", "train.global_batch=64")
    warmup = "train.batch_warmup=[{batch: 32, steps: 2000}]"
    plain, growing = judge(load(*common), cluster), judge(load(*common, warmup), cluster)
    small = judge(load("train.steps=4000", "train.global_batch=32"), cluster)
    every = plain.checkpoint_every
    assert growing.hours(every) == pytest.approx((plain.hours(every) + small.hours(every)) / 2, rel=1e-3)
    assert growing.hours(every) > 0.75 * plain.hours(every)


def test_devices_that_a_smaller_batch_does_not_feed_are_refused(load):
    growing = load("train.global_batch=64", "train.batch_warmup=[{batch: 8, steps: 10}]")
    with pytest.raises(
        ConfigError, match="batch_warmup: a batch of 8 feeds 8 devices at most: raise it to a multiple of 16"
    ):
        scale(growing, Cluster(devices=16))
    with pytest.raises(ConfigError, match=r"does not divide each batch of batch_warmup: set train.micro_batch=1"):
        scale(growing, Cluster(devices=8))
    larger = load("train.global_batch=64", "train.batch_warmup=[{batch: 32, steps: 10}]")
    for row in scale(larger, Cluster(devices=8))["world_sizes"]:
        assert "problem" in row or 32 % (row["micro_batch"] * row["devices"]) == 0


def test_muon_is_planned_at_the_stage_that_it_has(load):
    adamw, muon = (load("train.zero_stage=0", f"train.optimizer={name}") for name in ("adamw", "muon"))
    report = scale(muon, Cluster(devices=8))
    assert [way["zero_stage"] for way in report["stages"]] == [0]
    saved = 4 * muon_parameters(muon.model)
    assert checkpoint_bytes(adamw) - checkpoint_bytes(muon) == saved
    assert judge(adamw, Cluster(devices=8)).memory.states - judge(muon, Cluster(devices=8)).memory.states == saved


def test_checkpoints_have_the_size_that_is_planned(repository, tmp_path):
    """Weighed: the checkpoint of a tiny run at stage 1 on two ranks; 47 kB of it are names and pickles."""
    with tarfile.open(repository / "tests" / "data" / "run-160ea30.tar.xz") as archive:
        files = [one for one in archive if one.name.startswith("run/checkpoints/") and one.name.endswith(".pt")]
        record = json.load(archive.extractfile("run/checkpoints/step-000206/state.json"))
        weighed = sum(one.size for one in files)
    tree = {key: record["config"][key] for key in ("model", "train")}
    config = load_config(str(repository / "configs" / "quickstart.yaml"), [
        f"model={json.dumps(tree['model'])}", "train.zero_stage=1", "train.precision=fp32"])  # fmt: skip
    assert len(files) == 3 and checkpoint_bytes(config) == pytest.approx(weighed, abs=50_000)


def test_restarts_read_the_checkpoint_and_staging_shortens_the_stall(load):
    cluster = Cluster(devices=32, storage_gb_per_s=1)
    plain, staged = (
        judge(load("train.micro_batch=1", f"train.staging={where}"), cluster) for where in ("null", "/tmp/x")
    )
    assert plain.files.stall_s == pytest.approx(109_689_362 * 14 / 1e9)
    assert staged.files.stall_s < plain.files.stall_s and staged.files.commit_s == plain.files.stall_s
    assert staged.checkpoint_every < plain.checkpoint_every
    assert staged.failures.restart > plain.failures.restart > 600


def test_the_command(capsys, repository):
    words = ["plan", str(repository / "configs" / "pldr-110m.yaml"), "train.micro_batch=1", "--devices", "32"]
    assert main(words) == 0
    before = capsys.readouterr().out
    assert main([*words, "--gpus-per-node", "8", "--mtbf-hours", "50000", "--price-per-gpu-hour", "2"]) == 0
    out = capsys.readouterr().out
    assert (
        out.startswith(before.rstrip("\n"))
        and "32 devices on 4 nodes" in out
        and "cost" in out
        and "cost" not in before
    )
    assert main([*words, "--link-gbps", "400", "--json"]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["scale"]["as_configured"]["devices"] == 32 and len(result["scale"]["world_sizes"]) == 10
    assert main([*words, "--link-gbps", "0"]) == 2
    assert "--link-gbps 0 must be a positive number" in capsys.readouterr().err


def test_where_g_is_shared_the_micro_batch_stays_as_it_is(load):
    report = scale(load("train.share_g_below=1e-4", "train.micro_batch=2", "train.global_batch=32"), Cluster(devices=8))
    assert {row["micro_batch"] for row in report["world_sizes"] if not row.get("problem")} == {2}


def test_muon_is_planned_at_the_only_stage_that_it_has(load):
    report = scale(load("train.optimizer=muon", "train.zero_stage=0"), Cluster(devices=8))
    assert {row["zero_stage"] for row in report["world_sizes"] if "problem" not in row or not row["problem"]} == {0}
