"""Importance matrices of llama.cpp: sums of the squares of every input of a model's matrices.

Two layouts, as llama.cpp's ``tools/imatrix`` writes them. A GGUF file of ``general.type`` ``imatrix`` has, for the
matrix ``NAME``, ``NAME.in_sum2`` (float32, the sum over tokens of the square of each input) and ``NAME.counts`` (the
number of tokens). The older binary file, little-endian, is the int32 number of entries, then of each entry the int32
length of its name, the name, int32 chunks, int32 inputs, and as float32 the mean square of each input times the number
of chunks; what follows, chunks of the whole file and the name of the text, is not needed.
"""

import struct
import zlib
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from mezzotint.errors import FormatError
from mezzotint.formats.gguf.file import GgufFile

CHUNK_TOKENS = 512  # of a chunk where the file does not say: llama.cpp's usual context
_SUMS, _COUNTS = ".in_sum2", ".counts"
_LONGEST_NAME = 1024


class Squares(NamedTuple):
    """What a file tells about the inputs of one matrix.

    Attributes:
        sums: of the square of each input over all tokens.
        tokens: how many; 0 where none reached the matrix.
    """

    sums: Float[Tensor, " in"]
    tokens: float


class Imatrix(NamedTuple):
    """A file.

    Attributes:
        squares: by the names that matrices have in GGUF files.
        checksum: CRC-32 of the file.
    """

    squares: dict[str, Squares]
    checksum: int


def read_imatrix(path: Path) -> Imatrix:
    """An importance matrix of either layout.

    Raises:
        FormatError: the file is missing, of another kind, cut short, or holds what no sums of squares are.
    """
    if not path.is_file():
        raise FormatError(f"importance matrix {str(path)!r} does not exist. Give a file that llama-imatrix wrote.")
    with path.open("rb") as file:
        is_gguf = file.read(4) == b"GGUF"
        file.seek(0)
        checksum = 0
        while piece := file.read(1 << 20):
            checksum = zlib.crc32(piece, checksum)
    found = _from_gguf(path) if is_gguf else _from_binary(path)
    for name, (sums, tokens) in found.items():
        if not bool(torch.isfinite(sums).all()) or bool((sums < 0).any()) or not 0 <= tokens < float("inf"):
            raise _damaged(path, f"the sums of {name!r} are negative or not finite")
    if not found:
        raise _damaged(path, "it has no entry")
    return Imatrix(found, checksum)


def _from_gguf(path: Path) -> dict[str, Squares]:
    file = GgufFile.open(path)
    kind = file.metadata.get("general.type")
    if kind != "imatrix":
        raise FormatError(f"{path.name} is a GGUF file of type {kind!r}, not 'imatrix': no importance matrix.")
    names = {
        suffix: {n.removesuffix(suffix) for n in file.tensors if n.endswith(suffix)} for suffix in (_SUMS, _COUNTS)
    }
    for name in sorted(names[_SUMS] ^ names[_COUNTS]):
        raise _damaged(path, f"{name!r} has only one of {_SUMS} and {_COUNTS}")
    found = {}
    for name in sorted(names[_SUMS]):
        sums, counts = (file.read(name + suffix) for suffix in (_SUMS, _COUNTS))
        if counts.numel() == 1:  # several are those of experts
            found[name] = Squares(sums.float().flatten(), float(counts))
    return found


def _from_binary(path: Path) -> dict[str, Squares]:
    raw = path.read_bytes()
    place = 0

    def take(form: str) -> tuple[Any, ...]:
        nonlocal place
        size = struct.calcsize(form)
        if size > len(raw) - place:
            raise _damaged(path, f"it is cut short after {len(raw)} bytes, or no importance matrix")
        place += size
        return struct.unpack_from(form, raw, place - size)

    (count,) = take("<i")
    found = {}
    for number in range(count):
        (length,) = take("<i")
        if not 0 < length <= _LONGEST_NAME:
            raise _damaged(path, f"the name of entry {number} has {length} bytes, or it is not an importance matrix")
        name = take(f"<{length}s")[0].decode("utf-8", errors="replace")
        chunks, inputs = take("<2i")
        if chunks < 1 or inputs < 1:
            raise _damaged(path, f"{name!r} has {inputs} inputs of {chunks} chunks")
        values = torch.tensor(take(f"<{inputs}f"))
        found[name] = Squares(values * CHUNK_TOKENS, float(chunks * CHUNK_TOKENS))
    return found


def _damaged(path: Path, why: str) -> FormatError:
    return FormatError(f"importance matrix {path.name} is damaged: {why}. Make or download it again.")
