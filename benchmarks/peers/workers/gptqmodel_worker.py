"""GPTQModel: GPTQ into its second format, which stores zero points as they are, unpacked by its own plain linear."""

import os

os.environ["GPTQMODEL_CPU_WORKERS"] = "2"  # it does not start with one

from handover import run

import torch  # isort: skip
from gptqmodel import BACKEND, GPTQModel, QuantizeConfig
from gptqmodel.quantization import FORMAT


def quantize(job, tokens):
    """Run it and save what it made; its windows are lists of token ids."""
    config = QuantizeConfig(
        bits=job["bits"], group_size=job["group_size"], device="cpu", format=FORMAT.GPTQ_V2, **job["settings"]
    )
    model = GPTQModel.load(job["model"], config)
    windows = [{"input_ids": row.tolist(), "attention_mask": [1] * len(row)} for row in tokens]
    model.quantize(windows, batch_size=1, backend=BACKEND.GPTQ_TORCH)
    model.save(job["packed"])


def unpack(job, _):
    """Every packed linear; the order of its columns is no part of what it stores unless groups follow it."""
    model = GPTQModel.load(job["packed"], device="cpu", backend=BACKEND.GPTQ_TORCH, dtype=torch.bfloat16).model
    for name, module in model.named_modules():
        if hasattr(module, "qweight"):
            stored = [module.qweight, module.scales, module.qzeros]
            yield f"{name}.weight", module.dequantize_weight().T, stored


run(quantize, unpack, ["gptqmodel"])
