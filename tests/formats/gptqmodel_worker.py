"""Runs inside the environment of GPTQModel, which has none of ours: logits of given tokens.

Arguments: ``gptqmodel`` or ``transformers``, the model folder, the dtype, JSON of lists of token numbers, a file for
the logits.
"""

import json
import os
import sys

os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")  # the default dies on two cores

if __name__ == "__main__":
    import torch

    reader, folder, dtype, prompts, target = sys.argv[1:]
    if reader == "gptqmodel":
        from gptqmodel import BACKEND, GPTQModel

        model = GPTQModel.load(folder, device="cpu", backend=BACKEND.GPTQ_TORCH, dtype=getattr(torch, dtype)).model
    else:
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype), device_map="cpu")
    with torch.no_grad():
        logits = model(torch.tensor(json.loads(prompts))).logits
    torch.save(logits.float(), target)
