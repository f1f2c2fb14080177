"""What ranks send, against what DeepSpeed was seen to do, and what of it is hidden."""

import pytest

from pipeline.config.load import load_config
from pipeline.config.scale.best import judge, with_overlap, with_way
from pipeline.config.scale.cluster import Cluster
from pipeline.config.scale.communication import Collective, collectives, gradient_bytes
from pipeline.config.scale.shapes import parameter_sizes
from pipeline.config.scale.step_time import Compute, step_time
from pipeline.train.deepspeed_config import deepspeed_config
from pldr_model.config import ModelConfig
from pldr_model.model import PLDRModel

CONFIG = """
name: scale
run_dir: run
data: {sources: [{url: x.txt}]}
model: {vocab_size: 2000, context_length: 32, num_layers: 2, num_heads: 2, head_dim: 32}
train: {steps: 100, warmup_steps: 1, global_batch: 8, micro_batch: 2, precision: fp32, zero_stage: 1, deepspeed: "zero{stage}"}
"""
P, SMALL, NUM_SMALL = 913_784, 219_768, 163  # parameters of this model; those below zero3.json's threshold of 10,000


@pytest.fixture
def load(tmp_path):
    path = tmp_path / "scale.yaml"
    path.write_text(CONFIG)
    return lambda *overrides: load_config(str(path), list(overrides))


@pytest.mark.parametrize(
    "variant",
    [
        *({"g_source": source} for source in ("learned", "constant", "identity", "random")),
        {"num_denseA": 0},
        {"g_source": "constant", "g_constraint": "low_rank", "g_rank": 3},
        {"g_source": "constant", "g_constraint": "nonrotary"},
    ],
    ids=str,
)
def test_sizes_of_parameters_are_the_models(variant):
    config = ModelConfig(
        vocab_size=50,
        context_length=8,
        num_layers=2,
        num_heads=2,
        head_dim=4,
        num_reslayerA=3,
        A_dff=6,
        **variant,
    )
    assert sorted(parameter_sizes(config)) == sorted(p.numel() for p in PLDRModel(config).parameters())


@pytest.mark.parametrize(
    ("stage", "seen"),
    [  # collectives of one step of two micro batches on two gloo ranks, as torch dispatched them on 2026-11-29: elements, calls
        (0, [("all-reduce", P, 1)]),
        (1, [("all-reduce", P, 1), ("all-gather", P, 2)]),
        (2, [("all-reduce", 2 * P, 2), ("all-gather", P, 2)]),
        (3, [("all-gather", 2 * (P - SMALL), 2), ("reduce-scatter", 2 * P, 2), ("all-gather", SMALL, NUM_SMALL)]),
    ],
)
def test_the_collectives_are_those_that_deepspeed_does(load, stage, seen):
    found = collectives(load(f"train.zero_stage={stage}"), 2)
    assert [(one.operation, one.nbytes * one.rounds / 4, one.calls * one.rounds) for one in found] == seen


def test_the_bytes_that_crossed_the_loopback(load):
    """Measured in the same runs: bytes of both ranks in one step, headers included."""
    gloo = Cluster(devices=2, gpus_per_node=1, backend="gloo")
    for stage, measured in enumerate((7_321_820, 10_985_464, 18_303_300, 21_357_941)):
        sent = sum(one.sent(gloo) for one in collectives(load(f"train.zero_stage={stage}"), 2))
        assert measured == pytest.approx(2 * sent, rel=0.02) and measured > 2 * sent, stage


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("batch", [4, 8])
@pytest.mark.parametrize("keys", ["{}", "{data_types: {grad_accum_dtype: bf16}}", "{communication_data_type: bf16}"])
def test_gradients_have_the_type_that_deepspeed_gets(load, stage, precision, batch, keys):
    config = load(f"train.zero_stage={stage}", f"train.precision={precision}", f"train.global_batch={batch}",
                  f"train.deepspeed={keys}")  # fmt: skip
    named = deepspeed_config(config.train, 2).get("communication_data_type")
    expected = {"fp32": 4, "bf16": 2, None: 2 if precision == "bf16" else 4}[named]
    assert gradient_bytes(config, 2) == expected


def test_a_larger_model_gathers_again_in_the_backward_pass(load):
    keys = "{zero_optimization: {stage3_max_reuse_distance: 0, stage3_param_persistence_threshold: 0}}"
    found = collectives(load("train.zero_stage=3", f"train.deepspeed={keys}"), 4)
    assert [(one.what, one.nbytes) for one in found] == [
        ("weights, forward", 4 * P), ("weights, backward", 4 * P), ("gradients", 4 * P)
    ]  # fmt: skip


def test_the_slower_network_decides():
    cluster = Cluster(devices=16, link_gbps=80, nvlink_gbps=800, link_latency_us=0, nvlink_latency_us=0)
    reduce = Collective("all-reduce", "", 1e9, 1, 1)
    assert reduce.seconds(cluster) == pytest.approx(2 * 1e9 * 1 / 2 / 10e9)  # 2 nodes: (m - 1) / m
    assert reduce.seconds(cluster.of(8)) == pytest.approx(2 * 1e9 * 7 / 8 / 100e9)  # within one
    assert reduce.seconds(cluster.of(1)) == 0 and reduce.sent(cluster) == pytest.approx(2 * 15 / 16 * 1e9)
    slow = Cluster(devices=16, link_gbps=1e9, nvlink_gbps=1e9, link_latency_us=10, nvlink_latency_us=3)
    messages = Collective("all-gather", "", 8.0, 100, 1)
    assert messages.seconds(slow) == pytest.approx(100 * (7 * 3e-6 + 1 * 10e-6), rel=1e-3)


def test_what_is_hidden_behind_the_backward_pass(load):
    cluster = Cluster(devices=2, gpus_per_node=1, link_gbps=0.8, link_latency_us=0)
    config = load("train.zero_stage=1", "train.deepspeed={zero_optimization: {reduce_bucket_size: 100000}}")
    reduce, gather = 4 * P / 1e8, 2 * P / 1e8
    long, short = Compute(10, 20), Compute(0, 0)
    assert step_time(config, cluster, long).exposed == pytest.approx(reduce + gather)
    overlapped = step_time(with_overlap(config), cluster, long)
    assert overlapped.exposed == pytest.approx(reduce / 10 + gather)  # the last of ten buckets
    assert overlapped.communication == pytest.approx(reduce + gather) and overlapped.compute == 60
    assert step_time(with_overlap(config), cluster, short).exposed == pytest.approx(reduce + gather)
    every = step_time(with_way(load(), 2, 2, "none"), cluster, short).exposed
    assert every == pytest.approx(2 * reduce + gather)  # stage 2 reduces after each micro batch
    gloo = Cluster(devices=2, gpus_per_node=1, link_gbps=0.8, link_latency_us=0, backend="gloo")
    assert step_time(with_overlap(config), gloo, long).exposed == pytest.approx(reduce + gather)


def test_recomputation_costs_a_forward_pass(load):
    cluster = Cluster(devices=1)
    times = {
        how: judge(load("train.zero_stage=0", f"train.activation_checkpointing={how}"), cluster)
        for how in ("none", "metric_learner", "layer")
    }
    computed = {how: way.step.compute for how, way in times.items()}
    memory = {how: way.memory.activations for how, way in times.items()}
    assert computed["none"] < computed["metric_learner"] < computed["layer"] < computed["none"] * 4 / 3
    assert memory["layer"] < memory["none"] > memory["metric_learner"] > 0
