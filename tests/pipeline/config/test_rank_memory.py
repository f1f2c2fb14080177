"""Bytes of one rank, against the model's own parameters and against what a CPU was seen to allocate."""

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from pipeline.config.load import load_config, parse_config
from pipeline.config.plan import plan, plan_lines
from pipeline.config.rank_memory import (
    activation_bytes,
    muon_parameters,
    optimizer_bytes,
    output_bytes,
    stages_of,
    state_bytes,
)
from pldr_model.loss import OutputLayer
from pldr_model.model import PLDRModel, optimizer_group


def run(precision="fp32", micro_batch=1, model=None, **train):
    sizes = {
        "vocab_size": 2000,
        "num_layers": 2,
        "num_heads": 4,
        "head_dim": 16,
        "context_length": 256,
        **(model or {}),
    }
    recipe = {"precision": precision, "micro_batch": micro_batch, "global_batch": micro_batch, **train}
    tree = {"name": "t", "run_dir": "r", "data": {"sources": ["x.txt"]}, "model": sizes, "train": recipe}
    return parse_config(tree, where="test")


def peak(work):
    """Bytes that were allocated at once while this ran, above the start."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        kept = work()
    now = top = 0
    for event in seen.profiler.kineto_results.events():
        now += event.nbytes() if event.name() == "[memory]" else 0
        top = max(top, now)
    assert kept is not None
    return top


@pytest.mark.parametrize(("precision", "dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16)])
@pytest.mark.parametrize("micro_batch", [1, 4])
def test_logits_are_counted_a_chunk_at_a_time(precision, dtype, micro_batch):
    config = run(precision, micro_batch)
    torch.manual_seed(0)
    model = PLDRModel(config.model).to(dtype)
    ids = torch.randint(4, 2000, (micro_batch, 257))
    x_BSD = torch.randn(micro_batch, 256, 64, dtype=dtype, requires_grad=True)
    output = OutputLayer(64, 2000).to(dtype)
    output(x_BSD, ids[:, 1:])  # what is made once is made
    measured = peak(lambda: output(x_BSD, ids[:, 1:]))
    # In bf16 the CPU's product has a copy of its own.
    assert output_bytes(config, "cpu") == pytest.approx(measured, rel=0.02 if precision == "fp32" else 0.15)
    if micro_batch == 4:
        whole = output(x_BSD).numel()
        assert output_bytes(config, "cpu") < whole * (4 if precision == "fp32" else 6)
    measured = peak(lambda: model(ids[:, :-1], targets=ids[:, 1:]))
    assert measured <= activation_bytes(config, "cpu") <= 1.5 * measured


def test_on_a_gpu_chunks_are_larger(repository):
    config = load_config(repository / "configs" / "pldr-110m.yaml")
    rows, model = config.train.micro_batch * 1024, config.model
    assert rows == 4096
    gpu, cpu = (output_bytes(config, device) for device in ("cuda", "cpu"))
    assert gpu - cpu == (2048 - 256) * model.vocab_size * 6
    assert plan(config)["activation_bytes_per_micro_batch"] == activation_bytes(config, "cuda")
    assert plan(config, flops_here=1e10)["activation_bytes_per_micro_batch"] == activation_bytes(config, "cpu")


def test_zero_shards_what_its_stage_does(repository):
    config = load_config(repository / "configs" / "pldr-110m.yaml")
    count = 109_689_362
    assert state_bytes(config, 0, 8) == 16 * count
    assert state_bytes(config, 1, 8) == 4 * count + 12 * count // 8
    assert state_bytes(config, 1, 4) == 6 * count + 12 * count // 4  # accumulates, in fp32
    assert state_bytes(config, 3, 2) == count * 2 // 2 + 4 * count // 2 + 12 * count // 2


@pytest.mark.parametrize("g_source", ["learned", "constant", "identity"])
def test_muon_has_one_moment_of_each_matrix_it_trains(g_source):
    model = {"g_source": g_source}
    config = run(model=model, optimizer="muon", zero_stage=0)
    named = PLDRModel(config.model).named_parameters()
    sizes = {name: p.numel() for name, p in named if optimizer_group(name, p.ndim, muon=True) == 2}
    assert muon_parameters(config.model) == sum(sizes.values())
    count = config.model.num_parameters()["total"]
    assert optimizer_bytes(config, 0) == 4 * (2 * count - sum(sizes.values()))
    assert state_bytes(config, 0, 8) == 16 * count - 4 * sum(sizes.values())
    bf16 = run("bf16", model=model, optimizer="muon", zero_stage=0)
    assert state_bytes(bf16, 0, 8) == 16 * count - 4 * sum(sizes.values())
    assert optimizer_bytes(run(model=model), 0) == 8 * count


def test_stages_that_muon_cannot_have_are_not_planned():
    config = run(optimizer="muon", zero_stage=0)
    assert stages_of(config.train) == (0,) and list(plan(config)["state_bytes_per_rank"]) == ["zero0"]
    assert "zero1" not in "\n".join(plan_lines(plan(config)))
    assert list(plan(run())["state_bytes_per_rank"]) == ["zero0", "zero1", "zero2", "zero3"]
