"""What a key means stands beside it: every key has it, and it is what the lists of 160ea30 said."""

import json
from dataclasses import dataclass, replace

import pytest
from pydantic import Field, create_model

from pipeline.bundle.certificate.earlier import EARLIER
from pipeline.bundle.certificate.verdict import TODAY
from pipeline.config import keys
from pipeline.config.load import load_config, parse_config
from pipeline.config.run import RunConfig
from pipeline.config.section import Kind, Section
from pipeline.io import storage

# The lists of 160ea30, the last commit that had them. What they say is what runs on disk were made by.
MAY_CHANGE = ("name", "run_dir", "tracking.", "post.", "data.workers", "tokens.workers", "train.ranks", "train.log_every",
              "train.validate_every", "train.checkpoint_every", "train.keep_", "train.publish_", "train.staging",
              "train.timeout_s", "train.max_restarts", "train.max_skipped_steps", "train.on_spike", "train.spike_",
              "train.deepspeed", "train.compile", "train.activation_", "train.offload", "train.peak_tflops",
              "train.val_sequences", "train.zero_stage",
              "train.deterministic", "train.flight_recorder",
              "train.micro_batch", "train.evaluate", "train.precision", "train.profile_steps", "train.memory_history",
              "data.on_bad_shard", "data.cache_gigabytes", "data.executor", "data.slurm.", "data.ray_address",
              "data.of")  # fmt: skip
FORCIBLE = ("data.", "tokens.", "tokenizer.", "model.")
RECORDED = ("seed", "data.", "tokens.", "tokenizer.", "model.", "train.")
OF_BUNDLE = ("weight_format", "max_format_loss", "register_as")
OPTIMIZER = ("optimizer", "muon_lr", "muon_momentum")
ADDED = (
    "init_from",
    "schedule",
    "decay_share",
    "decay_shape",
    *OPTIMIZER,
    "batch_warmup",
    "deterministic",
    "flight_recorder",
    "document_masks",
    "g_from",
    "share_g_below",
    "metric_decay_on",
    "z_loss",
)  # since; in a digest only with another value than the default
ADDED_TO_POST = ("effect_prompts", "order_parameter", "prove", "extra_prompts", "max_relative_deviation_g_fp32",
                 "max_query_deviation", "max_worst_row_deviation", "with_metric_learner", "key_rank",
                 "max_key_loss")  # fmt: skip
ADDED_TO_MODEL = ("rope_scaling", "g_constraint", "g_rank")
ADDED_TO_DATA = ("separate_sources", "phases")
NOT_IN_RESULT = (*ADDED_TO_DATA, "workers", "of", "executor", "slurm", "ray_address", "on_bad_shard", "cache_gigabytes")
RECIPE = (
    *(
        "init_from",
        "steps",
        "global_batch",
        "batch_warmup",
        "max_lr",
        "warmup_steps",
        *ADDED[1:4],
        "min_lr_ratio",
        *OPTIMIZER,
        "betas",
        "eps",
        "weight_decay",
    ),
    *("metric_weight_decay", "metric_decay_on", "clip_by", "clip", "z_loss", "precision", "freeze_g", "document_masks"),
    *("g_from", "share_g_below"),
)

TREE = {
    "name": "t",
    "run_dir": "runs/t",
    "data": {"sources": [{"url": "x.txt"}]},
    "model": {"vocab_size": 300, "num_layers": 1, "num_heads": 1, "head_dim": 4, "context_length": 8},
}
EVERYTHING = {  # every optional section
    **TREE,
    "seed": 7,
    "data": {
        "sources": [{"url": "x.txt", "weight": 2.0}, {"url": "s3://b/y.jsonl"}],
        "clean": {
            "language": True,
            "quality": True,
            "decontaminate": {"files": ["e.txt"]},
            "near_duplicates": True,
            "paragraph_duplicates": True,
            "split_long": {"max_characters": 1000},
        },
        "slurm": {"sbatch_args": {"account": "a", "export.x": "y"}},
        "executor": "slurm",
        "output": "s3://bucket/documents",
        "tasks": 3,
    },
    "tokenizer": {"model": "given.model"},
    "tokens": {"packing": "pad", "workers": 9, "output": "elsewhere"},
    "train": {"freeze_g": {"below": 1e-5}, "profile_steps": [1, 2], "publish_to": "s3://b/c", "ranks": 2},
    "post": {"twin": "runs/other", "weight_format": "int8", "ranks": 2, "sample_prompt": "Once", "prompts": 200},
    "tracking": {"uri": "http://host:5000", "experiment": "e", "parent_run": "p"},
}


