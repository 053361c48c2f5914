#!/usr/bin/env python
"""Make the golden files of the packed format: ``python tests/formats/make_golden.py`` from the root.

Committed once. Later versions must read these files, so they are not made again unless the format itself is new. Each
holds the stored tensors of one small matrix, and under ``expected.`` its codes and values as numpy computes them.
"""

import json
from pathlib import Path

import numpy as np
import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32
from safetensors.torch import save_file

GOLDEN = Path(__file__).parent / "golden"
MODULE = "model.layers.0.mlp.up_proj"
ROWS, COLUMNS = 10, 96
CASES = {
    "w3-sym-g32-bf16": {"bits": 3, "group_size": 32, "symmetric": True, "scale_dtype": "bfloat16"},
    "w4-asym-g48-fp16": {"bits": 4, "group_size": 48, "symmetric": False, "scale_dtype": "float16"},
    "w5-asym-channel-fp32": {"bits": 5, "group_size": None, "symmetric": False, "scale_dtype": "float32"},
    "w8-sym-channel-bf16": {"bits": 8, "group_size": None, "symmetric": True, "scale_dtype": "bfloat16"},
}


def make(name: str, grid: dict[str, object], seed: int) -> None:
    bits, size = int(grid["bits"]), grid["group_size"] or COLUMNS
    random = np.random.default_rng(seed)
    groups = COLUMNS // size
    code = random.integers(0, 2**bits, (ROWS, COLUMNS))
    zero_point = np.full((ROWS, groups), 2 ** (bits - 1))
    if not grid["symmetric"]:
        zero_point = random.integers(0, 2**bits, (ROWS, groups))
    scale = torch.from_numpy(random.uniform(0.001, 0.1, (ROWS, groups))).to(getattr(torch, str(grid["scale_dtype"])))
    value = np.repeat(scale.double().numpy(), size, 1) * (code - np.repeat(zero_point, size, 1))
    half = 2 ** (bits - 1)
    tensors = {
        f"{MODULE}.weight_packed": pack_to_int32(torch.from_numpy(code - half).to(torch.int8), bits),
        f"{MODULE}.weight_scale": scale,
        f"{MODULE}.weight_shape": torch.tensor([ROWS, COLUMNS]),
        "expected.code": torch.from_numpy(code).to(torch.uint8),
        "expected.value": torch.from_numpy(value).to(torch.float32),
    }
    if not grid["symmetric"]:
        signed = torch.from_numpy(zero_point - half).to(torch.int8)
        tensors[f"{MODULE}.weight_zero_point"] = pack_to_int32(signed, bits, packed_dim=0)
    GOLDEN.mkdir(exist_ok=True)
    save_file(tensors, GOLDEN / f"{name}.safetensors")
    settings = {"shape": [ROWS, COLUMNS], "grid": grid}
    (GOLDEN / f"{name}.json").write_text(json.dumps(settings, indent=2) + "\n")


if __name__ == "__main__":
    for seed, (name, grid) in enumerate(CASES.items()):
        make(name, grid, seed)
