"""A sweep's children, before and beside their training: what they are called, what they share, what the table says."""

import json
import os
import random
from pathlib import Path

import pytest
import yaml

from pipeline.config.paths import RunPaths
from pipeline.config.schedule import invariance_budget
from pipeline.errors import ConfigError, Stopped, UserError
from pipeline.io.storage import publish_json
from pipeline.stages.runner import Pipeline
from pipeline.sweep.sweep import Sweep, data_of

REPOSITORY = Path(__file__).resolve().parents[3]


def in_letters(number):
    return "".join("abcdefghij"[int(digit)] for digit in str(number))


@pytest.fixture
def make_sweep(tmp_path):
    """A sweep's YAML beside its base configuration."""
    words = [[random.Random(f"{i} {j}").choice(range(10**6)) for j in range(200)] for i in range(40)]
    lines = [json.dumps({"text": f"{i} " + " ".join(map(in_letters, found))}) for i, found in enumerate(words)]
    (tmp_path / "corpus.jsonl").write_text("\n".join(lines) + "\n")
    base = {
        "name": "base",
        "run_dir": "unused",
        "data": {"sources": [{"url": str(tmp_path / "corpus.jsonl")}], "val_fraction": 0.2, "test_fraction": 0.1},
        "model": {"vocab_size": 320, "num_layers": 1, "num_heads": 1, "head_dim": 4, "context_length": 16},
        "train": {"steps": 4, "warmup_steps": 1, "global_batch": 4, "micro_batch": 2, "ranks": 1, "precision": "fp32"},
        "post": {"register_as": None},
    }
    (tmp_path / "base.yaml").write_text(yaml.safe_dump(base))

    def make(*overrides, **changes):
        tree = {
            "name": "s",
            "config": "base.yaml",
            "run_dir": str(tmp_path / "sweep"),
            "grid": {"train.metric_weight_decay": [0.5, 2], "seed": [1, 2]},
            **changes,
        }
        (tmp_path / "sweep.yaml").write_text(yaml.safe_dump(tree, sort_keys=False))
        return Sweep(tmp_path / "sweep.yaml", list(overrides))

    return make


def test_every_combination_is_a_child_with_a_place_of_its_own(make_sweep, tmp_path):
    sweep = make_sweep("train.steps=9", set={"train.warmup_steps": 3, "model.rope_style": "half"})
    assert [c.name for c in sweep.children] == [
        "metric_weight_decay-0.5.seed-1",
        "metric_weight_decay-0.5.seed-2",
        "metric_weight_decay-2.seed-1",
        "metric_weight_decay-2.seed-2",
    ]
    for child in sweep.children:
        train = child.config.train
        assert (train.steps, train.warmup_steps, child.config.model.rope_style) == (9, 3, "half")
        assert child.config.run_dir == str(tmp_path / "sweep" / "children" / child.name)
        assert child.config.tracking.uri == f"sqlite:///{tmp_path}/mlflow.db"
    assert [(c.config.train.metric_decay, c.config.seed) for c in sweep.children] == [
        (0.5, 1),
        (0.5, 2),
        (2, 1),
        (2, 2),
    ]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"grid": {}}, "nothing is varied; give grid, variants or both"),
        ({"grid": {"seed": []}}, "variants and grid make 0 children"),
        ({"grid": {"seed": [1, 1]}}, "'seed-1'; remove the value that stands twice"),
        ({"grid": {"train.metric_weight_decai": [1]}}, "did you mean train.metric_weight_decay"),
        ({"grid": {"train.steps": [5, -1]}}, "train.steps"),
        ({"grid": {"run_dir": ["a"]}}, "run_dir is set by the sweep"),
        ({"set": {"tracking.uri": "sqlite:///x"}}, "tracking.uri is set by the sweep"),
        ({"until": "tokenize"}, "until: "),
        ({"plots": {}}, "known keys: name, config"),
        ({"plot": {"y": "losss"}}, "'losss' is not a column; there are: "),
        ({"config": "absent.yaml"}, "absent.yaml: no such file"),
        ({"grid": {"seed": list(range(1001))}}, "1001 children"),
        (
            {"variants": {"a": {"seed": 3}}, "grid": {"seed": [1, 2]}},
            "seed is varied by the grid; remove it from `variants`",
        ),
        ({"variants": {"a": {"run_dir": "x"}}}, "run_dir is set by the sweep"),
        ({"variants": {"a": {}}, "compare": {"baseline": "b"}}, "compare.baseline: 'b' is not there; there are: a"),
        ({"compare": {"baseline": "b"}}, "compare.baseline: 'b' is not there; there are: none"),
        (
            {"variants": {"a": {}}, "compare": {"baseline": "a"}},
            "grid: train.metric_weight_decay is neither compare.tune nor compare.pairs; set it in `variants`",
        ),
        (
            {"variants": {"a": {}}, "compare": {"baseline": "a", "value": "verdict"}},
            "compare.value: 'verdict' is not there; there are: step, tokens",
        ),
        (
            {"variants": {"a": {}}, "until": "train", "compare": {"baseline": "a", "value": "held_out_cached"}},
            "compare.value: 'held_out_cached' is not there; there are: step, tokens",
        ),
        ({"set": {"seed": 7}}, "seed is varied by the grid; remove it from `set` or the command line"),
        ({"grid": {"train.freeze_g": [None]}, "set": {"train.freeze_g.at_step": 2}}, "train.freeze_g is varied by"),
    ],
)
def test_a_mistake_is_one_line_before_anything_starts(make_sweep, tmp_path, changes, message):
    with pytest.raises(ConfigError) as caught:
        make_sweep(**changes)
    assert message in str(caught.value) and "\n" not in str(caught.value)
    assert not (tmp_path / "sweep").exists()


