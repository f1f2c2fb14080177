"""One rank of tests/pipeline/train/test_mean.py: gradients, losses and validations on unevenly padded sequences, in fp64; and
gradients accumulated in bf16 runs.

Usage: mean_worker.py FOLDER STAGES PRECISION. STAGES of ZeRO, with commas: rank 0 writes the gradient of a step at each to
FOLDER/gradient-STAGE.pt, that of one over packed sequences to FOLDER/packed-STAGE.pt, and to FOLDER/result.json by micro batch
what short runs log, and by stage the error of bf16. Stage 3 refuses fp64: plain attention, whose gradient is well-conditioned,
in fp32.
"""

import dataclasses
import sys
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from deepspeed.utils import safe_get_full_grad

from pipeline.train.engine import build_engine, init_distributed
from pipeline.train.freeze import mean_g
from pipeline.train.signals import StopRequest
from pipeline.train.step import global_step
from pipeline.train.telemetry import Stopwatch
from pldr_model import layers
from pldr_model.model import PLDRModel
from tests.helpers.worker import finish
from tests.pipeline.train import packed
from tests.pipeline.train.zero_worker import Batches, configuration, make_trainer, with_train

CPU = torch.device("cpu")
DAG = (0.01, 0.0, 0.02)
OF_ANOTHER = ("batch", "neighbor")  # train.g_from
Z_LOSS = 0.05  # of the gradients


def padded_rows(rng, count, width):
    """Rows of 1 to width - 1 targets, very unevenly; the first has no target at all."""
    rows = rng.integers(4, 67, size=(count, width))
    lengths = np.concatenate([[1], (2 + (width - 2) * rng.random(count - 1) ** 3).astype(int)])
    rows[np.arange(width) >= lengths[:, None]] = 0
    return rows


class Padded(Batches):
    """Global batches of padded rows that follow from their position alone; a rank's micro batches are consecutive."""

    def global_batch(self, position):
        train, model = self.config.train, self.config.model
        return padded_rows(np.random.default_rng(position), train.global_batch, model.context_length + 1)

    def micro_batches(self, position, *, limit):
        size, rank, world = self.config.train.micro_batch, dist.get_rank(), dist.get_world_size()
        for _ in range(limit):
            batch = self.global_batch(position)
            position += len(batch)
            yield list(batch.reshape(world, -1, size, batch.shape[1])[rank]), position


def held_out():
    """Sequence 0 lends its G; 7 are scored, which neither 2 ranks nor micro batches of 2 or 4 divide."""
    return padded_rows(np.random.default_rng(99), 8, 17)[::-1].copy()


def settings(folder, stage, *, learned=None, **train):
    learned = stage != 3 if learned is None else learned
    config = configuration(folder, stage, "fp32", "norm", "learned" if learned else "identity")
    dag = DAG if learned else (0.0, 0.0, 0.0)
    model = dataclasses.replace(config.model, dag_coefficients=dag)
    return with_train(config.model_copy(update={"model": model}), **train)


def gradient(config, data=Padded):
    """The gradient of the first step, by parameter, after accumulation and the mean over ranks."""
    torch.manual_seed(config.seed)
    engine = build_engine(PLDRModel(config.model), config.train, dist.get_world_size())
    found, step = {}, engine.step

    def watched():
        if engine.is_gradient_accumulation_boundary():
            found.update({name: safe_get_full_grad(p).clone() for name, p in engine.module.named_parameters()})
        step()

    engine.step = watched
    micro, _ = next(data(config).micro_batches(0, limit=1))
    outcome = global_step(
        engine,
        micro,
        config.model,
        z_loss=config.train.z_loss,
        g_from=config.train.g_from,
        stop=StopRequest(),
        device=CPU,
        forward=Stopwatch(CPU),
    )
    return {"gradient": found, "loss": outcome.loss, "targets": outcome.targets}


