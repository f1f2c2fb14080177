"""`python -m pipeline.inference.hf.selfcheck DIR EXPECTED`: does stock transformers compute what our model does?

A fresh process loads the directory as anybody would, with its own code and without our plugin, and compares it with what
expectation.py left in the folder EXPECTED. It leaves its result there, and `check_export` judges it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

import pipeline
from pipeline.errors import UserError, first_line
from pipeline.inference.hf.expectation import EMBEDDING, EXACT, Expectation

RESULT = "result.json"
MAX_DIFFERENCE = 1e-5  # of logits, in units of the largest logit if that is above 1; or twice our own model's rounding
MAX_EXACT = 1e-8  # of logits in fp64, in the same units: what is left is no rounding
MAX_HELD = 1.01  # of the files' bytes: weights stay as small as they were stored
MAX_SHARE = 1e-3  # of texts whose ids or decoded text differ


def check_export(
    folder: Path, expected: Expectation, logits: dict[str, Tensor], *, rounded: bool = False, stored_bytes: int
) -> dict[str, Any]:
    """The numbers of the self-check. rounded: the weights are of a smaller type, so both sides compute in fp32 with the rounded
    ones, and what the directory's own dtype does is measured beside it (int8 weights are computed with in fp32 anyhow).
    stored_bytes: of the files' tensors, and the model may not take more.

    Raises UserError when the directory does not load, or differs.
    """
    with tempfile.TemporaryDirectory(prefix="pldr-selfcheck-") as temporary:
        work = Path(temporary)
        save_file(logits, work / "logits.safetensors")
        (work / "expected.json").write_text(
            json.dumps({**expected.to_dict(), "rounded": rounded, "stored_bytes": stored_bytes})
        )
        root = str(Path(pipeline.__file__).resolve().parents[1])
        path = os.pathsep.join(part for part in (root, os.environ.get("PYTHONPATH", "")) if part)
        quiet = {"HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(work / "modules"), "TRANSFORMERS_VERBOSITY": "error"}
        command = [sys.executable, "-m", "pipeline.inference.hf.selfcheck", str(folder.resolve()), str(work)]
        done = subprocess.run(
            command,
            env={**os.environ, **quiet, "PYTHONPATH": path},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
        )
        if done.returncode:
            lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
            raise UserError(f"the export does not work in a fresh process: {lines[-1][:300]}; nothing was written")
        result: dict[str, Any] = json.loads((work / RESULT).read_text())
    if problem := _problem(result):
        raise UserError(
            f"the export differs from the model: {problem}; nothing was written", details={"selfcheck": result}
        )
    return result


def _problem(result: dict[str, Any]) -> str | None:
    logits, greedy, tokenizer = result["logits"], result["greedy"], result["tokenizer"]
    if not logits["finite"]:
        return "its logits are not finite"
    allowed = max(MAX_DIFFERENCE * max(1.0, logits["largest"]), 2 * result["rounding"])
    if logits["difference"] > allowed:
        return f"logits by {logits['difference']:.2g} (largest logit {logits['largest']:.2g}, allowed {allowed:.2g})"
    if result["exact"] > MAX_EXACT * max(1.0, logits["largest"]):
        return f"logits in fp64 by {result['exact']:.2g}"
    if result["eager"] > allowed:
        return f"logits with attention 'eager' by {result['eager']:.2g}"
    if result["held_bytes"] > MAX_HELD * result["stored_bytes"]:
        return f"weights take {result['held_bytes']:,} bytes in memory, and {result['stored_bytes']:,} in the files"
    if not result["embedding"]:
        return "vectors of tokens"
    if result["settings"]:
        return f"{', '.join(result['settings'])} of the configuration, of generation or of the tokenizer"
    if greedy["equal"] != greedy["prompts"] and greedy["gap"] > 2 * allowed:
        return f"greedy tokens of {greedy['prompts'] - greedy['equal']} of {greedy['prompts']} prompts"
    for what in ("other_ids", "other_text"):
        if tokenizer[what] > MAX_SHARE * tokenizer["texts"]:
            return f"the tokenizer on {tokenizer[what]} of {tokenizer['texts']} texts, first {tokenizer['first']!r}"
    if "native" in result and not result["native"]["finite"]:
        return "logits in the directory's own dtype are not finite"
    return None


def measure(folder: str, expected: dict[str, Any], logits: dict[str, Tensor]) -> dict[str, Any]:
    """What `check_export` judges, in this process."""
    import tokenizers
    import transformers

    model = _load(folder, torch.float32)
    if not type(model).__module__.startswith("transformers_modules."):
        raise UserError(f"{folder}: transformers did not use the directory's own code but {type(model).__module__}")
    result: dict[str, Any] = {
        "logits": _compare_logits(model, expected["sequences"], logits),
        "greedy": _compare_greedy(model, expected),
        "tokenizer": _compare_tokenizer(folder, expected),
        "settings": [
            name
            for name, value in settings_of(model, _load_tokenizer(folder)).items()
            if value != expected["settings"][name]
        ],
        "rounding": expected["rounding"],
        "stored_bytes": expected["stored_bytes"],
        "versions": {
            "python": sys.version.split()[0],
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "tokenizers": tokenizers.__version__,
        },
    }
    with torch.inference_mode():
        vectors = model.get_input_embeddings()(torch.arange(len(logits[EMBEDDING])))
        result["embedding"] = bool(torch.equal(vectors, logits[EMBEDDING]))
        last = str(len(expected["sequences"]) - 1)
        result["held_bytes"] = held_bytes(model)
        model.set_attn_implementation("eager")
        eager = model(torch.tensor(expected["sequences"][-1:])).logits[0]
        model.set_attn_implementation("sdpa")
        exact = _widen(model)(torch.tensor(expected["sequences"][-1:])).logits[0]
    result["exact"] = float((exact - logits[EXACT]).abs().max().nan_to_num(nan=float("inf")))
    result["eager"] = float((eager - logits[last]).abs().max().nan_to_num(nan=float("inf")))
    del model
    if expected["rounded"]:
        native = _load(folder, "auto")
        result["native"] = _compare_logits(native, expected["sequences"], logits)
        result["held_bytes"] = held_bytes(native)
    return result


def held_bytes(model: Any) -> int:
    """Bytes of a model's weights as they are in memory; of a packed one, those of its parts."""
    parts = [
        part
        for tensor in (*model.parameters(), *model.buffers())
        for part in (
            [getattr(tensor, name) for name in tensor.__tensor_flatten__()[0]] if _packed(tensor) else [tensor]
        )
    ]
    return sum(part.nbytes for part in parts)


