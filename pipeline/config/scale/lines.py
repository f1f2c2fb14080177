"""The plan of a cluster as lines of text."""

from __future__ import annotations

from typing import Any

from pipeline.config.plan import duration


def scale_lines(report: dict[str, Any]) -> list[str]:
    """Of the values that `scale` returns."""
    cluster, way = report["cluster"], report["as_configured"]
    nodes = "1 node" if cluster["nodes"] == 1 else f"{cluster['nodes']:,} nodes"
    lines = [
        "",
        f"cluster             {cluster['devices']:,} devices on {nodes}, {cluster['link_gbps']:g} Gbit/s a node, "
        f"{cluster['nvlink_gbps']:g} Gbit/s a device within one, {cluster['gpu_memory_gb']:g} GB",
        *_step_lines(report),
        *_memory_lines(report),
        *_file_lines(way),
        *_failure_lines(report),
        "",
        "the configuration at each ZeRO stage",
        _HEAD,
        *(_row(one) for one in report["stages"]),
        "",
        f"the fastest way that fits {cluster['gpu_memory_gb']:g} GB, at this global batch",
        _HEAD,
        *(_row(one) for one in report["world_sizes"]),
    ]
    return lines


def _step_lines(report: dict[str, Any]) -> list[str]:
    way, overlapped = report["as_configured"], report["with_overlap_comm"]
    step = way["step_seconds"]
    lines = [
        f"step                {_time(step['total'])}: {_time(step['compute'])} of computing, {_time(step['exposed'])} of "
        f"waiting for {_time(step['communication'])} of communication ({_size(step['sent_bytes'])} sent by a rank)",
    ]
    for one in report["traffic"]:
        hidden = f"behind the {one['behind']} pass" if one["behind"] else "nothing hides it"
        calls = "1 message" if one["calls"] == 1 else f"{one['calls']} messages"
        lines.append(
            f"  {one['operation']:<18}{one['what']}: {_size(one['nbytes'])} in {calls}, {one['rounds']}x a step, "
            f"{_time(one['seconds'])} each, {hidden}"
        )
    if overlapped is not None and overlapped["step_seconds"]["total"] < 0.99 * step["total"]:
        lines.append(
            f"                    train.deepspeed: zero_optimization.overlap_comm=true would wait for "
            f"{_time(overlapped['step_seconds']['exposed'])}"
        )
    return lines


def _memory_lines(report: dict[str, Any]) -> list[str]:
    way = report["as_configured"]
    memory = way["memory_bytes"]
    parts = ", ".join(f"{name} {_size(memory[name])}" for name in ("states", "gathered", "buckets", "activations"))
    fitting = ", ".join(f"{size}" for size in report["fits_gpus_of_gb"])
    where = f"fits devices of {fitting} GB" if fitting else "fits no device of 141 GB or less"
    verdict = "" if way["fits"] else "; DOES NOT FIT this one"
    return [f"memory              {_size(memory['total'])} a device ({parts}): {where}{verdict}"]


def _file_lines(way: dict[str, Any]) -> list[str]:
    return [
        f"loader              {_size(way['loader_bytes_per_second'])}/s of token ids, {way['tokens_per_second']:,.0f} tokens/s",
        f"checkpoint          {_size(way['checkpoint_bytes'])}; training stops for {_time(way['stall_seconds'])}",
    ]


def _failure_lines(report: dict[str, Any]) -> list[str]:
    way, failures = report["as_configured"], report["failures"]
    cost = "" if way["cost"] is None else f", cost {way['cost']:,.0f}"
    return [
        f"failures            one in {failures['job_mtbf_hours']:,.1f} hours, {failures['expected_failures']:,.1f} in the run; "
        f"restart {_time(failures['restart_seconds'])}; {failures['spare_nodes']} spare nodes",
        f"                    set train.checkpoint_every={failures['checkpoint_every']} "
        f"({duration(failures['best_interval_seconds'])}, Daly): goodput {failures['goodput']:.2%}; "
        f"with {failures['configured_checkpoint_every']}: {failures['configured_goodput']:.2%}",
        f"run                 {duration(way['hours'] * 3600)} with failures{cost}",
    ]


_HEAD = (
    f"  {'devices':>7} {'ZeRO':>4} {'micro':>5} {'accum':>5} {'recompute':<14} {'memory':>9} {'step':>9} {'waiting':>9} "
    f"{'MFU':>6} {'tokens/s':>12} {'every':>7} {'goodput':>8} {'hours':>9} {'cost':>11}"
)


def _row(way: dict[str, Any]) -> str:
    if "problem" in way:
        return f"  {way['devices']:>7} {way['problem']}"
    step = way["step_seconds"]
    cost = "" if way["cost"] is None else f"{way['cost']:,.0f}"
    note = "" if way["fits"] else "  does not fit"
    return (
        f"  {way['devices']:>7} {way['zero_stage']:>4} {way['micro_batch']:>5} {way['accumulation']:>5} "
        f"{way['activation_checkpointing']:<14} {_size(way['memory_bytes']['total']):>9} {_time(step['total']):>9} "
        f"{_time(step['exposed']):>9} {way['model_flops_utilization']:>6.1%} {way['tokens_per_second']:>12,.0f} "
        f"{way['checkpoint_every']:>7} {way['goodput']:>8.2%} {way['hours']:>9,.1f} {cost:>11}{note}"
    )


def _size(value: float) -> str:
    for unit, name in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB")):
        if value >= unit:
            return f"{value / unit:.3g} {name}"
    return f"{value / 1e3:.3g} kB"


def _time(seconds: float) -> str:
    if seconds < 1:
        return f"{seconds * 1e3:.3g} ms"
    return f"{seconds:.3g} s" if seconds < 120 else f"{seconds / 60:.3g} min"
