#!/usr/bin/env python
"""Make the golden files of EXL3: ``python tests/formats/make_exl3_golden.py`` from the root; committed once.

Each holds random tensors of one small matrix, and under ``expected.rows`` the first rows of what
`tests/reference/exl3.py` makes of them. Nothing of ours is used.
"""

import sys
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).parents[1]))
from reference import exl3

GOLDEN = Path(__file__).parent / "golden" / "exl3"
MODULE = "model.layers.0.mlp.up_proj"
CASES = {"w1": (128, 128, 1), "w2": (128, 256, 2), "w3": (256, 128, 3), "w6": (128, 128, 6)}
ROWS = 4


def make(name: str, seed: int) -> None:
    rows, columns, bits = CASES[name]
    random = np.random.default_rng(seed)
    trellis = random.integers(-(2**15), 2**15, (columns // 16, rows // 16, 16 * bits), dtype=np.int16)
    suh = random.choice([-1.0, 1.0], columns).astype(np.float16) * np.float16(1.0625)
    svh = (random.uniform(0.01, 0.1, rows) * random.choice([-1, 1], rows)).astype(np.float16)
    tensors = {
        f"{MODULE}.trellis": torch.from_numpy(trellis),
        f"{MODULE}.suh": torch.from_numpy(suh),
        f"{MODULE}.svh": torch.from_numpy(svh),
        f"{MODULE}.mul1": torch.tensor(exl3.MUL1 - 2**32, dtype=torch.int32),
        "expected.rows": torch.from_numpy(exl3.weight(trellis, suh, svh)[:ROWS].copy()),
    }
    GOLDEN.mkdir(parents=True, exist_ok=True)
    save_file(tensors, GOLDEN / f"{name}.safetensors")


if __name__ == "__main__":
    for number, case in enumerate(CASES):
        make(case, number)
