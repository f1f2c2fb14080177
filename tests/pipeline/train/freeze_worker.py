"""One rank of test_freeze.py. Usage: freeze_worker.py FOLDER STAGES PRECISION. Rank 0 writes FOLDER/result.json."""

import gc
import sys
import weakref
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from pipeline.checkpoint.deepspeed_files import MOMENTS, WEIGHT, ZeroState
from pipeline.checkpoint.format import checkpoint_name, model_of, verify
from pipeline.checkpoint.save import Saver
from pipeline.config.train import FreezeConfig
from pipeline.train.engine import init_distributed, release
from pipeline.train.freeze import freeze
from pldr_model.model import PLDRModel, g_shape
from tests.helpers.worker import finish
from tests.pipeline.train.zero_worker import configuration, run, with_train

SWITCH = 4


def saved_model(folder: Path, step: int) -> dict:
    """The model in a checkpoint: its parameters, its G, whether it is frozen."""
    checkpoint = folder / "checkpoints" / checkpoint_name(step)
    saved = verify(checkpoint)
    state = ZeroState(checkpoint / checkpoint.name)
    return {"frozen": saved["frozen"], "model": model_of(saved)["g_source"], "names": sorted(state.shapes),
            "has_g": "g_lm" in state.buffers, "budget": saved["budget"]}  # fmt: skip


def switch(config, folder: Path, g_lm: torch.Tensor) -> dict:
    """The freeze once more, against the checkpoint before it: is G the mean over the sequences that came next, has every weight
    and moment been carried over, and is the engine freed?"""
    name = checkpoint_name(SWITCH)
    source = ZeroState(folder / "checkpoints" / name / name)
    model = PLDRModel(config.model)
    model.load_state_dict({n: source.tensor(n) for n in source.shapes})
    train = config.train
    total = torch.zeros(g_shape(config.model), dtype=torch.float64)
    for position in (SWITCH * train.global_batch, (SWITCH + 1) * train.global_batch):  # 12 sequences, rounded up
        rng = np.random.default_rng(position)  # as zero_worker.Batches
        ids = torch.from_numpy(rng.integers(4, config.model.vocab_size, size=(train.global_batch, 17)))
        with (
            torch.no_grad()
        ):  # as the freeze does: with gradients the metric learner is another function, and rounds otherwise
            _, outputs = model(ids[:, :-1], padded=False, return_outputs=True)
        total += torch.stack([layer.G_LM.detach().double().sum(dim=0) for layer in outputs])
    expected = total / (2 * train.global_batch)

    engine = freeze(config, source, g_lm)
    Saver(engine, folder / "carried").save({"step": SWITCH, "config": {}, "world_size": dist.get_world_size()})
    carried = ZeroState(folder / "carried" / name / name)
    held = [weakref.ref(thing) for thing in (engine, engine.optimizer, next(engine.module.parameters()))]
    release(engine)
    del engine
    gc.collect()
    return {
        "g_error": float((g_lm - expected).abs().max() / expected.square().mean().sqrt()),
        "varies": float((expected[0] - expected[1]).abs().max()),
        "adam_step": [source.adam_step, carried.adam_step],
        "not_carried": [f"{n} {key}" for n in carried.shapes for key in (WEIGHT, *MOMENTS)
                        if n in source.shapes and not torch.equal(carried.tensor(n, key), source.tensor(n, key))],
        "moments": sum(bool(source.tensor(n, MOMENTS[0]).any()) for n in carried.shapes if n in source.shapes),
        "held": sum(thing() is not None for thing in held),
    }  # fmt: skip


def frozen_run(folder: Path, stage: int, precision: str, held_out: np.ndarray) -> dict:
    config = configuration(folder / f"z{stage}", stage, precision, "norm")
    config = with_train(
        config, freeze_g=FreezeConfig(at_step=SWITCH, sequences=12), keep_checkpoints=2, checkpoint_every=6
    )
    straight = run(config, held_out).points
    checkpoints = folder / f"z{stage}" / "checkpoints"
    before = run(config, held_out, resume_from=checkpoints / checkpoint_name(SWITCH)).points
    after = run(config, held_out, resume_from=checkpoints / checkpoint_name(SWITCH + 1)).points
    other = with_train(configuration(folder / f"z{stage}-to", 4 - stage if stage else 1, precision, "norm"),
                       freeze_g=config.train.freeze_g)  # fmt: skip
    moved = run(other, held_out, resume_from=checkpoints / checkpoint_name(SWITCH + 1)).points
    first = checkpoint_name(SWITCH + 1)
    g_lm = ZeroState(checkpoints / first / first).buffers["g_lm"]
    return {
        "straight": straight, "before": before, "after": after, "moved": moved,
        "switch": switch(config, folder / f"z{stage}", g_lm),
        "saved": {step: saved_model(folder / f"z{stage}", step) for step in (SWITCH, SWITCH + 1, 6)},
    }  # fmt: skip


def main() -> None:
    folder, stages, precision = Path(sys.argv[1]), [int(s) for s in sys.argv[2].split(",")], sys.argv[3]
    torch.set_num_threads(1)
    init_distributed(120)
    held_out = np.random.default_rng(99).integers(4, 67, size=(9, 17))
    results = {stage: frozen_run(folder, stage, precision, held_out) for stage in stages}
    by_order = with_train(configuration(folder / "order", 1, precision, "norm"), validate_every=1,
                          freeze_g=FreezeConfig(below=1e9, evaluations=2, sequences=8))  # fmt: skip
    config = with_train(configuration(folder / "trained", 1, precision, "norm"), keep_checkpoints=9,
                        freeze_g=FreezeConfig(at_step=SWITCH, sequences=12, become="parameter"))  # fmt: skip
    trained = run(config, held_out).points
    last = folder / "trained" / "checkpoints" / checkpoint_name(SWITCH + 1)
    again = run(config, held_out, resume_from=last).points
    state = ZeroState(last / last.name)
    results["trained"] = {
        "points": trained, "again": again, "model": model_of(verify(last))["g_source"],
        "g": [n for n in state.shapes if n.endswith("plga.G_LM")],
        "moved": bool(state.tensor("layers.0.attention.plga.G_LM", MOMENTS[0]).any()),
    }  # fmt: skip
    results["by_order"] = run(by_order, held_out).points
    finish(folder, results)


if __name__ == "__main__":
    main()
