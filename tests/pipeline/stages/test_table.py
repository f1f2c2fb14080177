"""The table of stages: an earlier version's records are still recognized, and every row is complete."""

import json
import subprocess
import sys

import pytest
import yaml

from pipeline.config.load import load_config
from pipeline.errors import UserError
from pipeline.io import storage
from pipeline.stages.runner import Pipeline
from pipeline.stages.table import NAMES, STAGES, stage_named

# Digests of the stages' inputs as commit 160ea30 computed them for the run directory below.
GOLDEN = {
    "shard": "ac9791e6f29b517fa8fec41cacf32facd299e32ebd049cf037f1c7be4478137f",
    "tokenizer": "f1eefe2a996cea58cc4c4f70240fff55476dfd3f0f5b7f11745d4abce442c006",
    "tokenize": "e7f9e8258d8d5c9d4d4516c49719e0a8e364c7f77263fd14cb3a455ddf5aac47",
    "train": "6d7e58e0d153affcd8c72b3eaa34c72c3689fb73e3bca35022390fe628b3fe99",
    "consolidate": "1d5cc265b1baeeb2123dbfd22f0f7e66cf9ff324dd5c0ab460ad042a326ac369",
    "extract": "15483d179ed007077d88c05cd7a1bcf1f19c9960cb198deafbcaa32b4658a207",
    "validate": "8be1c3278f9a934a79ba2a18ec359eb6e4f0e05c8d71ceb012550313eb5dd4d9",
    "bundle": "0095a0fc84add5053013fb86d7802e5d706147f498e35f18a5c79e1594479d62",
}
OVERRIDES = (
    "tokenizer.model=given.model",
    "train.deepspeed=ds.json",
    "post.weight_format=bf16",
    # Keys that change no output:
    "tokens.workers=1",
    "post.sample_prompt=b",
    "post.ranks=2",
)
GOLDEN_OVERRIDDEN = {
    **GOLDEN,
    "tokenizer": "3ff064c42d0c04b28a2f623b3475c716f7c9e13d6edd048c8e945441e47b2de6",
    "train": "553f577b2b4eb6f597b34057c30d501c6d88ae3b9e8778f3e77791f232de34bf",
    "bundle": "7cb4bca2613e49564e6c8c97e84ad50fe72608040300620f2ba2df553bf47e1f",
}
RESULTS = {
    "shard": {"fingerprint": "f1"},
    "tokenizer": {"sha256": "t1"},
    "tokenize": {"fingerprint": "f2"},
    "train": {"checkpoint": "step-000500", "run_id": "r1", "steps": 500},
    "consolidate": {"weights_sha256": "w1"},
    "extract": {"g_lm_sha256": "g1"},
    "validate": {"certificate_sha256": "c1", "verdict": "certified"},
    "bundle": {},
}


@pytest.fixture
def pipeline(tmp_path, monkeypatch):
    """`pipeline(*overrides)` on a run directory with a record of every stage."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "corpus.jsonl").write_text('{"text": "a golden corpus"}\n')
    (tmp_path / "given.model").write_bytes(b"a tokenizer")
    (tmp_path / "ds.json").write_text('{"zero_optimization": {"overlap_comm": true}}')
    tree = {
        "name": "golden",
        "run_dir": "run",
        "data": {"sources": [{"url": "corpus.jsonl"}], "val_fraction": 0.2, "test_fraction": 0.1},
        "model": {
            "vocab_size": 420,
            "context_length": 48,
            "num_layers": 2,
            "num_heads": 2,
            "head_dim": 16,
            "A_dff": 16,
        },
        "train": {"steps": 500, "warmup_steps": 40, "global_batch": 8, "micro_batch": 4, "ranks": 2},
    }
    (tmp_path / "golden.yaml").write_text(yaml.safe_dump(tree))
    for name, result in RESULTS.items():
        record = {"schema_version": 2, "stage": name, "inputs": "", "outputs": {}, "result": result}
        storage.publish_json(tmp_path / "run" / "stages" / f"{name}.json", record)

    def make(*overrides):
        return Pipeline(load_config("golden.yaml", list(overrides)), launch=lambda *_: None, report=lambda _: None)

    return make


@pytest.mark.parametrize(("overrides", "golden"), [((), GOLDEN), (OVERRIDES, GOLDEN_OVERRIDDEN)])
def test_the_digests_of_the_inputs_are_those_of_earlier_records(pipeline, overrides, golden):
    one = pipeline(*overrides)
    inputs = {name: one.inputs(name) for name in NAMES}
    inputs["shard"]["sources"][0].update(url="file", identity="id")  # of the file on this disk: its folder, its inode
    assert {name: storage.sha256_json(value) for name, value in inputs.items()} == golden


def test_names_are_unique_and_every_stage_has_a_help():
    assert len(set(NAMES)) == len(STAGES) and all(stage.help for stage in STAGES)
    assert all(NAMES.index(earlier) < NAMES.index(stage.name) for stage in STAGES for earlier in stage.untouched)


@pytest.mark.parametrize("key", ["fix", "mend"])
def test_a_failed_certificate_ends_the_run_with_the_fixes_also_of_an_older_record(pipeline, key):
    result = {"verdict": "failed", "failed": [{"measure": "kl", key: "train longer"}]}
    if key == "fix":
        result["failed"][0] |= {"value": 0.00123456, "threshold": 1e-4}
    with pytest.raises(UserError) as caught:
        stage_named("validate").check(pipeline().paths, result)
    what, why, page = str(caught.value).splitlines()
    assert what == "the certificate did not pass: kl" + (" is 0.00123, its threshold 0.0001" if key == "fix" else "")
    assert why == "why   train longer" and "certificate/certificate.html (`pldr bundle CONFIG --uncertified`" in page
    assert caught.value.exit_code == 3 and caught.value.details == {"failed": result["failed"]}


def test_the_fixes_of_what_follows_from_another_failure_are_left_out(pipeline):
    fixes = {"relative_deviation_g": "train longer", "kl": "outputs change; fix relative_deviation_g first"}
    failed = [{"measure": name, "value": 1.0, "threshold": 1e-4, "fix": fix} for name, fix in fixes.items()]
    with pytest.raises(UserError) as caught:
        stage_named("validate").check(pipeline().paths, {"verdict": "failed", "failed": failed})
    assert str(caught.value).splitlines()[1] == "why   train longer"


def test_a_value_that_rounds_to_its_threshold_has_the_digits_that_tell_them_apart(pipeline):
    failed = [{"measure": "top1_agreement", "fix": "f", "value": 0.99890625, "threshold": 0.999}]
    with pytest.raises(UserError, match=r"top1_agreement is 0\.9989, its threshold 0\.999\n"):
        stage_named("validate").check(pipeline().paths, {"verdict": "failed", "failed": failed})


def test_the_table_imports_no_floor():
    """`pldr --help` reads the table: mlflow and datatrove are imported by the stage that needs them."""
    code = "import json, sys, pipeline.stages.table; print(json.dumps(sorted(sys.modules)))"
    modules = set(json.loads(subprocess.check_output([sys.executable, "-c", code], text=True)))
    floors = {name for name in modules if name.startswith(("pipeline.data.", "pipeline.post.", "pipeline.train."))}
    assert not floors and not modules & {"mlflow", "datatrove", "deepspeed", "webdataset"}
