"""The configuration is closed and checked before anything starts."""

import json

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
        ("train.steps=many", "train.steps: Input should be a valid integer"),
        ("train.zero_stage=4", "train.zero_stage: Input should be 0, 1, 2 or 3"),
        ("train.micro_batch=5", "global_batch 32 is not a multiple of micro_batch 5"),
        ("train.warmup_steps=250000", "warmup_steps 250000 must be smaller than steps"),
        ("train.freeze_g={at_step: 250000}", "freeze_g.at_step 250000 must be smaller than steps 250000"),
        ("train.keep_checkpoints=1", "train.keep_checkpoints"),
        ("model.head_dim=5", "head_dim: 5 is odd"),
        ("model.g_source=banana", "g_source"),
        ("data.executor=slurmish", "data.executor"),
        ("tracking.uri=./mlruns", "is no MLflow URI"),
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
def test_a_wrong_key_is_one_line_with_the_mend(tmp_path, override, expected):
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
    broken.write_text("- just\n- a list\n")
    with pytest.raises(ConfigError, match="must be a mapping"):
        load_config(broken)


def test_deepspeed_file_is_relative_to_the_yaml(tmp_path):
    config = load_config(write(tmp_path, TREE), ["train.deepspeed=ds/zero{stage}.json", "train.zero_stage=2"])
    assert config.train.deepspeed == str(tmp_path / "ds" / "zero2.json")


def test_flat_names_every_leaf():
    flat = RunConfig.model_validate(TREE).flat()
    assert flat["train.metric_weight_decay"] == "null" and flat["model.head_dim"] == "4"
    assert flat["name"] == "t" and json.loads(flat["data.sources"])[0]["url"] == "x.txt"


def test_tiers_out_of_order_are_refused():
    with pytest.raises(ConfigError, match="variant_above > approximate_above > invariant_above"):
        parse_config({**TREE, "post": {"approximate_above": 1e-7}}, where="x")