class Empty(Padded):
    """The second batch is nothing but padding."""

    def global_batch(self, position):
        return super().global_batch(position) * (position != 8)


class Unpadded(Padded):
    def global_batch(self, position):
        return np.random.default_rng(position).integers(4, 67, size=(self.config.train.global_batch, 17))


def bf16_error(folder, stage, *, accumulation):
    """How far the accumulated gradient of a bf16 run is from the mean, in fp64, of the gradients of its micro batches."""
    config = configuration(folder, stage, "bf16", "norm", "identity")
    config = with_train(config, micro_batch=1, global_batch=accumulation * dist.get_world_size())
    torch.manual_seed(config.seed)
    torch.set_default_dtype(torch.float32)
    model = PLDRModel(config.model).bfloat16()
    ids = torch.from_numpy(Unpadded(config).global_batch(0))
    right = {name: torch.zeros(p.shape, dtype=torch.float64) for name, p in model.named_parameters()}
    for micro in ids.split(1):
        model.zero_grad()
        model(micro[:, :-1], targets=micro[:, 1:], padded=False).loss.backward()
        for name, p in model.named_parameters():
            right[name] += p.grad.double() / len(ids)
    found = gradient(config, Unpadded)["gradient"]
    off = sum((found[name].double() - right[name]).square().sum() for name in right)
    return (off / sum(g.square().sum() for g in right.values())).sqrt().item()


def main() -> None:
    folder, stages = Path(sys.argv[1]), [int(s) for s in sys.argv[2].split(",") if s]
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    init_distributed(120)
    reduced = [*get_accelerator().supported_dtypes(), torch.float64]  # without ZeRO DeepSpeed refuses fp64 gradients
    get_accelerator().supported_dtypes = lambda: reduced
    results = {}
    for micro in (1, 2, 4, 8):
        if micro * dist.get_world_size() <= 8:
            config = settings(folder / f"m{micro}", 0, micro_batch=micro, steps=3, validate_every=1, checkpoint_every=3)
            trainer = make_trainer(config, held_out(), data=Padded(config))
            trainer.train()
            results[micro] = trainer.tracker.points
    batch = Padded(config).global_batch(0)  # of the last of those runs, all of whose weights are on every rank
    micro, _ = next(Padded(config).micro_batches(0, limit=1))
    g_lm = trainer.engine.module.compute_g(torch.from_numpy(batch[:, :-1])).mean(dim=1)
    results["mean_g"] = (mean_g(trainer.engine, config.model, [micro]) - g_lm).norm().item() / g_lm.norm().item()
    results["packed"] = packed.results(trainer)
    config = settings(folder / "empty", 1, steps=3, validate_every=3, checkpoint_every=3)
    trainer = make_trainer(config, held_out(), data=Empty(config))
    state = trainer.train()
    results["empty"] = {"points": trainer.tracker.points, "events": state.guard.events}
    for stage in stages:
        torch.set_default_dtype(torch.float32 if stage == 3 else torch.float64)
        found = gradient(settings(folder, stage, micro_batch=2, z_loss=Z_LOSS))
        if dist.get_rank() == 0:
            torch.save(found, folder / f"gradient-{stage}.pt")
        found = gradient(
            with_train(configuration(folder, stage, "fp32", "norm", "random"), micro_batch=2), packed.Packed
        )
        if dist.get_rank() == 0:
            torch.save(found, folder / f"packed-{stage}.pt")
        for g_from in OF_ANOTHER:
            found = gradient(settings(folder, stage, learned=True, micro_batch=2, g_from=g_from))
            if dist.get_rank() == 0:
                torch.save(found, folder / f"gradient-{stage}-{g_from}.pt")
        results[f"bf16-{stage}"] = bf16_error(folder, stage, accumulation=16)
    finish(folder, results)


if __name__ == "__main__":
    layers.LEAN_FROM = 0  # as in a large model; the test's own gradients are autograd's
    main()