def configurations(repository):
    files = [repository / "configs" / f"{name}.yaml" for name in ("quickstart", "pldr-110m", "ablations/sdpa")]
    return [parse_config(tree, where="test") for tree in (TREE, EVERYTHING)] + [load_config(file) for file in files]


def of_stage_160ea30(config, name):
    """As `Line._inputs` of 160ea30 and, for shard, `stage_inputs` built it."""
    tree = config.as_dict()
    model = {key: value for key, value in tree["model"].items() if key not in ADDED_TO_MODEL}
    return {
        "shard": {key: value for key, value in tree["data"].items() if key not in NOT_IN_RESULT},
        "tokenizer": {**tree["tokenizer"], "vocab_size": tree["model"]["vocab_size"]},
        "tokenize": {
            **{k: v for k, v in tree["tokens"].items() if k not in ("workers", "sources")},
            "context_length": tree["model"]["context_length"],
        },
        "train": {
            **{"model": model, "seed": tree["seed"]},
            "train": {k: v for k, v in tree["train"].items() if k not in (*ADDED, "evaluate")},
        },
        "consolidate": {},
        "extract": {k: tree["post"][k] for k in ("g_from", "prompts")},
        "validate": {
            k: v for k, v in tree["post"].items() if k not in (*OF_BUNDLE, *ADDED_TO_POST, "sample_prompt", "ranks")
        }
        | {"model": model},
        "bundle": {k: tree["post"][k] for k in OF_BUNDLE} | {"tracking": tree["tracking"]},
    }[name]


@pytest.mark.parametrize(
    "stage", ["shard", "tokenizer", "tokenize", "train", "consolidate", "extract", "validate", "bundle"]
)
def test_what_decides_a_stages_output_is_what_it_was(repository, stage):
    """Equal values are equal digests: a stage that 160ea30 finished is skipped."""
    for config in configurations(repository):
        post = config.post.model_copy(update={"order_parameter": False})  # 110M sets the key, which is newer
        config = config.model_copy(update={"post": post})
        ours, theirs = keys.of_stage(config, stage), of_stage_160ea30(config, stage)
        assert ours == theirs
        assert storage.sha256_json(ours) == storage.sha256_json(theirs)


def test_scaled_positions_are_another_model(repository):
    [config, *_] = configurations(repository)
    scaled = config.model_copy(update={"model": replace(config.model, rope_scaling={"type": "linear", "factor": 2})})
    for stage in ("shard", "tokenizer", "tokenize", "train", "consolidate", "extract", "validate", "bundle"):
        same = keys.of_stage(config, stage) == keys.of_stage(scaled, stage)
        assert same is (stage not in ("train", "validate")), stage
    assert keys.added_defaults()["model.rope_scaling"] is None
    assert keys.added_defaults()["model.g_constraint"] == "none"


def test_every_flat_key_resumes_as_it_did(repository):
    seen = set()
    for config in configurations(repository):
        for key in config.flat():
            rule = (
                "may change" if key.startswith(MAY_CHANGE) else "needs force" if key.startswith(FORCIBLE) else "fixed"
            )
            assert keys.on_resume(key) == rule, key
            assert keys.is_of_training(key) is key.startswith(RECORDED), key
            seen.add(key)
    assert {"data.slurm.sbatch_args.account", "train.freeze_g.below", "train.freeze_g", "data.clean.language"} < seen


