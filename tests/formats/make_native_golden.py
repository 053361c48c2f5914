#!/usr/bin/env python
"""Make the golden files of our own format: ``python tests/formats/make_native_golden.py`` from the root.

Committed once. Later versions must read these files, so they are not made again unless the format itself is new. Each
holds the stored tensors of one small matrix of random codes, and under ``expected.value`` what numpy makes of these
codes; the ``.json`` beside it is the ``quantization_config``. Nothing of ours is used, but for the twin of the trellis.
"""

import json
import sys
import zlib
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from scipy.linalg import block_diag, hadamard

sys.path.insert(0, str(Path(__file__).parents[1]))
from reference import trellis

GOLDEN = Path(__file__).parent / "golden" / "native"
MODULE = "model.layers.0.mlp.up_proj"
EMBEDDING = "model.embed_tokens"
# Max 1960, table I, to more digits: eight levels
EIGHT = (0.2450941789442, 0.7560052812059, 1.3439092785050, 2.1519457045370)
UNIFORM = {"kind": "uniform", "bits": 3, "group_size": 32, "symmetric": False, "range": "weighted"}
LOOKUP = {"kind": "lookup", "group_size": 16, "range": "weighted", "scale_dtype": "float16", "bits": 3}
TRELLIS = {"kind": "trellis", "bits": 2.25, "states": 12, "scale_per": "matrix", "window": 32}
HADAMARD = {"kind": "hadamard", "block": 128, "sides": "both"}
CASES = {
    "uniform-w3-g32-bf16": ((10, 50), UNIFORM | {"scale_dtype": "bfloat16"}, None),
    "lookup-w3-g16-fp16": ((6, 40), LOOKUP | {"table": "gaussian"}, None),
    "uniform-w8-sym-row-fp32-hadamard": (
        (12, 24),
        UNIFORM | {"bits": 8, "group_size": None, "symmetric": True, "scale_dtype": "float32"},
        HADAMARD | {"block": 4, "sides": "input"},
    ),
    "embedding-uniform-w3-g16-fp16-hadamard": (
        (23, 40),
        UNIFORM | {"group_size": 16, "range": "error", "scale_dtype": "float16"},
        HADAMARD | {"sides": "input"},
    ),
    "trellis-2.25-hadamard": ((40, 50), TRELLIS, HADAMARD),
    "trellis-3-rows-16": ((20, 32), TRELLIS | {"bits": 3.0, "states": 16, "scale_per": "row"}, None),
}


def module_of(name: str) -> str:
    """Of a case."""
    return EMBEDDING if name.startswith("embedding") else MODULE


def stream_of(code: np.ndarray, bits: int, dtype: str) -> torch.Tensor:
    """Rows as little-endian streams of bytes or words."""
    string = [sum(int(c) << (bits * j) for j, c in enumerate(row)) for row in code]
    size = np.dtype(dtype).itemsize
    length = size * -(-code.shape[1] * bits // (8 * size))
    rows = np.frombuffer(b"".join(s.to_bytes(length, "little") for s in string), dtype=dtype)
    return torch.from_numpy(rows.reshape(len(code), -1).copy())


def grouped(grid: dict, shape: tuple[int, int], random: np.random.Generator) -> tuple[dict, np.ndarray]:
    bits, size = grid["bits"], grid["group_size"] or shape[1]
    groups, group = -(-shape[1] // size), np.arange(shape[1]) // size
    code = random.integers(0, 2**bits, shape)
    dtype = getattr(torch, grid["scale_dtype"])
    scale = torch.from_numpy(random.uniform(0.01, 0.1, (shape[0], groups))).to(dtype)
    tensors = {"weight_packed": stream_of(code, bits, "<i4"), "weight_scale": scale}
    level = code - 2.0 ** (bits - 1)
    if grid["kind"] == "lookup":
        level = np.array((*(-x for x in reversed(EIGHT)), *EIGHT))[code]
    elif not grid["symmetric"]:
        zero_point = random.integers(0, 2**bits, (shape[0], groups))
        tensors["weight_zero_point"] = stream_of(zero_point, bits, "u1")
        level = code - zero_point[:, group]
    return tensors, scale.double().numpy()[:, group] * level


def tiles(grid: dict, shape: tuple[int, int], random: np.random.Generator) -> tuple[dict, np.ndarray]:
    out_tiles, in_tiles = (-(-size // 16) for size in shape)
    packed = random.integers(-(2**31), 2**31, (in_tiles, out_tiles, int(8 * grid["bits"])), dtype=np.int32)
    value = np.zeros((16 * out_tiles, 16 * in_tiles))
    for a, b in np.ndindex(in_tiles, out_tiles):
        for element, state in enumerate(trellis.states_of(packed[a, b], grid["states"])):
            t, m = element // 8, element % 8
            column, row = [0, 1, 8, 9][m % 4] + t % 4 * 2, t // 4 + m // 4 * 8
            value[16 * b + row, 16 * a + column] = trellis.value(state) / 147.7
    if grid["scale_per"] == "row":
        scale = torch.from_numpy(random.uniform(0.01, 0.1, shape[0])).to(torch.float16)
    else:
        scale = torch.tensor([0.03125 * 1.3], dtype=torch.float32)
    cut = value[: shape[0], : shape[1]]
    return {"weight_packed": torch.from_numpy(packed), "weight_scale": scale}, scale.double().numpy()[..., None] * cut


def turned(
    transform: dict, value: np.ndarray, random: np.random.Generator
) -> tuple[dict[str, torch.Tensor], np.ndarray]:
    rows, columns = value.shape
    negative = random.integers(0, 2, columns)
    scale = torch.from_numpy(random.uniform(0.01, 0.1, rows) * random.choice([-1, 1], rows)).to(torch.float16)
    limit = transform["block"]
    inner, outer = (np.gcd(size, limit) for size in (columns, rows))
    right = block_diag(*[hadamard(inner) / inner**0.5] * (columns // inner))
    left = block_diag(*[hadamard(outer) / outer**0.5] * (rows // outer))
    if transform["sides"] == "input":
        left = np.eye(rows)
    sign = np.packbits(negative.astype(np.uint8), bitorder="little")
    stored = {"weight_basis_input_sign": torch.from_numpy(sign), "weight_basis_output_scale": scale}
    return stored, scale.double().numpy()[:, None] * (left @ value @ right) * (1 - 2 * negative)


def make(name: str, seed: int) -> None:
    shape, grid, transform = CASES[name]
    random = np.random.default_rng(seed)
    tensors, value = (tiles if grid["kind"] == "trellis" else grouped)(grid, shape, random)
    if transform is not None:
        basis, value = turned(transform, value, random)
        tensors |= basis
    everything = b"".join(tensors[n].reshape(-1).view(torch.uint8).numpy().tobytes() for n in sorted(tensors))
    tensors["weight_checksum"] = torch.tensor([zlib.crc32(everything)])
    stored = {f"{module_of(name)}.{n}": t.contiguous() for n, t in tensors.items()}
    GOLDEN.mkdir(parents=True, exist_ok=True)
    save_file({**stored, "expected.value": torch.from_numpy(value)}, GOLDEN / f"{name}.safetensors")
    config = {
        "quant_method": "mezzotint",
        "format_version": 2,
        "schemes": [{"shape": list(shape), "grid": grid, "transform": transform}],
        "modules": {module_of(name): 0},
    }
    (GOLDEN / f"{name}.json").write_text(json.dumps(config, indent=2) + "\n")


if __name__ == "__main__":
    for number, case in enumerate(CASES):
        make(case, number)