def test_the_configuration_that_is_varied_may_extend_another(make_sweep, tmp_path):
    (tmp_path / "child.yaml").write_text("extends: base.yaml\ntrain: {steps: 7}\n")
    for child in make_sweep(config="child.yaml", grid={"seed": [1, 2]}).children:
        assert (child.config.train.steps, child.config.train.warmup_steps) == (7, 1)


@pytest.mark.parametrize(
    ("key", "value", "same"),
    [
        ("tokens.remainder", "pad", False),
        ("model.vocab_size", 330, False),
        ("data.workers", 5, True),
        ("seed", 9, True),
    ],
)
def test_children_have_the_same_data_unless_a_setting_decides_the_tokens(make_sweep, key, value, same):
    one, other = make_sweep(
        grid={key: [{"tokens.remainder": "drop", "model.vocab_size": 320}.get(key, 1), value]}
    ).children
    assert (data_of(one.config) == data_of(other.config)) is same


@pytest.mark.slow
def test_children_share_the_first_ones_data_and_mlflow_knows_their_parent(make_sweep, tmp_path):
    """Nothing trains here: the launcher refuses each child, which is what a crash looks like."""
    from mlflow import MlflowClient

    sweep, launched = make_sweep(grid={"seed": [1, 2], "tokens.remainder": ["drop", "pad"]}), []

    def crash(config, job_file, ranks):
        launched.append(config.name)
        raise UserError("no ranks here")

    with pytest.raises(
        UserError, match=r"4 of 4 children failed, seed-1\.remainder-drop with: no ranks here; fix that"
    ):
        sweep.run(launch=crash, report=lambda text: None)
    assert launched == [f"s.{child.name}" for child in sweep.children]
    roots = {c.name: RunPaths(c.config.run_dir) for c in sweep.children}
    first, same, other = (
        roots[name] for name in ("seed-1.remainder-drop", "seed-2.remainder-drop", "seed-1.remainder-pad")
    )
    tar = next(first.tokens.glob("train-*.tar"))
    assert os.path.samefile(tar, same.tokens / tar.name)  # linked, and believed by the stages
    assert not os.path.samefile(tar, other.tokens / tar.name)
    fingerprints = {n: json.loads((p.tokens / "index.json").read_bytes())["fingerprint"] for n, p in roots.items()}
    assert fingerprints["seed-1.remainder-drop"] == fingerprints["seed-2.remainder-drop"]
    assert fingerprints["seed-1.remainder-drop"] != fingerprints["seed-1.remainder-pad"]

    client = MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    runs = {run.info.run_name: run for run in client.search_runs([client.get_experiment_by_name("pldr").experiment_id])}
    parent = runs.pop("s")
    assert parent.info.status == "FAILED" and parent.data.params["sweep.until"] == "validate"
    assert set(runs) == set(launched)
    assert {run.data.tags["mlflow.parentRunId"] for run in runs.values()} == {parent.info.run_id}
    assert {Path(a.path).name for a in client.list_artifacts(parent.info.run_id, "sweep")} == {
        "sweep.json",
        "sweep.html",
    }
    assert parent.info.artifact_uri.startswith(f"file://{tmp_path}/mlartifacts")
    table = json.loads((tmp_path / "sweep" / "report" / "sweep.json").read_bytes())
    assert [row["status"] for row in table["rows"]] == ["failed"] * 4
    assert table["rows"][0]["data_fingerprint"] == fingerprints["seed-1.remainder-drop"]

    with pytest.raises(UserError, match="4 of 4 children failed"):  # again: the same parent, the same children
        make_sweep(grid={"seed": [1, 2], "tokens.remainder": ["drop", "pad"]}).run(
            launch=crash, report=lambda text: None
        )
    again = client.search_runs([parent.info.experiment_id])
    assert {run.info.run_id for run in again} == {parent.info.run_id, *(run.info.run_id for run in runs.values())}