def test_the_micro_batch_stays_where_it_decides_whose_g_a_sequence_uses():
    rules = {}
    for train in ({}, {"g_from": "neighbor"}, {"g_from": "batch"}, {"share_g_below": 1e-4}):
        config = parse_config({**TREE, "train": train}, where="test")
        rules[str(train)] = keys.on_resume_in(config, "train.micro_batch")
        assert keys.on_resume_in(config, "train.g_from") == "fixed"
    assert list(rules.values()) == ["may change", *["needs force"] * 3]


def test_a_key_that_a_configuration_no_longer_has_is_like_its_section():
    assert keys.is_of_training("train.gone") and keys.is_of_training("data.gone.deep")
    assert not any(keys.is_of_training(key) for key in ("post.gone", "tracking.gone", "gone", "gone.x"))
    with pytest.raises(KeyError, match="train.gone"):
        keys.on_resume("train.gone")


def test_what_trained_weights_come_from_is_what_it_was():
    assert keys.trained_by("train") == RECIPE


def test_what_a_certificate_records_is_what_it_was():
    """The order of the looser ones is that of the certificate's statement, which readers compare."""
    new = ("max_relative_deviation_g_fp32", "max_query_deviation", "max_worst_row_deviation")
    old = ("variant_above", "approximate_above", "invariant_above", "max_relative_deviation_g")
    last = ("max_leak_gap", "max_leak_effect", "max_kl")
    less = ("fp64_prompts", "generate_tokens", "generate_prompts")
    assert TODAY.above == (*old, *new, *last) and EARLIER.above == (*old, *last)
    assert TODAY.below == EARLIER.below == ("min_prompts", "min_attention_effect", "min_top1_agreement")
    assert TODAY.less == (*less, "effect_prompts") and EARLIER.less == less
    assert sorted(TODAY.settings) == sorted(("prompts", "g_from", *TODAY.less, "order_parameter", "prove"))
    assert sorted(EARLIER.settings) == sorted(("prompts", "g_from", *less))


def test_every_key_has_a_kind():
    found = keys.all_kinds()  # raises for a key without
    stages = {"shard", "tokenizer", "tokenize", "train", "consolidate", "extract", "validate", "bundle"}
    for key, kind in found.items():
        assert set(kind.stages) <= stages and (isinstance(kind.result, bool) or set(kind.result) <= set(kind.stages)), (
            key
        )
    assert {"train.freeze_g.below", "data.sources.url", "data.clean.language.keep", "model.g_start", "seed"} < set(
        found
    )
    for config in (parse_config(tree, where="test") for tree in (TREE, EVERYTHING)):
        assert {key for key in config.flat() if not key.startswith("data.slurm.sbatch_args")} <= set(found)


def test_a_key_without_a_kind_is_found_wherever_it_is():
    known = Kind("fixed", ("train",), result=True)

    class Inner(Section):
        marked: int = known(1, "marked")
        bare: int = 1

    @dataclass(frozen=True)
    class Sizes:
        width: int = 1

    class Made(Section):
        always: Inner = Inner()
        maybe: Inner | None = known(None, "maybe")
        several: list[Inner] = known([], "several")
        constrained: int = Field(1, ge=1)
        sizes: Sizes = Sizes()

    missing = [key for key, kind in keys.walk(Made) if kind is None]
    assert missing == ["always.bare", "maybe.bare", "several.bare", "constrained", "sizes.width"]


def test_a_section_with_a_key_without_a_kind_fails_the_configuration(monkeypatch):
    class Made(Section):
        bare: int = 1

    monkeypatch.setattr(keys, "RunConfig", create_model("Wider", __base__=RunConfig, made=(Made, Made())))
    with pytest.raises(AssertionError, match="^made.bare: without a Kind"):
        keys.all_kinds.__wrapped__()


def test_a_kind_is_plain_data_in_the_json_schema():
    field = RunConfig.model_json_schema()["$defs"]["TrainConfig"]["properties"]["steps"]
    assert json.loads(json.dumps(field))["kind"]["on_resume"] == "fixed" and field["minimum"] == 1
    kind = Kind("may change", ("extract", "validate"), result=("extract",))
    assert kind.decides("extract") and not kind.decides("validate")
    assert replace(kind, result=True).decides("validate") and not replace(kind, result=False).decides("extract")
