"""The configuration is closed and checked before anything starts."""

import json
import subprocess
import sys

import pytest
import yaml

from pipeline.config.load import load_config, parse_config
from pipeline.config.run import RunConfig
from pipeline.errors import ConfigError

TREE = {
    "name": "t",
    "run_dir": "runs/t",
    "data": {"sources": [{"url": "x.txt"}]},
    "model": {"vocab_size": 300, "num_layers": 1, "num_heads": 1, "head_dim": 4, "context_length": 8},
}


def write(tmp_path, tree):
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


@pytest.mark.parametrize("name", ["quickstart", "pldr-110m"])
def test_the_shipped_configurations_load_and_survive_json(repository, name):
    config = load_config(repository / "configs" / f"{name}.yaml")
    again = parse_config(json.loads(json.dumps(config.as_dict())), where="again")
    assert again == config


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("train.stps=3", "unknown key train.stps; did you mean train.steps?"),
        ("trian.steps=3", "unknown key trian; did you mean train?"),
        ("model.num_head=3", "unknown key model.num_head; did you mean model.num_heads?"),
        ("data.val_fracton=0.1", "unknown key data.val_fracton; did you mean data.val_fraction?"),
        ("metric_weight_decay=4", "unknown key metric_weight_decay; did you mean train.metric_weight_decay?"),
        ("steps=5", "unknown key steps; did you mean train.steps?"),
        ("train.clip_by=valu", "did you mean value?"),
        ("train.steps=100", "lower train.warmup_steps (a tenth, say) or raise train.steps"),
        ("train.steps=many", "train.steps: Input should be a valid integer"),
        ("train.zero_stage=4", "train.zero_stage: Input should be 0, 1, 2 or 3"),
        ("train.micro_batch=5", "global_batch 32 is not a multiple of micro_batch 5"),
        ("train.warmup_steps=250000", "warmup_steps 250000 must be smaller than steps"),
        ("train.freeze_g={at_step: 250000}", "freeze_g.at_step 250000 must be smaller than steps 250000"),
        ("train.keep_checkpoints=1", "train.keep_checkpoints"),
        (
            "train.evaluate={every: 1000, tasks: [arc_eazy]}",
            "is not evaluated during training; did you mean arc_easy?",
        ),
        ("train.evaluate={every: 1000, tasks: [mine]}", "name some of arc_easy, "),
        ("train.evaluate={every: 1000, tasks: [piqa, piqa]}", "a task is named twice"),
        (
            "train.evaluate={every: 1500, tasks: [piqa]}",
            "evaluate.every 1500 is not a multiple of checkpoint_every 1000",
        ),
        ("train.evaluate={evry: 1000, tasks: [piqa]}", "did you mean train.evaluate.every?"),
        ("model.head_dim=5", "head_dim: 5 is odd"),
        ("model.g_source=banana", "g_source"),
        ("data.executor=slurmish", "data.executor"),
        ("tracking.uri=./mlruns", "is not an MLflow URI"),
        ("name=a/b", "name: String should match pattern"),
        ("train", "write key=value"),
        ("train.max_lr=.inf", "train.max_lr"),
        ("seed=99999999999999999999999", "seed"),
        ("run_dir=", "run_dir"),
        ("model.g_source=file", "model.g_file: missing"),
        ("model.pad_id=7", "remove these keys"),
        ("post.register_as=a/b", "post.register_as"),
        ("name.x=3", "name is a value, not a section"),
    ],
)
def test_a_wrong_key_is_one_line_with_the_fix(tmp_path, override, expected):
    with pytest.raises(ConfigError) as error:
        load_config(write(tmp_path, TREE), [override])
    message = str(error.value)
    assert expected in message and "\n" not in message
    assert error.value.exit_code == 2


@pytest.mark.parametrize(
    "uri", ["http://user:hidden@host:5000", "https://hidden@host", "postgresql://u:hidden@host/db"]
)
def test_a_password_in_the_mlflow_uri_is_refused_and_not_shown(tmp_path, uri):
    with pytest.raises(ConfigError, match="set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD") as error:
        load_config(write(tmp_path, TREE), [f"tracking.uri={uri}"])
    assert "hidden" not in str(error.value)


