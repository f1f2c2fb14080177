"""Run as a script, one process a rank: trains a tiny PLDR-LLM for two steps under DeepSpeed at each of several stages,
commits a checkpoint of each, and writes down what its weights are. `python checkpoint_writer.py OUT CASE...`, a case being
`precision-stage`; ranks and rendezvous come from the environment."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import save_file

from pipeline.checkpoint import load
from pipeline.checkpoint.save import Saver
from pipeline.config.run import RunConfig
from pipeline.train.engine import build_engine, init_distributed, set_learning_rate
from pldr_model.config import ModelConfig
from pldr_model.loss import cross_entropy
from pldr_model.model import PLDRModel

MODEL = ModelConfig(
    vocab_size=40, num_layers=2, num_heads=2, head_dim=6, context_length=16, A_dff=5, num_reslayerA=2, num_denseA=1
)


def main(out: Path, cases: list[str]) -> None:
    torch.set_num_threads(1)
    init_distributed(60.0)
    for case in cases:
        precision, stage = case.split("-")
        config = RunConfig.model_validate(
            {
                "name": "t",
                "run_dir": "r",
                "data": {"sources": [{"url": "x"}]},
                "model": MODEL.to_dict(),
                "train": {
                    "steps": 4,
                    "warmup_steps": 0,
                    "global_batch": 2,
                    "micro_batch": 2 // dist.get_world_size(),
                    "precision": precision,
                    "zero_stage": int(stage),
                },
            }
        )
        torch.manual_seed(1)
        engine = build_engine(PLDRModel(MODEL), config.train, dist.get_world_size())
        load.make_safe(engine)
        for step in range(2):
            ids = torch.randint(4, 40, (1, 17), generator=torch.Generator().manual_seed(10 * step + dist.get_rank()))
            loss = cross_entropy(engine(ids[:, :-1], padded=False), ids[:, 1:])
            set_learning_rate(engine, 1e-2)
            engine.backward(loss)
            engine.step()
        folder = out / case
        state = {
            "step": 2,
            "sequences_consumed": 4,
            "tokens_consumed": 64,
            "budget": 0.25,
            "frozen": None,
            "config": config.as_dict(),
            "data_fingerprint": "f00d",
            "tokenizer_sha256": "7e57",
            "mlflow_run_id": "run",
            "world_size": dist.get_world_size(),
        }
        Saver(engine, folder).save(state)
        import deepspeed

        parameters = list(engine.module.parameters())
        with deepspeed.zero.GatheredParameters(parameters, enabled=stage == "3"):
            if dist.get_rank() == 0:
                live = {name: p.detach().clone().contiguous() for name, p in engine.module.named_parameters()}
                save_file(live, folder / "live.safetensors")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    main(Path(sys.argv[1]), sys.argv[2:])
