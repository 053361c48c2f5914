"""Importance matrices as llama.cpp's ``llama-imatrix`` writes them, in both layouts."""

import struct
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from gguf import GGUFWriter


def write_gguf_imatrix(path: Path, sums: Mapping[str, np.ndarray], counts: Mapping[str, list[float]]) -> None:
    """Sums of squares ``[matrices, in]`` and tokens of each matrix, by GGUF name."""
    writer = GGUFWriter(path, arch="")
    writer.add_type("imatrix")
    writer.add_array("imatrix.datasets", ["text.txt"])
    writer.add_uint32("imatrix.chunk_count", 2)
    writer.add_uint32("imatrix.chunk_size", 512)
    for name in sorted(sums):
        value, count = np.atleast_2d(sums[name]).astype(np.float32), np.array(counts[name], dtype=np.float32)[:, None]
        # ggml leaves trailing dimensions of 1 out
        writer.add_tensor(f"{name}.in_sum2", value[0] if len(value) == 1 else value)
        writer.add_tensor(f"{name}.counts", count[0] if len(count) == 1 else count)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def write_binary_imatrix(path: Path, means: Mapping[str, np.ndarray], *, chunks: int) -> None:
    """Mean squares by GGUF name, each a number of chunks."""
    parts = [struct.pack("<i", len(means))]
    for name, mean in means.items():
        raw = name.encode()
        parts += [struct.pack("<i", len(raw)), raw, struct.pack("<2i", chunks, len(mean))]
        parts.append((mean.astype(np.float32) * np.float32(chunks)).tobytes())
    parts.append(struct.pack("<2i", chunks, len("text.txt")) + b"text.txt")
    path.write_bytes(b"".join(parts))