def test_document_masks_that_nothing_is_masked_with_are_refused():
    masks = {**TREE, "train": {"document_masks": True}}
    assert parse_config({**masks, "tokens": {"boundaries": True}}, where="test").train.document_masks
    for tokens, expected in (
        ({}, "train.document_masks: needs to know which document a token is of; set tokens.boundaries=true"),
        ({"boundaries": True, "packing": "pad"}, "with tokens.packing pad a sequence holds one document"),
    ):
        with pytest.raises(ConfigError, match=expected):
            parse_config({**masks, "tokens": tokens}, where="test")


def test_a_missing_key_and_a_wrong_source_key_are_named(tmp_path):
    with pytest.raises(ConfigError, match="key model is missing"):
        parse_config({k: v for k, v in TREE.items() if k != "model"}, where="t")
    with pytest.raises(ConfigError, match=r"unknown key data.sources.0.ulr; did you mean data.sources.0.url\?"):
        parse_config({**TREE, "data": {"sources": [{"url": "a", "ulr": "x"}]}}, where="t")


def test_overrides_are_yaml_and_reach_nested_keys(tmp_path):
    config = load_config(
        write(tmp_path, TREE),
        [
            "train.max_lr=1e-4",
            "train.betas=[0.8, 0.9]",
            "tokenizer.model=null",
            "train.compile=true",
            "run_dir=2026-run",
        ],
    )
    assert config.train.max_lr == 1e-4 and config.train.betas == (0.8, 0.9)
    assert config.tokenizer.model is None and config.train.compile is True and config.run_dir == "2026-run"


def test_files_that_are_no_configuration(tmp_path):
    with pytest.raises(ConfigError, match="no such file"):
        load_config(tmp_path / "absent.yaml")
    broken = tmp_path / "broken.yaml"
    broken.write_text("a: [1, 2\nb: }")
    with pytest.raises(ConfigError, match="not YAML"):
        load_config(broken)
    broken.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="cannot be read|not YAML"):
        load_config(broken)
    for text in ("[" * 50_000, "seed: " + "9" * 5000):
        broken.write_text(text)
        with pytest.raises(ConfigError, match="broken.yaml: not YAML"):
            load_config(broken)
    (tmp_path / "loop.yaml").symlink_to("loop.yaml")
    with pytest.raises(ConfigError, match="loop.yaml: cannot be read"):
        load_config(tmp_path / "loop.yaml")
    broken.write_text("- just\n- a list\n")
    with pytest.raises(ConfigError, match="must be a mapping"):
        load_config(broken)


def test_deepspeeds_keys_are_inline_or_a_shipped_file_or_a_path_from_the_working_directory(tmp_path, monkeypatch):
    (tmp_path / "elsewhere").mkdir()
    path = write(tmp_path / "elsewhere", TREE)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own2.json").write_text('{"wall_clock_breakdown": true}')

    def keys(*overrides):
        return load_config(path, ["train.zero_stage=2", *overrides]).train.deepspeed

    assert keys() is None
    assert keys("train.deepspeed={wall_clock_breakdown: true}") == {"wall_clock_breakdown": True}
    assert keys("train.deepspeed=own{stage}.json") == {"wall_clock_breakdown": True}
    assert keys("train.deepspeed=zero{stage}")["zero_optimization"]["stage"] == 2
    for text, message in (("[1]", "must be a JSON object"), ("{", "not valid JSON")):
        (tmp_path / "own2.json").write_text(text)
        with pytest.raises(ConfigError, match=f"train.deepspeed: own2.json: {message}"):
            keys("train.deepspeed=own2.json")
    with pytest.raises(
        ConfigError, match=r"train.deepspeed: zero9: no such file; a path is relative to the working dir"
    ):
        keys("train.deepspeed=zero9")
    with pytest.raises(ConfigError, match=r"train.deepspeed: Input should be a valid dictionary \(got 5\)"):
        keys("train.deepspeed=5")


