#!/usr/bin/env python
"""Make the golden files of the GPTQ layout: ``python tests/formats/make_gptq_golden.py`` from the root.

Committed once: later versions must read these files. Each holds the stored tensors of one small matrix, packed bit by
bit in numpy, and under ``expected.`` its codes and values.
"""

import json
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

GOLDEN = Path(__file__).parent / "golden" / "gptq"
MODULE = "model.layers.0.mlp.up_proj"
ROWS, COLUMNS = 32, 96
CASES = {
    "v1-w4-g32-fp16": {"bits": 4, "group_size": 32, "sym": True, "checkpoint_format": "gptq"},
    "v1-w3-g48-bf16": {"bits": 3, "group_size": 48, "sym": True, "checkpoint_format": "gptq"},
    "v2-w2-g16-fp16": {"bits": 2, "group_size": 16, "sym": False, "checkpoint_format": "gptq_v2"},
    "v2-w8-row-bf16": {"bits": 8, "group_size": -1, "sym": False, "checkpoint_format": "gptq_v2"},
}


def words(code: np.ndarray, bits: int) -> np.ndarray:
    """Each column's numbers as one stream of bits, least first, in words of 32: ``[n, m] -> [n * bits / 32, m]``."""
    stream = np.concatenate([(code[i] >> b & 1)[None] for i in range(len(code)) for b in range(bits)])
    weights = (1 << np.arange(32, dtype=np.uint64))[None, :, None]
    packed = (stream.astype(np.uint64).reshape(-1, 32, code.shape[1]) * weights).sum(1)
    return packed.astype(np.uint32).view(np.int32)


def packed_by_the_book(
    code: np.ndarray, zero_point: np.ndarray, bits: int, group_size: int | None, *, version: int
) -> dict[str, np.ndarray]:
    """``qweight``, ``qzeros`` and ``g_idx`` of codes ``[out, in]`` and zero points ``[out, groups]``."""
    columns = code.shape[1]
    return {
        "qweight": words(code.T.astype(np.int64), bits),
        "qzeros": words(zero_point - (version == 1), bits).T,
        "g_idx": np.arange(columns, dtype=np.int32) // (group_size or columns),
    }


def make(name: str, settings: dict[str, object], seed: int) -> None:
    bits, size = int(settings["bits"]), int(settings["group_size"])
    size = COLUMNS if size == -1 else size
    random = np.random.default_rng(seed)
    groups = COLUMNS // size
    code = random.integers(0, 2**bits, (ROWS, COLUMNS))
    zero_point = np.full((ROWS, groups), 2 ** (bits - 1))
    if not settings["sym"]:
        zero_point = random.integers(0, 2**bits, (ROWS, groups))
    dtype = torch.bfloat16 if name.endswith("bf16") else torch.float16
    scale = torch.from_numpy(random.uniform(0.001, 0.1, (ROWS, groups))).to(dtype)
    value = np.repeat(scale.double().numpy(), size, 1) * (code - np.repeat(zero_point, size, 1))
    version = 2 if settings["checkpoint_format"] == "gptq_v2" else 1
    parts = packed_by_the_book(code, zero_point, bits, size, version=version)
    tensors = {f"{MODULE}.{part}": torch.from_numpy(np.ascontiguousarray(found)) for part, found in parts.items()}
    tensors |= {
        f"{MODULE}.scales": scale.t().contiguous(),
        "expected.code": torch.from_numpy(code).to(torch.uint8),
        "expected.value": torch.from_numpy(value).to(torch.float32),
    }
    GOLDEN.mkdir(parents=True, exist_ok=True)
    save_file(tensors, GOLDEN / f"{name}.safetensors")
    config = {"quant_method": "gptq", "desc_act": False, **settings}
    text = json.dumps({"shape": [ROWS, COLUMNS], "quantization_config": config}, indent=2)
    (GOLDEN / f"{name}.json").write_text(text + "\n")


if __name__ == "__main__":
    for seed, (name, settings) in enumerate(CASES.items()):
        make(name, settings, seed)
