"""Read a DeepSpeed checkpoint by parameter name: full fp32 weights and Adam moments, for every ZeRO stage.

Consolidation needs the weights; a resume at another world size or ZeRO stage needs the moments too (reshard.py).
Where DeepSpeed 0.19 stores them, in its tag folder:

    stage 0, fp32   mp_rank_00_model_states.pt: `module`, and `optimizer` with the moments of parameter 0, 1, 2 ...
    stage 0, bf16   the same file; fp32 masters and moments both in `optimizer`, parameters without names
    stages 1, 2     *zero_pp_rank_R_*_optim_states.pt, one a rank: a flat partition for each parameter group, and
                    `param_slice_mappings`: where each parameter's elements are in it
    stage 3         the same files: each parameter cut into equal pieces, one a rank, the last one padded; a rank's pieces
                    follow one another in its flat sub-groups

Decision: DeepSpeed's own merging (`zero_to_fp32`) omits the moments and lets torch unpickle code, so the files are read here,
with `safe_load`. They are memory-mapped: only the parameter that is read is in memory.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import re
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pipeline.devices import has_gpu
from pipeline.errors import UserError, first_line
from pldr_model.config import DecayOn
from pldr_model.model import optimizer_group

WEIGHT = "weight"  # in addition to the names of the moments
MOMENTS = ("exp_avg", "exp_avg_sq")
DECAY_ON = "metric_decay_on"  # in a parameter group, where it is not `units`
MUON_MOMENTS = ("momentum_buffer",)  # of the matrices that Muon trains (pipeline/train/optim.py)


class _Piece(NamedTuple):
    """Elements [start, start + numel) of flat tensors: one rank's share of one parameter."""

    flat: dict[str, Tensor]  # WEIGHT and MOMENTS, or MUON_MOMENTS
    start: int
    numel: int