@pytest.mark.parametrize("given", ["x.txt", ["x.txt"], [{"url": "x.txt"}]])
def test_a_source_may_be_a_plain_path(given):
    (source,) = parse_config({**TREE, "data": {"sources": given}}, where="x").data.sources
    assert source == RunConfig.model_validate(TREE).data.sources[0]


@pytest.mark.parametrize(
    ("pattern", "problem"),
    [
        ("^(#", r"'\^\(#' is not a regular expression: missing \), .*; fix it"),
        ("^(# .*)?", ".* matches nothing at all"),
    ],
)
def test_what_cannot_split_a_text_is_refused(pattern, problem):
    tree = {**TREE, "data": {"sources": [{"url": "x.md", "split_at": pattern}]}}
    with pytest.raises(ConfigError, match=rf"data.sources.0.split_at: {problem}"):
        parse_config(tree, where="x")


def test_a_source_that_is_not_split_is_written_as_before_the_key_was_there():
    """Runs of earlier versions recorded it: another form could not be resumed without --force, and would be sharded again."""
    sources = [{"url": "x.txt"}, {"url": "y.md", "split_at": "^# "}]
    written = parse_config({**TREE, "data": {"sources": sources}}, where="x").as_dict()["data"]["sources"]
    assert sorted(written[0]) == ["license", "name", "text_key", "url", "weight"]
    assert written[1]["split_at"] == "^# " and "split_at" not in json.dumps(written[0])


def test_flat_names_every_leaf():
    flat = RunConfig.model_validate(TREE).flat()
    assert flat["train.metric_weight_decay"] == "null" and flat["model.head_dim"] == "4"
    assert flat["name"] == "t" and json.loads(flat["data.sources"])[0]["url"] == "x.txt"


def test_tiers_out_of_order_are_refused():
    with pytest.raises(ConfigError, match="variant_above > approximate_above > invariant_above"):
        parse_config({**TREE, "post": {"approximate_above": 1e-7}}, where="x")


@pytest.fixture
def files(tmp_path):
    def write_all(**trees):
        for name, tree in trees.items():
            path = tmp_path / f"{name}.yaml"
            path.write_text(tree if isinstance(tree, str) else yaml.safe_dump(tree))
        return tmp_path

    return write_all


def test_extends_merges_mappings_and_replaces_everything_else(files):
    parent = {
        **TREE,
        "data": {
            "sources": [{"url": "x.txt"}, {"url": "y.txt"}],
            "clean": {"language": True, "exact_duplicates": True},
        },
        "train": {"betas": [0.8, 0.9], "steps": 4000},
    }
    middle = {"extends": "parent.yaml", "train": {"steps": 5000, "clip": 2.0}, "data": {"clean": {"language": False}}}
    child = {"extends": "middle.yaml", "name": "c", "data": {"sources": [{"url": "z.txt"}]}, "train": {"clip": 3.0}}
    config = load_config(files(parent=parent, middle=middle, child=child) / "child.yaml", ["train.steps=6000"])
    assert [source.url for source in config.data.sources] == ["z.txt"]
    assert config.data.clean.language is None and config.data.clean.exact_duplicates
    assert (config.name, config.run_dir, config.train.betas) == ("c", "runs/t", (0.8, 0.9))
    assert (config.train.steps, config.train.clip) == (6000, 3.0)
    assert "extends" not in config.as_dict()


def test_extends_lets_a_child_take_a_section_away(files):
    parent = {**TREE, "train": {"freeze_g": {"at_step": 5}}}
    folder = files(parent=parent, child={"extends": "parent.yaml", "train": {"freeze_g": None}})
    assert load_config(folder / "parent.yaml").train.freeze_g is not None
    assert load_config(folder / "child.yaml").train.freeze_g is None


def test_extends_is_relative_to_the_file_that_has_it(files, tmp_path, monkeypatch):
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "parent.yaml").write_text(yaml.safe_dump(TREE))
    folder = files(child={"extends": "base/parent.yaml"}, grandchild={"extends": "child.yaml", "name": "g"})
    monkeypatch.chdir("/")
    assert load_config(folder / "grandchild.yaml").run_dir == TREE["run_dir"]


