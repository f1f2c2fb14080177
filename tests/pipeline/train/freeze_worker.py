"""One rank of test_freeze.py. Usage: freeze_worker.py FOLDER STAGES PRECISION. Rank 0 writes FOLDER/result.json."""

import json
import sys
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from pipeline.checkpoints import checkpoint_name, model_of, verify
from pipeline.config import FreezeConfig
from pipeline.train.engine import init_distributed
from pipeline.zero_state import MOMENTS, WEIGHT, ZeroState

sys.path.insert(0, str(Path(__file__).parent))
from zero_worker import configuration, run, with_train

SWITCH = 4


def told(folder: Path, step: int) -> dict:
    """What a checkpoint is of: its parameters, its G, whether it is frozen."""
    checkpoint = folder / "checkpoints" / checkpoint_name(step)
    saved = verify(checkpoint)
    state = ZeroState(checkpoint / checkpoint.name)
    return {"frozen": saved["frozen"], "model": model_of(saved)["g_source"], "names": sorted(state.shapes),
            "has_g": "g_lm" in state.buffers, "budget": saved["budget"]}  # fmt: skip


def carried(folder: Path) -> bool:
    """Whether the step after the switch began at the weights and moments before it: with a learning rate that small that they
    do not move, they are what the whole model's checkpoint holds."""
    old, new = (ZeroState(folder / "checkpoints" / n / n) for n in map(checkpoint_name, (SWITCH, SWITCH + 1)))
    assert old.adam_step + 1 == new.adam_step
    return all(torch.allclose(old.tensor(n), new.tensor(n), rtol=0, atol=1e-9) for n in new.shapes) and any(
        new.tensor(n, MOMENTS[0]).any() and WEIGHT for n in new.shapes
    )


def frozen_run(folder: Path, stage: int, precision: str, held_out: np.ndarray) -> dict:
    config = configuration(folder / f"z{stage}", stage, precision, "norm")
    config = with_train(
        config, freeze_g=FreezeConfig(at_step=SWITCH, sequences=12), keep_checkpoints=9, checkpoint_every=6
    )
    straight = run(config, held_out).points
    checkpoints = folder / f"z{stage}" / "checkpoints"
    before = run(config, held_out, resume_from=checkpoints / checkpoint_name(SWITCH)).points
    after = run(config, held_out, resume_from=checkpoints / checkpoint_name(SWITCH + 1)).points
    other = with_train(configuration(folder / f"z{stage}-to", 4 - stage if stage else 1, precision, "norm"),
                       freeze_g=config.train.freeze_g)  # fmt: skip
    moved = run(other, held_out, resume_from=checkpoints / checkpoint_name(SWITCH + 1)).points
    still = with_train(configuration(folder / f"s{stage}", stage, precision, "norm"), max_lr=1e-12, keep_checkpoints=9,
                       freeze_g=config.train.freeze_g)  # fmt: skip
    run(still, held_out)
    return {
        "straight": straight, "before": before, "after": after, "moved": moved, "carried": carried(folder / f"s{stage}"),
        "saved": {step: told(folder / f"z{stage}", step) for step in (SWITCH, SWITCH + 1, 6)},
    }  # fmt: skip


def main() -> None:
    folder, stages, precision = Path(sys.argv[1]), [int(s) for s in sys.argv[2].split(",")], sys.argv[3]
    torch.set_num_threads(1)
    init_distributed(120)
    held_out = np.random.default_rng(99).integers(4, 67, size=(9, 17))
    results = {stage: frozen_run(folder, stage, precision, held_out) for stage in stages}
    calm = with_train(configuration(folder / "calm", 1, precision, "norm"), validate_every=1,
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
    results["calm"] = run(calm, held_out).points
    if dist.get_rank() == 0:
        (folder / "result.json").write_text(json.dumps(results))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