@pytest.fixture
def stages(monkeypatch):
    """What each child does instead of its stages: an error to raise, by the child's name. Nor is there an MLflow."""
    fates = {}

    def stage(self, name, **options):
        if (name, self.config.name) in fates:
            raise fates[name, self.config.name]
        if name in ("shard", "tokenizer", "tokenize"):
            publish_json(self.paths.stages / f"{name}.json", {"result": {"fingerprint": "f"}})

    monkeypatch.setattr(Pipeline, "stage", stage)
    monkeypatch.setattr(Sweep, "open_parent", lambda self: "parent")
    monkeypatch.setattr(Sweep, "log", lambda self, parent, files, status=None: None)
    return fates


def rows_of(tmp_path):
    return json.loads((tmp_path / "sweep" / "report" / "sweep.json").read_bytes())["rows"]


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), ValueError("no"), MemoryError()])
def test_whatever_ends_a_child_the_others_run(make_sweep, tmp_path, stages, caplog, error):
    stages["train", "s.seed-1"] = error
    with pytest.raises(UserError, match="1 of 2 children failed, seed-1 with: ") as caught:
        make_sweep(grid={"seed": [1, 2]}, until="train").run(launch=None, report=lambda text: None)
    assert "\n" not in str(caught.value) and "Traceback" in caplog.text
    rows = rows_of(tmp_path)
    assert [row["status"] for row in rows] == ["failed", "finished"]
    assert not isinstance(error, OSError) or "the disk is full; free some space" in rows[0]["error"]


@pytest.mark.parametrize("stop", [Stopped("stopped", details={}), KeyboardInterrupt()])
def test_a_stop_is_no_failure_of_a_child(make_sweep, tmp_path, stages, stop):
    stages["train", "s.seed-1"] = stop
    with pytest.raises(type(stop)):
        make_sweep(grid={"seed": [1, 2]}, until="train").run(launch=None, report=lambda text: None)
    assert not (tmp_path / "sweep" / "children" / "seed-2").exists()