def test_extends_in_a_cycle_is_one_line_that_names_the_files(files):
    folder = files(
        a={"extends": "b.yaml"}, b={"extends": "c.yaml"}, c={"extends": "./b.yaml"}, me={"extends": "me.yaml"}
    )
    with pytest.raises(
        ConfigError, match=r"a.yaml: extends: a cycle \(\S+a.yaml -> \S+b.yaml -> \S+c.yaml -> \S+b.yaml\)"
    ):
        load_config(folder / "a.yaml")
    with pytest.raises(ConfigError, match=r"cycle \(\S+me.yaml -> \S+me.yaml\)"):
        load_config(folder / "me.yaml")


@pytest.mark.parametrize("value", [["a.yaml", "b.yaml"], 3, "", {"file": "a.yaml"}, False])
def test_extends_names_one_file(files, value):
    with pytest.raises(ConfigError, match=r"child.yaml: extends: .* must be the name of one YAML"):
        load_config(files(child={**TREE, "extends": value}) / "child.yaml")


def test_extends_on_the_command_line_is_refused(files):
    with pytest.raises(ConfigError, match="only a YAML can extend another"):
        load_config(files(child=TREE) / "child.yaml", ["extends=other.yaml"])


@pytest.mark.parametrize(
    ("parent", "child", "expected"),
    [
        (None, {}, r"child.yaml: extends: \S+parent.yaml: no such file"),
        ("a: [1, 2\nb: }", {}, r"parent.yaml: not YAML"),
        ("- a list", {}, r"parent.yaml: must be a mapping"),
        (
            {**TREE, "train": {"stps": 3}},
            {"train": {"steps": 5000}},
            r"parent.yaml: unknown key train.stps; did you mean",
        ),
        ({**TREE, "model": {**TREE["model"], "head_dim": 5}}, {}, r"parent.yaml: model: head_dim: 5 is odd"),
        (TREE, {"model": {"head_dim": 5}}, r"child.yaml: model: head_dim: 5 is odd"),  # the section is of both files
        (TREE, {"train": {"stps": 3}}, r"child.yaml: unknown key train.stps"),
        ({**TREE, "train": {"steps": "many"}}, {"train": {"steps": 5000, "clip": "x"}}, r"child.yaml: train.clip"),
        ({"name": "t"}, {}, r"child.yaml: key run_dir is missing"),
        ({**TREE, "tran": {}}, {}, r"parent.yaml: unknown key tran"),
        (
            {**TREE, "train": {"stps": 3, "eps": "x"}},
            {"seed": "y"},
            r"child.yaml: seed: .*; \S+parent.yaml: train.eps: [^;]*; unknown key train.stps",
        ),
    ],
)
def test_a_mistake_is_of_the_file_that_holds_it(files, parent, child, expected):
    folder = files(child={"extends": "parent.yaml", **child}, **({} if parent is None else {"parent": parent}))
    with pytest.raises(ConfigError, match=rf"^\S*{expected}") as error:
        load_config(folder / "child.yaml")
    assert "\n" not in str(error.value)


def test_a_mistake_on_the_command_line_is_not_its_parents(files):
    folder = files(parent={**TREE, "train": {"steps": 5000}}, child={"extends": "parent.yaml"})
    for override in ("train.steps=many", "train.micro_batch=5"):
        with pytest.raises(ConfigError, match=r"^(command line|\S*child.yaml): train"):
            load_config(folder / "child.yaml", [override])


def test_tasks_are_known_without_lm_eval():
    """The names of `train.evaluate` are those that `pldr evaluate` has files for; checking them imports nothing of it."""
    from pipeline.config.train_evaluate import TASKS
    from pipeline.inference.evaluate.tasks import STOCK

    assert list(STOCK) == list(TASKS)
    script = (
        "import sys; from pipeline.config.train import TrainConfig;"
        "TrainConfig(evaluate={'every': 1000, 'tasks': ['piqa']}); print('lm_eval' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stdout == "False\n", done.stderr