def _packed(tensor: Tensor) -> bool:
    return is_traceable_wrapper_subclass(tensor)


def _widen(model: Any) -> Any:
    """The same model, computing in fp64; int8 weights stay as they are, and `model.double()` does not take them."""
    for tensor in (*model.parameters(), *model.buffers()):
        if not _packed(tensor) and tensor.is_floating_point():
            tensor.data = tensor.data.double()
    return model


def _load(folder: str, dtype: Any) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype=dtype).eval()


def _load_tokenizer(folder: str) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder, trust_remote_code=True)  # else transformers asks: it reads config.json


def settings_of(model: Any, tokenizer: Any) -> dict[str, Any]:
    """What decoding does by default: ids as the configuration, generation and the tokenizer have them, and the context."""
    config, generation = model.config, model.generation_config
    return {
        **{
            name: [getattr(config, name), getattr(generation, name), getattr(tokenizer, name)]
            for name in ("eos_token_id", "pad_token_id")
        },
        "bos_token_id": generation.bos_token_id,
        "context": [config.max_position_embeddings, tokenizer.model_max_length],
        "do_sample": bool(generation.do_sample),
        "padding_side": tokenizer.padding_side,
    }


@torch.inference_mode()
def _compare_logits(model: Any, sequences: list[list[int]], logits: dict[str, Tensor]) -> dict[str, Any]:
    """difference: largest of all; top1: share of positions with the same best token."""
    pairs = [(model(torch.tensor([ids])).logits[0].float(), logits[str(i)]) for i, ids in enumerate(sequences)]
    finite = all(bool(theirs.isfinite().all() and ours.isfinite().all()) for theirs, ours in pairs)
    same = sum(int((theirs.argmax(-1) == ours.argmax(-1)).sum()) for theirs, ours in pairs)
    return {
        "difference": max(float((theirs - ours).abs().max()) for theirs, ours in pairs) if finite else None,
        "largest": max(float(ours.abs().max()) for _, ours in pairs) if finite else None,
        "top1": same / sum(map(len, sequences)),
        "finite": finite,
    }


@torch.inference_mode()
def _compare_greedy(model: Any, expected: dict[str, Any]) -> dict[str, Any]:
    """gap: where tokens differ first, by how much the logit of the chosen one is above that of ours; the largest of all
    prompts. Up to what rounding does to both, it is a tie."""
    equal, tokens, gap = 0, 0, 0.0
    for prompt, ours in zip(expected["prompts"], expected["greedy"], strict=True):
        ids = torch.tensor([prompt])
        count = expected["max_new_tokens"]
        out = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=count)
        theirs = out[0, len(prompt) :].tolist()
        equal += theirs == ours
        tokens += len(ours)
        differ = [i for i, (a, b) in enumerate(zip(theirs, ours, strict=False)) if a != b]
        if differ:
            first = differ[0]
            scores = model(out[:, : len(prompt) + first]).logits[0, -1]
            gap = max(gap, float(scores[theirs[first]] - scores[ours[first]]))
        elif len(theirs) != len(ours):
            gap = float("inf")
    return {"prompts": len(expected["prompts"]), "equal": equal, "tokens": tokens, "gap": gap}


def _compare_tokenizer(folder: str, expected: dict[str, Any]) -> dict[str, Any]:
    tokenizer = _load_tokenizer(folder)
    texts, ids = expected["texts"], expected["ids"]
    found = tokenizer(texts, add_special_tokens=True)["input_ids"]  # there are none to add
    decoded = [tokenizer.decode(one) for one in ids]
    other = [text for text, theirs, ours in zip(texts, found, ids, strict=True) if theirs != ours]
    other_text = [
        text for text, theirs, ours in zip(texts, decoded, expected["decoded"], strict=True) if theirs != ours
    ]
    first = next(iter([*other, *other_text]), None)
    return {
        "texts": len(texts),
        "other_ids": len(other),
        "other_text": len(other_text),
        "first": first if first is None else first[:80],
    }


def main(folder: str, work: str) -> None:
    """The fresh process."""
    expected = json.loads((Path(work) / "expected.json").read_text())
    try:
        result = measure(folder, expected, load_file(Path(work) / "logits.safetensors"))
    except Exception as error:  # whatever transformers raises: its one line is the reason, after its traceback
        import traceback

        traceback.print_exc()
        sys.exit(f"{type(error).__name__}: {first_line(error)}")
    (Path(work) / RESULT).write_text(json.dumps(result))


if __name__ == "__main__":
    main(*sys.argv[1:])