def test_a_table_that_cannot_be_written_is_reported_at_the_end(make_sweep, tmp_path, stages, monkeypatch):
    def full(*arguments, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pipeline.sweep.sweep.write_sweep_report", full)
    with pytest.raises(UserError, match="the table could not be written; make room"):
        make_sweep(grid={"seed": [1, 2]}, until="train").run(launch=None, report=lambda text: None)
    assert (tmp_path / "sweep" / "children" / "seed-2").exists()


def test_a_failed_child_does_not_show_the_certificate_of_an_earlier_training(make_sweep, tmp_path, stages):
    def leave(config):
        """What a complete validation leaves."""
        paths = RunPaths(config.run_dir)
        measures = {"relative_deviation_g": 1e-7, "losses": {"block": 1.0, "cached": 1.0}}
        certificate = {"verdict": "certified", "tier": "invariant", "measures": measures}
        publish_json(paths.certificate / "certificate.json", certificate)
        publish_json(paths.stages / "validate.json", {})
        for root in (paths.root, paths.root.parents[1]):  # the child's and the sweep's
            (root / ".lock").touch()

    sweep = make_sweep(grid={"seed": [1, 2, 3]})
    for child in sweep.children:
        leave(child.config)
    stages["train", "s.seed-1"] = UserError("no ranks here")
    stages["validate", "s.seed-2"] = UserError("the certificate did not pass", exit_code=3)
    with pytest.raises(UserError, match="1 of 3 children failed"):
        sweep.run(launch=None, report=lambda text: None)
    rows = rows_of(tmp_path)
    assert [row["status"] for row in rows] == ["failed", "finished", "finished"]
    assert [row["relative_deviation_g"] for row in rows] == [None, 1e-7, 1e-7]
    assert [row["data_fingerprint"] for row in rows] == ["f"] * 3


@pytest.mark.slow
def test_a_stop_ends_the_sweep_at_once_and_leaves_the_parent_killed(make_sweep, tmp_path):
    from mlflow import MlflowClient

    launched = []

    def stop(config, job_file, ranks):
        launched.append(config.name)
        raise Stopped("stopped by SIGTERM", details={})

    with pytest.raises(Stopped):
        make_sweep().run(launch=stop, report=lambda text: None)
    assert len(launched) == 1
    client = MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    runs = client.search_runs([client.get_experiment_by_name("pldr").experiment_id])
    assert {run.info.run_name: run.info.status for run in runs}["s"] == "KILLED"


def test_a_key_of_the_grid_on_the_command_line_is_refused(make_sweep):
    with pytest.raises(ConfigError, match="seed is varied by the grid"):
        make_sweep("seed=7")


def test_the_table_has_the_values_that_were_trained_with(make_sweep):
    """YAML 1.1 reads 1e-3 as text, which has no place in a plot."""
    sweep = make_sweep(grid={"train.max_lr": ["1e-3", 0.002], "train.metric_weight_decay": [None]}, set={})
    assert [child.values for child in sweep.children] == [
        {"train.max_lr": 0.001, "train.metric_weight_decay": None},
        {"train.max_lr": 0.002, "train.metric_weight_decay": None},
    ]
    assert sweep.children[0].name == "max_lr-1e-3.metric_weight_decay-None"


def test_every_shipped_sweep_can_start():
    files = [file for folder in ("sweeps", "experiments") for file in (REPOSITORY / "configs" / folder).glob("*.yaml")]
    sweeps = [Sweep(file, []) for file in files if file.name != "base.yaml"]
    assert len(sweeps) >= 10
    for sweep in sweeps:
        assert sweep.settings.about and len({child.config.run_dir for child in sweep.children}) == len(sweep.children)


def test_the_shipped_sweep_spans_variant_to_invariant_budgets(tmp_path):
    sweep = Sweep(REPOSITORY / "configs" / "sweeps" / "invariance_budget.yaml", [])
    budgets = sorted({round(invariance_budget(c.config.train), 2) for c in sweep.children})
    assert budgets[0] < 0.1 and 2.5 < budgets[1] < 4.5 and 6 < budgets[2] < 9 and budgets[3] > 9


@pytest.mark.slow
def test_links_are_copies_where_the_disk_has_none(make_sweep, monkeypatch):
    """Another disk: os.link fails, the data are copied, and the stages believe the copy."""

    def refuse(source, target):
        raise OSError("no links here")

    sweep = make_sweep(grid={"seed": [1, 2]})
    monkeypatch.setattr(os, "link", refuse)
    first, second = (c.config for c in sweep.children)
    pipeline = Pipeline(first, launch=lambda *_: None, report=lambda text: None)
    for name in ("shard", "tokenizer", "tokenize"):
        pipeline.stage(name)
    RunPaths(second.run_dir).root.mkdir(parents=True)
    sweep._share_data(second)
    assert Pipeline(second, launch=lambda *_: None, report=lambda text: None).stage("tokenize")["skipped"] is True


def test_in_sequence_the_other_seeds_run_where_the_first_was_best(make_sweep, tmp_path, stages, monkeypatch):
    """The stages are stand-ins; the losses are by hand. What is to come is counted as far as it is known."""
    losses, headlines = {0.001: 4.2, 0.01: 4.1}, []
    monkeypatch.setattr(
        "pipeline.sweep.sweep.measured",
        lambda config, done: {"run_id": config.name, "val_loss_cached": losses[config.train.max_lr], "curves": {}},
    )
    sweep = make_sweep(
        variants={"sdpa": {"model.g_source": "identity"}, "paper": {}},
        grid={"train.max_lr": [0.001, 0.01], "seed": [1, 2]},
        compare={"baseline": "sdpa", "tune": "train.max_lr"},
        about="Which?",
        until="train",
    )
    stages["train", "s.paper.max_lr-0.01.seed-1"] = UserError("the loss is not finite")
    write = sweep.write_report

    def noted(parent, rows):
        made = write(parent, rows)
        headlines.append(json.loads((tmp_path / "sweep/report/sweep.json").read_bytes())["children"])
        return made

    monkeypatch.setattr(sweep, "write_report", noted)
    with pytest.raises(
        UserError, match=r"1 of 6 children failed, paper\.max_lr-0\.01\.seed-1 with: the loss is not finite"
    ):
        sweep.run(launch=None, report=lambda text: None)
    assert [row["child"] for row in rows_of(tmp_path)][4:] == ["sdpa.max_lr-0.01.seed-2", "paper.max_lr-0.001.seed-2"]
    assert headlines == [6] * 6
    tree = json.loads((tmp_path / "sweep/report/sweep.json").read_bytes())
    assert [(line["variant"], line["best"], line["at_edge"]) for line in tree["compared"]] == [
        ("sdpa", 0.01, True), ("paper", 0.001, True),
    ]  # fmt: skip
    assert tree["about"] == "Which?" and tree["compare"]["pairs"] == "seed"
