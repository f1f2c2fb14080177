"""`pldr plan`: what a run will cost and whether its G_LM can become invariant, computed from the configuration.

Memory is that of the model states as ZeRO shards them (parameters, gradients, Adam moments and, under bf16, the fp32
master weights) plus an estimate of the activations of one micro batch without checkpointing. It is a plan, not a
measurement: fragmentation, communication buckets and the framework are not in it.
"""

from __future__ import annotations

from typing import Any

from pipeline.config.batches import planned_sequences
from pipeline.config.continued import budget_after, budget_of
from pipeline.config.contraction import expected, verdict
from pipeline.config.run import RunConfig
from pipeline.config.schedule import planned_budget

WORLD_SIZES = (1, 2, 4, 8, 16, 64)


def plan(
    config: RunConfig,
    *,
    mfu: float = 0.4,
    peak_tflops: float = 989.0,
    devices: int = 8,
    flops_here: float | None = None,
    begins: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Parameters, FLOPs, memory, tokens, time and the invariance budget of a run.

    mfu: model FLOPs utilization to assume, 0..1. peak_tflops: dense peak of one device (989: H100/H200 bf16).
    flops_here: FLOP/s that training was measured to reach on this machine, instead of devices * peak * mfu.
    begins: state.json of the checkpoint that the run begins with (`--anneal-from`): tokens and time are of the steps left.
    """
    model, train = config.model, config.train
    parameters = model.num_parameters()
    sharing = train.micro_batch if train.g_from == "batch" else 1
    flops = model.flops_per_token(training=True, sequences_per_g=sharing)
    from_step = None if begins is None else int(begins["step"])
    steps = train.steps - (from_step or 0)
    tokens = planned_sequences(train, from_step=from_step or 0) * model.context_length
    budget = planned_budget(train) if begins is None else budget_after(train, begins)
    return {
        "parameters": parameters["total"],
        "parameters_by_part": {k: v for k, v in parameters.items() if k != "total"},
        "flops_per_token_forward": model.flops_per_token(training=False, sequences_per_g=sharing),
        "flops_per_token_training": flops,
        "flops_per_token_once_shared": (
            None
            if train.share_g_below is None
            else model.flops_per_token(training=True, sequences_per_g=train.micro_batch)
        ),
        "tokens": tokens,  # positions: how many of them are padding is known only once they are packed
        "padded": config.tokens.packing != "concat" or config.tokens.remainder == "pad",
        "steps": steps,
        "from_step": from_step,
        "tokens_per_step": train.global_batch * model.context_length,
        "tokens_per_parameter": planned_sequences(train) * model.context_length / parameters["total"],
        "activation_bytes_per_micro_batch": activation_bytes(config),
        "state_bytes_per_rank": {
            f"zero{stage}": {str(world): state_bytes(config, stage, world) for world in WORLD_SIZES}
            for stage in (0, 1, 2, 3)
        },
        "training_flops": flops * tokens,
        "assumed": {"mfu": mfu, "peak_tflops": peak_tflops, "devices": devices} if flops_here is None else None,
        "measured_flops_per_second": flops_here,
        "hours": flops * tokens / (flops_here or peak_tflops * 1e12 * mfu * devices) / 3600,
        "schedule": train.schedule,
        "invariance_budget": budget if model.g_source == "learned" else None,
        "invariance_budget_before": (
            None if begins is None or model.g_source != "learned" else budget_of(begins, train)
        ),
        "frozen_at": None if train.freeze_g is None else train.freeze_g.at_step,
        "invariance_verdict": (
            verdict(expected(train, model.num_reslayerA, budget))
            if model.g_source == "learned"
            else "G_LM is constant by construction"
        ),
    }


def state_bytes(config: RunConfig, stage: int, world: int) -> int:
    """Bytes of parameters, gradients and optimizer on one rank under a ZeRO stage."""
    count = config.model.num_parameters()["total"]
    # fp32 master weights: under bf16, and in ZeRO 1-3, which keeps a flat copy of them in fp32 too.
    masters = 4 if config.train.precision == "bf16" or stage > 0 else 0
    weight, gradient, optimizer = (2, 2, 8 + masters) if config.train.precision == "bf16" else (4, 4, 8 + masters)
    if stage > 0 and config.train.global_batch > config.train.micro_batch * world:
        gradient = 4  # accumulated in fp32 (pipeline/train/deepspeed_config.py)
    shards = [world if stage >= s else 1 for s in (3, 2, 1)]
    return sum(count * size // n for size, n in zip((weight, gradient, optimizer), shards, strict=True))


def activation_bytes(config: RunConfig) -> int:
    """Estimated bytes kept for the backward pass of one micro batch: layers, metric learners, logits."""
    model, B = config.model, config.train.micro_batch
    D, K, S, width = model.d_model, model.head_dim, model.context_length, 2 if config.train.precision == "bf16" else 4
    layer = B * S * (14 * D + 4 * model.feed_forward_size) * width
    if model.g_source == "learned":
        rows = (1 if config.train.g_from == "batch" else B) * model.num_heads * K
        of_norm = 3 * K if model.num_denseA else K  # without GLUs there is no sum, and a unit keeps what it reads
        layer += rows * model.num_reslayerA * (model.num_denseA * (4 * model.A_dff + K) + of_norm) * width
    return model.num_layers * layer + B * S * model.vocab_size * (width + 8)


def duration(seconds: float) -> str:
    """Two digits in the unit that fits: "about 4 minutes"."""
    for unit, name in ((86400.0, "days"), (3600.0, "hours"), (60.0, "minutes")):
        if seconds >= 2 * unit:
            return f"about {float(f'{seconds / unit:.2g}'):,g} {name}"
    return "less than a second" if seconds < 1 else f"about {float(f'{seconds:.2g}'):g} seconds"


def plan_lines(report: dict[str, Any]) -> list[str]:
    """The report as lines of text."""

    def size(value: float) -> str:
        return f"{value / 1e9:,.2f} GB" if value >= 1e8 else f"{value / 1e6:,.1f} MB"

    parts = "  ".join(f"{k} {v:,}" for k, v in report["parameters_by_part"].items() if v)
    assumed = report["assumed"]
    begins = "" if report["from_step"] is None else f" after step {report['from_step']:,}"
    where = "this machine's CPU, where a few training steps were timed"
    if assumed is not None:
        devices = "1 device" if assumed["devices"] == 1 else f"{assumed['devices']} devices"
        where = f"{devices} of {assumed['peak_tflops']:g} TFLOP/s at {assumed['mfu']:.0%} MFU"
    included = " with padding" if report["padded"] else ""
    lines = [
        f"parameters          {report['parameters']:,}",
        f"                    {parts}",
        f"FLOPs per token     {report['flops_per_token_training']:.4g} training, "
        f"{report['flops_per_token_forward']:.4g} forward",
        f"tokens              {report['tokens']:,}{included} ({report['steps']:,} steps of {report['tokens_per_step']:,}"
        f"{begins}), {report['tokens_per_parameter']:.1f} a parameter",
        f"time                {duration(report['hours'] * 3600)} on {where}",
        f"activations         {size(report['activation_bytes_per_micro_batch'])} a micro batch (estimate)",
        "states per rank     " + "".join(f"{'1 rank' if w == 1 else f'{w} ranks':>12}" for w in WORLD_SIZES),
    ]
    if (shared := report["flops_per_token_once_shared"]) is not None:
        lines.insert(
            3,
            f"                    {shared:.4g} training once G is shared (train.share_g_below), which the time leaves out",
        )
    for stage, row in report["state_bytes_per_rank"].items():
        lines.append(f"  {stage:<18}" + "".join(f"{size(row[str(w)]):>12}" for w in WORLD_SIZES))
    if report["invariance_budget"] is None:
        lines.append(f"invariance          {report['invariance_verdict']}")
    else:
        until = "" if report["frozen_at"] is None else f" when G is frozen, at step {report['frozen_at']:,}"
        before = report["invariance_budget_before"]
        spent = "" if before is None else f", {before:.2f} of it up to step {report['from_step']:,}"
        budget = f"{report['invariance_budget']:.2f} ({report['schedule']} schedule){until}{spent}"
        lines.append(f"invariance budget   {budget}: {report['invariance_verdict']}")
    return lines