class ZeroState:
    """A checkpoint's parameters and moments. `shapes`: by name, in the order of the optimizer; `buffers`: the model's;
    `adam_step`: updates that Adam has made; `zero`: DeepSpeed's `zero_optimization` settings; `counters`: its step counts;
    `bf16_optimizer`: whether it is BF16_Optimizer's, as of older runs at stage 1 with data_types.grad_accum_dtype.

    Raises UserError naming the folder or file that is missing, damaged, holds more than tensors, or is of an unknown layout.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        if not folder.is_dir():
            raise UserError(f"{folder}: no such folder; this checkpoint has no weights: name another one")
        self._pieces: dict[str, list[_Piece]] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.bf16_optimizer = False
        steps: set[float] = set()
        try:
            model = _model_states(folder)
            self.zero: dict[str, Any] = dict(model["ds_config"]["zero_optimization"])
            self.counters = {key: int(model[key]) for key in ("global_steps", "global_samples", "skipped_steps")}
            names = model["buffer_names"]
            self.buffers: dict[str, Tensor] = {n: t for n, t in model["module"].items() if n in names}
            partitions = _partitions(folder)
            if not partitions:
                self._read_unpartitioned(model, steps)
            else:
                groups = [{n: tuple(shape) for n, shape in group.items()} for group in model["param_shapes"]]
                self.shapes = {name: shape for group in groups for name, shape in group.items()}
                self.bf16_optimizer = "zero_stage" not in partitions[0]
                stage = int(partitions[0].get("zero_stage", 1))
                read = self._read_stage_3 if stage == 3 else self._read_stages_1_2
                for partition in partitions:
                    read(partition, len(partitions), steps)
        except UserError:
            raise
        except Exception as error:  # an unknown layout
            raise UserError(
                f"{folder}: DeepSpeed's files cannot be merged: {first_line(error)}; nothing in them was executed: "
                "name another checkpoint"
            ) from error
        for name, shape in self.shapes.items():
            found = sum(piece.numel for piece in self._pieces.get(name, []))
            if found < math.prod(shape):
                raise UserError(f"{folder}: {name} has {found} of {math.prod(shape)} elements; name another checkpoint")
        if len(steps) != 1:
            raise UserError(f"{folder}: Adam's step is {sorted(steps) or 'missing'}; name another checkpoint")
        self.adam_step = steps.pop()

    def tensor(self, name: str, what: str = WEIGHT) -> Tensor:
        """A full parameter (what: WEIGHT) or one of its moments (`moments`), fp32, in the parameter's shape."""
        shape = self.shapes[name]
        pieces = [p.flat[what].view(-1).narrow(0, p.start, p.numel) for p in self._pieces[name]]
        return torch.cat(pieces)[: math.prod(shape)].view(shape).detach().float()

    def moments(self, name: str) -> tuple[str, ...]:
        """The names of a parameter's moments."""
        return tuple(key for key in self._pieces[name][0].flat if key != WEIGHT)

    def _read_unpartitioned(self, model: dict[str, Any], steps: set[float]) -> None:
        """Stage 0. The moments are numbered in the order of the optimizer (optimizer_group). fp32 masters must round to the
        bf16 weight they are matched with."""
        weights = {name: weight for name, weight in model["module"].items() if name not in self.buffers}
        optimizer = model["optimizer"]
        groups = optimizer.get("optimizer_state_dict", optimizer)["param_groups"]
        muon = any(group.get("use_muon") for group in groups)
        decay_on: DecayOn = next((group[DECAY_ON] for group in groups if DECAY_ON in group), "units")
        names = sorted(
            weights, key=lambda name: optimizer_group(name, weights[name].ndim, muon=muon, decay_on=decay_on)
        )
        weights = {name: weights[name] for name in names}
        if "fp32_groups" in optimizer:
            masters = [master for group in optimizer["fp32_groups"] for master in group]
            for (name, weight), master in zip(weights.items(), masters, strict=True):
                if not torch.equal(weight, master.detach().to(weight.dtype)):
                    raise UserError(
                        f"{self.folder}: the fp32 weights of ZeRO stage 0 in bf16 are in an unknown order ({name}); "
                        "use train.zero_stage=1"
                    )
            weights = dict(zip(names, masters, strict=True))
            optimizer = optimizer["optimizer_state_dict"]
        for number, (name, weight) in enumerate(weights.items()):
            moments = optimizer["state"][number]
            keys = MUON_MOMENTS if muon and optimizer_group(name, weight.ndim, muon=True) == 2 else MOMENTS
            if any(moments[key].shape != weight.shape for key in keys):
                raise ValueError(f"the moments of parameter {number} do not have the shape of {name}")
            if keys == MOMENTS:
                steps.add(float(moments["step"]))
            self.shapes[name] = tuple(weight.shape)
            flat = {WEIGHT: weight, **{key: moments[key] for key in keys}}
            self._pieces[name] = [_Piece(flat, 0, weight.numel())]

    def _read_stages_1_2(self, partition: dict[str, Any], ranks: int, steps: set[float]) -> None:
        """One rank's file: append its pieces (ranks are read in order, so pieces are in order)."""
        weights = partition["single_partition_of_fp32_groups"]
        moments = partition["base_optimizer_state"]
        moments = moments if isinstance(moments, list) else moments["state"]  # a list: "elastic_checkpoint"
        for group, mapping in enumerate(partition["param_slice_mappings"]):
            flat = _flat(weights[group], moments[group], steps)
            for name, address in mapping.items():
                self._pieces.setdefault(name, []).append(_Piece(flat, address.start, address.numel))

    def _read_stage_3(self, partition: dict[str, Any], ranks: int, steps: set[float]) -> None:
        """One rank's file: walk its sub-groups and the parameters together."""
        moments = partition["optimizer_state_dict"]["state"]
        flats = [_flat(weight, moments[i], steps) for i, weight in enumerate(partition["fp32_flat_groups"])]
        number = start = 0
        for name, shape in self.shapes.items():
            numel = math.ceil(math.prod(shape) / ranks)
            while start == flats[number][WEIGHT].numel():
                number, start = number + 1, 0
            if start + numel > flats[number][WEIGHT].numel():
                raise ValueError(f"{name} does not fit into sub-group {number}")
            self._pieces.setdefault(name, []).append(_Piece(flats[number], start, numel))
            start += numel
        if start != flats[number][WEIGHT].numel() or number + 1 != len(flats):
            raise ValueError("the sub-groups hold more than the parameters")


