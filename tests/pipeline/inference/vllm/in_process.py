"""An export in vLLM's `LLM`, run by vLLM's Python: FOLDER REQUEST_JSON OUT_JSON.

The request: `prompts` (lists of ids), `new` (tokens), `ranks`, `trust_remote_code`. Out: for each prompt, decoded with all
others and then alone, the new tokens and log-probabilities (in the batch the prompt's too); the model's module on each rank.
"""

import json
import operator
import sys
from pathlib import Path
from typing import Any

from vllm import LLM, SamplingParams


def of_tokens(rows: list[Any], ids: list[int]) -> list[float | None]:
    """Log-probabilities of these tokens from vLLM's rows of candidates."""
    return [None if row is None else row[token].logprob for row, token in zip(rows, ids, strict=True)]


def main() -> None:
    folder, request_path, out_path = sys.argv[1:]
    request = json.loads(Path(request_path).read_text())
    llm = LLM(
        folder,
        trust_remote_code=request["trust_remote_code"],
        model_impl="transformers",
        dtype="float32",
        enforce_eager=True,
        block_size=32,
        max_num_seqs=32,
        tensor_parallel_size=request["ranks"],
    )
    prompts = [{"prompt_token_ids": ids} for ids in request["prompts"]]
    greedy = {"temperature": 0, "max_tokens": request["new"], "logprobs": 0}
    batch = []
    for output in llm.generate(prompts, SamplingParams(**greedy, prompt_logprobs=0)):
        (new,) = output.outputs
        scores = of_tokens(output.prompt_logprobs, output.prompt_token_ids) + of_tokens(new.logprobs, new.token_ids)
        batch.append({"new": list(new.token_ids), "logprobs": scores})
    alone = []
    for prompt in prompts:
        ((new,),) = (output.outputs for output in llm.generate([prompt], SamplingParams(**greedy), use_tqdm=False))
        alone.append({"new": list(new.token_ids), "logprobs": of_tokens(new.logprobs, new.token_ids)})
    modules = llm.apply_model(operator.attrgetter("model.__class__.__module__"))  # of each rank; runs in the workers
    Path(out_path).write_text(json.dumps({"batch": batch, "alone": alone, "modules": modules}))


if __name__ == "__main__":
    main()
