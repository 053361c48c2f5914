"""AutoRound: signed gradient descent on roundings and ranges, block by block, into its own packed checkpoint."""

from pathlib import Path

from handover import run
from safetensors.torch import load_file

import torch  # isort: skip
from auto_round import AutoRound
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer


def quantize(job, tokens):
    """Run it on batches of the windows."""
    settings = dict(job["settings"])
    model = AutoModelForCausalLM.from_pretrained(job["model"], dtype="auto")
    tokenizer = AutoTokenizer.from_pretrained(job["model"])
    rows = [{"input_ids": row, "attention_mask": torch.ones_like(row)} for row in tokens]
    rounder = AutoRound(
        model,
        tokenizer=tokenizer,
        scheme="W4A16",
        bits=job["bits"],
        group_size=job["group_size"],
        dataset=DataLoader(rows, batch_size=settings.get("batch_size", 8), shuffle=False),
        nsamples=len(tokens),
        seqlen=tokens.shape[1],
        device_map="cpu",
        **settings,
    )
    rounded, _ = rounder.quantize()
    values = {  # packing takes them out
        f"{name}.weight": module.weight.detach().clone()
        for name, module in rounded.named_modules()
        if hasattr(module, "scale")
    }
    rounder.save_quantized(job["packed"], format="auto_round:gptqmodel", inplace=True)
    return values


def unpack(job, values):
    """The values that it rounded to, and what its checkpoint has for each."""
    tensors = load_file(str(next(Path(job["packed"]).rglob("model.safetensors"))))
    for name, value in values.items():
        stem = name.removesuffix("weight")
        yield name, value, [tensors[stem + part] for part in ("qweight", "scales", "qzeros")]


run(quantize, unpack, ["auto-round"])