def _flat(weight: Tensor, state: dict[str, Any], steps: set[float]) -> dict[str, Tensor]:
    steps.add(float(state["step"]))
    if any(state[key].numel() < weight.numel() for key in MOMENTS):  # weights are saved without their padding
        raise ValueError("a partition's moments are smaller than its weights")
    return {WEIGHT: weight, **{key: state[key] for key in MOMENTS}}


def _model_states(folder: Path) -> dict[str, Any]:
    """The file with the module: rank 0's, where every rank has one (stage 3)."""
    candidates = [folder / "mp_rank_00_model_states.pt", folder / "zero_pp_rank_0_mp_rank_00_model_states.pt"]
    found = next((path for path in candidates if path.is_file()), None)
    if found is None:
        raise UserError(f"{candidates[0]}: no such file; this checkpoint has no weights: name another one")
    states = safe_load(found, "cpu", mmap=True)
    assert isinstance(states, dict)
    return states


def _partitions(folder: Path) -> list[dict[str, Any]]:
    """Every rank's optimizer file, in the order of ranks; none at stage 0."""
    by_rank = {}
    for path in folder.glob("*_optim_states.pt"):
        match = re.search(r"zero_pp_rank_(\d+)_mp_rank_00_optim_states\.pt$", path.name)
        if match is None:
            raise UserError(f"{path}: unexpected file; name another checkpoint")
        by_rank[int(match[1])] = path
    if sorted(by_rank) != list(range(len(by_rank))):
        raise UserError(f"{folder}: optimizer files of ranks {sorted(by_rank)}; name a complete checkpoint")
    return [safe_load(path, "cpu", mmap=True)["optimizer_state_dict"] for _, path in sorted(by_rank.items())]


@contextlib.contextmanager
def safe_unpickling() -> Iterator[None]:
    """Inside, every torch.load is weights_only, whatever its caller asks for."""
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if has_gpu() else "cpu")
    before, level = os.environ.get("TORCH_FORCE_WEIGHTS_ONLY_LOAD"), logging.root.manager.disable
    logging.disable(logging.WARNING)  # DeepSpeed reports its version, its accelerator and its ops on import
    os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] = "1"
    try:
        from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
        from deepspeed.runtime.zero.config import ZeroStageEnum
        from deepspeed.utils.tensor_fragment import fragment_address

        allowed = [LossScaler, DynamicLossScaler, ZeroStageEnum, fragment_address]
        with torch.serialization.safe_globals(allowed), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)
        if before is None:
            del os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"]
        else:
            os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] = before


def safe_load(path: str | Path, map_location: Any = None, *, mmap: bool = False) -> Any:
    """`torch.load` inside `safe_unpickling`; `mmap`: tensors are read when they are used.

    Raises UserError naming the file when it is damaged or holds anything else.
    """
    try:
        with safe_unpickling():
            return torch.load(path, map_location=map_location, mmap=mmap, weights_only=True)
    except FileNotFoundError:
        raise UserError(f"{path}: missing; the checkpoint is incomplete, resume from an earlier one") from None
    except Exception as error:  # a damaged pickle fails in any way
        raise UserError(
            f"{path}: not a checkpoint file: damaged, or it holds more than tensors and numbers; nothing in it was "
            "executed, resume from an earlier one"
        ) from error
