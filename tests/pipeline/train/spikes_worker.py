"""One rank of tests/pipeline/train/test_spikes_ranks.py: a step that is not finite, and a spike that is rolled back.

Usage: spikes_worker.py FOLDER STAGES PRECISION. STAGES of ZeRO, with commas; `+` before one: roll back, too. Rank 0
writes FOLDER/result.json.
"""

import hashlib
import sys
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from pipeline.checkpoint.format import checkpoint_name, verify
from pipeline.config.load import parse_config
from pipeline.errors import UserError
from pipeline.train import step
from pipeline.train.engine import init_distributed
from pipeline.train.trainer import Trainer
from pldr_model.loss import total_loss
from tests.helpers.worker import finish
from tests.pipeline.train.zero_worker import Batches, configuration, make_trainer

BAD = 16  # the position of the third batch
SPIKE = 24 * 8  # of the 25th
SAVED = 22  # the step before it whose checkpoint is kept


class Shifted(Batches):
    """The same order, but from the checkpoint's position on it continues after the spike; remembers where it is."""

    here = -1

    def __init__(self, config, skip_from=None):
        super().__init__(config)
        self.skip_from = skip_from

    def micro_batches(self, position, *, limit):
        shift = 0 if self.skip_from is None else SPIKE + 8 - self.skip_from
        for micro, behind in super().micro_batches(position + shift, limit=limit):
            Shifted.here = behind - 8
            yield micro, behind - shift


HELD_OUT = np.random.default_rng(99).integers(4, 67, size=(9, 17))


def train(config, data, harm=None, resume_from=None):
    """What is logged, and the last state. harm(losses): the losses in place of the model's."""
    trainer = make_trainer(config, HELD_OUT, data=data, resume_from=resume_from)
    with harmed(harm or (lambda losses: losses)):
        return trainer.tracker.points, trainer.train()


@contextmanager
def harmed(harm):
    """Inside, the losses that a step sees are harm(those of total_loss)."""
    step.total_loss = lambda *arguments, **keywords: harm(total_loss(*arguments, **keywords))
    try:
        yield
    finally:
        step.total_loss = total_loss


class Watched(Trainer):
    """Notes for each step whether it left weights and moments as they were, and whether it was skipped."""

    def __init__(self, *arguments, **keywords):
        super().__init__(*arguments, **keywords)
        self.unchanged, self.skipped = [], []

    def optimize(self, micro_batches):
        before = weights_and_moments(self.engine)
        outcome = super().optimize(micro_batches)
        self.unchanged.append(before == weights_and_moments(self.engine))
        self.skipped.append(outcome.skipped)
        return outcome


def weights_and_moments(engine):
    """A hash of everything that this rank's part of a step changes."""
    optimizer = getattr(engine.optimizer, "optimizer", engine.optimizer)
    digest = hashlib.sha256()
    for parameter in engine.module.parameters():
        digest.update(getattr(parameter, "ds_tensor", parameter).detach().float().numpy().tobytes())
    for flat in getattr(engine.optimizer, "fp32_partitioned_groups_flat", []):
        digest.update(flat.detach().numpy().tobytes())
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            digest.update(parameter.detach().float().numpy().tobytes())
    for values in optimizer.state.values():
        for value in values.values():
            digest.update(torch.as_tensor(value).float().numpy().tobytes())
    return digest.hexdigest()


def skipped_step(folder, stage, precision, kind, limit=10):
    """What each step does to weights and moments when the third batch's loss or gradient is bad on rank 1 alone."""
    config = configuration(folder, stage, precision, "value" if stage == 2 else "norm")
    config = config.model_copy(update={"train": config.train.model_copy(update={"max_skipped_steps": limit})})

    def harm(losses):
        if Shifted.here != BAD or dist.get_rank() != 1:
            return losses
        if kind == "gradient":
            losses.total.register_hook(lambda gradient: gradient * torch.inf)
            return losses
        return replace_losses(losses, torch.inf)

    trainer = make_trainer(config, HELD_OUT, data=Shifted(config), make=Watched)
    message, result = None, {}
    try:
        with harmed(harm):
            state, points = trainer.train(), trainer.tracker.points
        result = {"points": points, "skipped_steps": state.skipped_steps, "budget": points[6]["invariance/budget"]}
    except UserError as error:
        message = str(error)
    everyone = [None] * dist.get_world_size()
    seen = {"unchanged": trainer.unchanged, "skipped": trainer.skipped, "message": message}
    dist.all_gather_object(everyone, seen)
    return {**result, "ranks": everyone}


def replace_losses(losses, factor):
    return losses._replace(total=losses.total * factor, cross_entropy=losses.cross_entropy * factor)


def rolled_back(folder, stage, precision):
    """A batch whose loss is ten times too high: the run that meets it, the same run killed after the rollback, and one that
    never met it but continued after it from the same checkpoint."""

    def settings(name, **train_keys):
        tree = configuration(folder / name, stage, precision, "norm").as_dict()
        tree["train"] |= {
            "steps": 30,
            "checkpoint_every": 11,
            "spike_window": 20,
            "validate_every": 30,
            "keep_checkpoints": 9,
            **train_keys,
        }
        return parse_config(tree, where="test")

    def harm(losses):
        return replace_losses(losses, 10.0) if Shifted.here == SPIKE else losses

    config = settings("run", on_spike="rollback")
    points, state = train(config, Shifted(config), harm)
    saved = folder / "run" / "checkpoints" / checkpoint_name(SAVED)
    again, _ = train(config, Shifted(config), harm, resume_from=saved)
    warned, warned_state = train(settings("warn"), Shifted(settings("warn")), harm)
    stopped = settings("stop", on_spike="stop")
    try:
        train(stopped, Shifted(stopped), harm)
        message = None
    except UserError as error:
        message = str(error)
    other = settings("other")
    behind, _ = train(other, Shifted(other, skip_from=SAVED * 8), resume_from=saved)
    last = verify(folder / "run" / "checkpoints" / checkpoint_name(30))
    return {
        "points": points, "again": again, "behind": behind, "warned": warned, "stopped": message,
        "consumed": state.sequences_consumed, "guard": last["guard"], "warned_spikes": warned_state.guard.spikes,
    }  # fmt: skip


def main() -> None:
    folder, stages, precision = Path(sys.argv[1]), sys.argv[2].split(","), sys.argv[3]
    torch.set_num_threads(1)
    init_distributed(120)
    results = {}
    for wanted in stages:
        stage = int(wanted)
        for kind in ("loss", "gradient"):
            results[f"{stage}-{kind}"] = skipped_step(folder / f"{kind}{stage}", stage, precision, kind)
        if wanted.startswith("+"):
            results[f"{stage}-rollback"] = rolled_back(folder / f"back{stage}", stage, precision)
    results["limit"] = skipped_step(folder / "limit", int(stages[-1]), precision, "loss", limit=1)
    finish(folder, results)


if __name__ == "__main__":
    main()
