#!/usr/bin/env python
"""Make the golden GGUF file: ``python tests/formats/make_gguf_golden.py`` from the root.

Committed once: later versions must read it. It holds two rows of random blocks of every type, with our checksums, and
beside it what the gguf package makes of these blocks. Nothing of ours is used.
"""

import struct
import zlib
from pathlib import Path

import numpy as np
from gguf import GGMLQuantizationType, GGUFValueType, GGUFWriter, dequantize
from safetensors.numpy import save_file

GOLDEN = Path(__file__).parent / "golden" / "gguf"
# columns, bytes of a row, and where float16 numbers lie in a block of that many bytes
TYPES = {
    "Q4_0": (64, 36, 18, (0,)),
    "Q4_1": (64, 40, 20, (0, 2)),
    "Q5_0": (64, 44, 22, (0,)),
    "Q5_1": (64, 48, 24, (0, 2)),
    "Q8_0": (64, 68, 34, (0,)),
    "IQ4_NL": (64, 36, 18, (0,)),
    "Q2_K": (256, 84, 84, (80, 82)),
    "Q3_K": (256, 110, 110, (108,)),
    "Q4_K": (256, 144, 144, (0, 2)),
    "Q5_K": (256, 176, 176, (0, 2)),
    "Q6_K": (256, 210, 210, (208,)),
}
ROWS = 2


def blocks_of(name: str, random: np.random.Generator) -> np.ndarray:
    _, row_bytes, block_bytes, halves = TYPES[name]
    raw = random.integers(0, 256, (ROWS * row_bytes // block_bytes, block_bytes), dtype=np.uint8)
    for place in halves:
        raw[:, place : place + 2] = random.uniform(0.001, 0.1, (len(raw), 1)).astype(np.float16).view(np.uint8)
    return raw.reshape(ROWS, row_bytes)


def main() -> None:
    random = np.random.default_rng(0)
    GOLDEN.mkdir(parents=True, exist_ok=True)
    path = GOLDEN / "types.gguf"
    tensors = {f"blk.0.{name.lower()}.weight": (name, blocks_of(name, random)) for name in TYPES}
    writer = GGUFWriter(path, "llama")
    writer.add_block_count(1)
    count = len(tensors) + 1
    writer.add_key_value("mezzotint.checksums", [0] * count, GGUFValueType.ARRAY, sub_type=GGUFValueType.UINT32)
    for tensor, (name, raw) in tensors.items():
        writer.add_tensor(tensor, raw, raw_dtype=GGMLQuantizationType[name])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    data = bytearray(path.read_bytes())
    start = data.index(b"mezzotint.checksums") + len("mezzotint.checksums") + 4 + 4 + 8
    first = next(iter(tensors.values()))[1].tobytes()
    header = zlib.crc32(data[start + 4 * count : data.index(first)], zlib.crc32(data[:start]))
    sums = [header, *(zlib.crc32(raw.tobytes()) for _, raw in tensors.values())]
    data[start : start + 4 * count] = struct.pack(f"<{count}I", *sums)
    path.write_bytes(bytes(data))
    expected = {t: dequantize(raw, GGMLQuantizationType[name]) for t, (name, raw) in tensors.items()}
    save_file(expected, GOLDEN / "types.safetensors")


if __name__ == "__main__":
    main()
