"""Convert a checkpoint of another world size, ZeRO stage or precision into this job's engine.

DeepSpeed's plain load refuses another world size, and its universal checkpoint changes the stage only between 1 and 2.
So the old files are read by parameter name (deepspeed_files.py) and every rank takes its own share of the weights and of
the moments. Nothing is computed with them: in fp32 training continues, bit for bit, from what was saved; only sums over
ranks then run in another order. Only one complete parameter at a time is in memory.

Every rank reads all files: (new ranks) x (checkpoint) bytes go over the network or disk, once, at the start.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from pipeline.checkpoint.deepspeed_files import MOMENTS, ZeroState
from pipeline.errors import UserError

Put = Callable[[nn.Parameter, Tensor, dict[str, Tensor]], None]


def fits(engine: Any, old: ZeroState, *, world_size: int, precision: str, current: str) -> bool:
    """Whether DeepSpeed can load these files itself, bit for bit: the same ranks, precision and `zero_optimization`.

    world_size, precision: of the job that saved it; current: this job's precision.
    """
    same_ranks = world_size == dist.get_world_size()
    same_zero = old.zero == engine.config["zero_optimization"] and not old.bf16_optimizer
    return bool(same_ranks and precision == current and same_zero)


@torch.no_grad()
def carry_over(engine: Any, old: ZeroState, *, new: Mapping[str, Tensor] | None = None) -> None:
    """Copy a checkpoint's weights, moments and step counts into the engine; collective. Shapes have been checked.

    new: weights of parameters that the checkpoint does not have (a G, which AdamW trains); their moments are zero.
    """
    parameters = dict(engine.module.named_parameters())
    optimizer, stage = engine.optimizer, engine.zero_optimization_stage()
    if stage == 3:
        optimizer.checkpoint_event_prologue()  # every parameter into its partition, as DeepSpeed's load does
    put = _put_by_stage(engine, old.adam_step)
    for name, parameter in parameters.items():
        if name in old.shapes:
            put(parameter, old.tensor(name), {key: old.tensor(name, key) for key in old.moments(name)})
        else:
            weight = (new or {})[name]
            put(parameter, weight, {key: torch.zeros_like(weight) for key in MOMENTS})
    if stage == 3:
        optimizer.checkpoint_event_epilogue()  # the small parameters that stay unpartitioned on every rank
    for name, buffer in engine.module.named_buffers():
        if name in old.buffers:
            buffer.copy_(old.buffers[name])
    engine.global_steps = old.counters["global_steps"]
    engine.global_samples = old.counters["global_samples"]
    engine.skipped_steps = old.counters["skipped_steps"]


def check_shapes(engine: Any, old: ZeroState) -> None:
    """Raises UserError naming the first parameter that the checkpoint and the engine's model do not share."""
    ours = {name: tuple(getattr(p, "ds_shape", p.shape)) for name, p in engine.module.named_parameters()}
    for name in [*ours, *old.shapes]:
        there, here = old.shapes.get(name), ours.get(name)
        if there != here:
            raise UserError(
                f"{old.folder}: {name} is {list(there) if there else 'missing'} in the checkpoint, "
                f"{list(here) if here else 'missing'} in this model; set model.* as it was trained, or use a new run_dir"
            )


def _put_by_stage(engine: Any, step: float) -> Put:
    """What copies one parameter into the engine's optimizer. The state is made here: Adam itself makes it at its first step."""
    states = engine.basic_optimizer.state
    stage, optimizer = engine.zero_optimization_stage(), engine.optimizer

    def fresh(master: Tensor, moments: Iterable[str] = MOMENTS) -> dict[str, Tensor]:
        adam = {"step": torch.tensor(step, device=master.device)} if tuple(moments) == MOMENTS else {}
        return {**adam, **{key: torch.zeros_like(master) for key in moments}}

    if stage == 0:
        # bf16: DeepSpeed keeps fp32 masters beside the parameters, in the same groups.
        groups = [group["params"] for group in optimizer.param_groups]
        held = zip(getattr(optimizer, "fp16_groups", groups), getattr(optimizer, "fp32_groups", groups), strict=True)
        masters = {p: master for ours, theirs in held for p, master in zip(ours, theirs, strict=True)}

        def put_full(parameter: nn.Parameter, weight: Tensor, moments: dict[str, Tensor]) -> None:
            master = masters[parameter]
            master.copy_(weight)
            parameter.copy_(weight)
            states[master] = fresh(master, moments)
            for key, value in moments.items():
                states[master][key].copy_(value)

        return put_full
    for flat in optimizer.fp32_partitioned_groups_flat if stage == 3 else optimizer.single_partition_of_fp32_groups:
        states[flat] = fresh(flat.detach())
    if stage == 3:
        return _put_piece
    optimizer._hp_optimizer_states_linked = False  # in a rollback: they are linked to the moments replaced above
    optimizer._lazy_init_hp_params_optimizer_state()  # links parameters to their share of the moments
    return _put_share


def _put_share(parameter: nn.Parameter, weight: Tensor, moments: dict[str, Tensor]) -> None:
    """Stages 1 and 2: every rank has the complete parameter, and its share of the optimizer's state (which can be empty)."""
    from deepspeed.utils import safe_set_full_fp32_param, safe_set_full_optimizer_state

    parameter.copy_(weight)
    safe_set_full_fp32_param(parameter, weight)
    for key, value in moments.items():
        safe_set_full_optimizer_state(parameter, value, key)


def _put_piece(parameter: nn.Parameter, weight: Tensor, moments: dict[str, Tensor]) -> None:
    """Stage 3: a rank has a piece of everything; pieces are of equal size, so the last is padded with zeros."""
    from deepspeed.utils import safe_set_local_fp32_param, safe_set_local_optimizer_state

    held: Tensor = parameter.ds_tensor  # type: ignore[attr-defined]

    def piece(full: Tensor) -> Tensor:
        size, rank = held.numel(), dist.get_rank()
        mine = full.reshape(-1)[size * rank : size * (rank + 1)]
        return torch.nn.functional.pad(mine, (0, size - mine.numel()))

    held.copy_(piece(weight))
    safe_set_local_fp32_param(parameter, piece(weight))
    for key, value in moments.items():
        safe_set_local_optimizer_state(parameter, piece(value), key)
