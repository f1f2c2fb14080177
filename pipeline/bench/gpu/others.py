"""Beside ours on the same device: stock transformers on the export, and the reference implementation's own loop."""

from __future__ import annotations

import logging
import statistics
import sys
import time
from collections.abc import Iterator
from functools import partial
from itertools import pairwise
from typing import Any

import torch

from pipeline.bench.gpu.setting import Setting
from pipeline.bench.rounds import in_rounds, wait
from pldr_model.model import PLDRModel, g_shape

Found = Iterator[dict[str, Any]]

BATCHES = 2  # of the setting's
REFERENCE_PROMPT = 16


def transformers_export(setting: Setting) -> Found:
    """`PldrForCausalLM.generate`, greedy, in bf16, with both of its caches."""
    # As `pipeline.inference.hf.load.build_model`, which imports more than a bare machine has.
    from pipeline.inference.hf.modeling_pldr import PldrForCausalLM
    from pipeline.inference.hf.names import to_hf
    from pipeline.inference.hf.sizes import hf_config

    config = setting.config.with_constant_g()
    source = PLDRModel(config, g_lm_LHKK=torch.randn(g_shape(config)) / config.head_dim**0.5)
    model: Any = PldrForCausalLM(hf_config(config, uncertified=None, dtype="bf16"))  # type: ignore[no-untyped-call]
    model.load_state_dict(to_hf(source.state_dict(), config))
    model = model.to(setting.device, torch.bfloat16).eval()
    new = 2 * setting.steps
    for batch in setting.batches[:BATCHES]:
        ids_BS = torch.randint(4, config.vocab_size, (batch, setting.length), device=setting.device)
        for cache in ("dynamic", "static"):
            run = partial(
                model.generate,
                ids_BS,
                attention_mask=torch.ones_like(ids_BS),
                max_new_tokens=new,
                min_new_tokens=new,
                do_sample=False,
                cache_implementation=cache,
            )
            run()
            times = in_rounds({"run": run}, setting.rounds, setting.device)["run"].seconds
            yield {
                "what": "transformers",
                "form": "bf16",
                "cache": cache,
                "batch": batch,
                "prompt": setting.length,
                "new": new,
                "tokens_per_second": batch * new / statistics.median(times),
            }


class _Ids:
    """In the place of its data preparation: ids for text. Its loop drops the last id of a prompt."""

    def __init__(self, ids: list[int]) -> None:
        self._ids, self.tokenizer = ids, self

    def tokenize(self, text: str) -> list[int]:
        return [*self._ids, -1] if text else [-1, -1]  # no id is the end

    def detokenize(self, ids: torch.Tensor) -> list[int]:
        found: list[int] = ids.tolist()
        return found


def reference_loop(setting: Setting) -> Found:
    """`generate_text` of its `dist_pldr_model_e2e`, with KV- and G-cache, in fp32, at batch 1, its own top-1 sampling included;
    and its model's forward pass with an argmax, without the loop's other work.

    `--reference` is a folder with its `src/` and, where they are not installed, the packages `torchtune` (its rotary embedding)
    and `keras` (imported, and not used to generate).
    """
    if setting.reference is None:
        yield {"what": "reference", "left_out": "give --reference, a folder with its src/"}
        return
    source = setting.reference / "src"
    sys.path[:0] = [str(setting.reference), str(source / "pldr_model_v510"), str(source)]
    import pldr_run_model_v510 as theirs  # type: ignore[import-not-found]

    theirs.logger.setLevel(logging.ERROR)
    config = setting.config
    sizes = {
        "num_layers": config.num_layers,
        "d_model": config.d_model,
        "num_heads": config.num_heads,
        "dff": config.feed_forward_size,
        "num_reslayerA": config.num_reslayerA,
        "num_denseA": config.num_denseA,
        "A_dff": config.A_dff,
        "input_vocab_size": config.vocab_size,
        "max_seq_len": config.context_length,
        "activation": torch.nn.functional.silu,
        "save_type": "torch",
    }
    prompt = torch.randint(4, config.vocab_size, (REFERENCE_PROMPT,)).tolist()
    e2e = theirs.dist_pldr_model_e2e(0, 1, _Ids(prompt), hpdict=sizes, device=setting.device.type, is_train=False)
    for name, steps in (("loop", _loop_steps), ("forward", _forward_steps)):
        steps(setting, e2e, prompt)
        seconds = statistics.median(steps(setting, e2e, prompt))
        yield {"what": "reference", "of": name, "form": "fp32", "batch": 1, "tokens_per_second": 1 / seconds}


def _loop_steps(setting: Setting, e2e: Any, prompt: list[int]) -> list[float]:
    """Seconds of each cached step of its loop, from one forward pass to the next."""
    starts: list[float] = []

    def mark(*_: object) -> None:
        wait(setting.device)
        starts.append(time.perf_counter())

    hook = e2e.pldr_model.register_forward_pre_hook(mark)
    e2e.generate_text("x", temperature=1.0, top_k=1, max_length=2 * setting.steps)
    hook.remove()
    return [after - before for before, after in pairwise(starts[1:])]


def _forward_steps(setting: Setting, e2e: Any, prompt: list[int]) -> list[float]:
    model = e2e.pldr_model.eval()
    ids_1S = torch.tensor([prompt], device=setting.device)
    logits, _, attention, kv = model([ids_1S, e2e.create_masks(ids_1S)])
    g = [[layer[0], layer[4]] for layer in attention]
    seconds = []
    for _ in range(2 * setting.steps):
        started = time.perf_counter()
        logits, _, _, kv = model([logits[:, -1:].argmax(-1), None], kvcachelst=kv, Gcachelst=g)
        wait(setting.device)
        seconds.append(time.perf_counter() - started)
    return seconds
