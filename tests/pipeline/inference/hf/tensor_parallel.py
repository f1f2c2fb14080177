"""One rank of an export under `tp_plan="auto"`: FOLDER PROMPTS_JSON OUT_FOLDER NEW."""

import json
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
import transformers

folder, prompts, out, new = sys.argv[1:]
dist.init_process_group("gloo")
# The stock way; it asks for accelerators otherwise.
model = transformers.AutoModelForCausalLM.from_pretrained(
    folder, trust_remote_code=True, tp_plan="auto", dtype=torch.float32
)
texts = []
for prompt in json.loads(Path(prompts).read_text()):
    ids = torch.tensor([prompt])
    with torch.no_grad():
        whole = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=int(new), do_sample=False)
    texts.append(whole[0, len(prompt) :].tolist())
weight = model.model.layers[0].self_attn.q_proj.weight
local = weight.to_local() if hasattr(weight, "to_local") else weight
heads = local.shape[0] // model.config.qk_head_dim
rank = os.environ["RANK"]
(Path(out) / f"rank{rank}.json").write_text(json.dumps({"new": texts, "heads": heads}))
dist.barrier()
dist.destroy_process_group()
