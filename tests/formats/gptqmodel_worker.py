"""Runs inside the environment of GPTQModel, which has none of ours: logits of given tokens.

Arguments: ``gptqmodel`` or ``transformers``, the model folder, the dtype, JSON of lists of token numbers, a file for
the logits, and how many tokens to write behind each list. Prints one JSON line: how many it wrote.
"""

import json
import os
import sys

os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")  # the default dies on two cores

if __name__ == "__main__":
    import torch

    reader, folder, dtype, prompts, target, count = sys.argv[1:]
    if reader == "gptqmodel":
        from gptqmodel import BACKEND, GPTQModel

        model = GPTQModel.load(folder, device="cpu", backend=BACKEND.GPTQ_TORCH, dtype=getattr(torch, dtype)).model
    else:
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype), device_map="cpu")
    tokens = torch.tensor(json.loads(prompts))
    written = []
    with torch.no_grad():
        torch.save(model(tokens).logits.float(), target)
        if int(count):
            lengths = {"max_new_tokens": int(count), "min_new_tokens": int(count)}
            rows = [model.generate(row[None], do_sample=False, **lengths) for row in tokens]
            written = [row.shape[1] - tokens.shape[1] for row in rows]
    sys.stdout.write("\nRESULT " + json.dumps(written) + "\n")
