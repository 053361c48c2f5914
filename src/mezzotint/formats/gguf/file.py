"""GGUF files: written through the ``gguf`` package with a checksum of every tensor, read by offset and checked.

Layout (GGUF version 3): magic, version, number of tensors and of metadata entries; the entries; name, dimensions
(innermost first), type and offset of every tensor; the tensors, aligned. GGUF has no checksums of its own: ours are the
last metadata entry, `CHECKSUMS`, which other readers skip.
"""

import math
import re
import struct
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFValueType, GGUFWriter
from torch import Tensor

from mezzotint.errors import FormatError

CHECKSUMS = "mezzotint.checksums"  # uint32: of the header but for these numbers, then of every tensor in order
_MAGIC, _VERSION = b"GGUF", 3
_NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_PLAIN = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_CHUNK = 1 << 23
_SURROGATE = re.compile("[\ud800-\udfff]")


class Outgoing(NamedTuple):
    """A tensor to be written; ``read`` gives it in its GGUF type: bytes of blocks, or plain numbers."""

    name: str
    type: str
    shape: tuple[int, ...]
    read: Callable[[], Tensor]


def nbytes(type_name: str, shape: Sequence[int]) -> int:
    """Size of a tensor of that type."""
    block, size = GGML_QUANT_SIZES[GGMLQuantizationType[type_name]]
    return math.prod(shape) // block * size


def write_gguf(path: Path, arch: str, describe: Callable[[GGUFWriter], None], tensors: Sequence[Outgoing]) -> None:
    """Write a file, one tensor in memory at a time.

    Args:
        path: is overwritten.
        arch: llama.cpp's name of the architecture.
        describe: adds the metadata.
        tensors: in the order of the file.
    """
    writer = GGUFWriter(path, arch)
    describe(writer)
    count = len(tensors) + 1
    writer.add_key_value(CHECKSUMS, [0] * count, GGUFValueType.ARRAY, sub_type=GGUFValueType.UINT32)
    for tensor in tensors:
        kind = GGMLQuantizationType[tensor.type]
        block, size = GGML_QUANT_SIZES[kind]
        plain = tensor.type in _PLAIN
        shape = tensor.shape if plain else (*tensor.shape[:-1], tensor.shape[-1] // block * size)
        dtype = np.dtype(np.float32 if plain else np.uint8)
        writer.add_tensor_info(tensor.name, shape, dtype, nbytes(tensor.type, tensor.shape), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    assert writer.fout is not None
    end = writer.fout[0].tell()  # the checksums are the last entry
    writer.write_ti_data_to_file()
    found = []
    for tensor in tensors:
        value = tensor.read().detach().cpu().contiguous()
        expected = _PLAIN.get(tensor.type, torch.uint8)
        assert value.dtype == expected, f"{tensor.name} is {value.dtype}, not {expected}"
        raw = value.view(torch.uint8).numpy()
        assert raw.nbytes == nbytes(tensor.type, tensor.shape), f"{tensor.name} has {raw.nbytes} bytes"
        found.append(zlib.crc32(raw.reshape(-1).data))
        writer.write_tensor_data(raw)
    writer.close()
    start = end - 4 * count
    with path.open("r+b") as file:
        header = zlib.crc32(file.read(start))
        file.seek(end)
        header = zlib.crc32(file.read(_data_start(path) - end), header)
        file.seek(start)
        file.write(struct.pack(f"<{count}I", header, *found))


def check_metadata(writer: GGUFWriter) -> None:
    """Refuse texts that a file cannot hold, before anything is written.

    Raises:
        FormatError: names the entry.
    """
    for entries in writer.kv_data:
        for key, entry in entries.items():
            for text in entry.value if isinstance(entry.value, list) else [entry.value]:
                if isinstance(text, str) and _SURROGATE.search(text):
                    raise FormatError(
                        f"{text[:60]!r} in {key!r} holds a lone surrogate, which a GGUF file cannot. Remove it from "
                        "the tokenizer or the chat template, or choose another format."
                    )


def _data_start(path: Path) -> int:
    return GgufFile.open(path, verify=False).data_start


class GgufTensor(NamedTuple):
    """A tensor of a file: ``shape`` outermost first; ``checksum`` is None in files of other programs."""

    name: str
    type: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int
    checksum: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class GgufFile:
    """An opened file: its header, checked; tensors are read, and checked, one by one.

    Attributes:
        metadata: values by key; arrays are lists.
        data_start: offset of the first tensor.
    """

    path: Path
    metadata: Mapping[str, Any]
    tensors: Mapping[str, GgufTensor]
    data_start: int

    @classmethod
    def open(cls, path: Path, *, verify: bool = True) -> "GgufFile":
        """Read the header.

        Raises:
            FormatError: no GGUF file, cut short, damaged, or of a version or type that is not known.
        """
        size = path.stat().st_size
        with path.open("rb") as file:
            cursor = _Cursor(path, file)
            try:
                if cursor.take(4) != _MAGIC:
                    raise FormatError(
                        f"{path.name} is not a GGUF file: it does not start with {_MAGIC!r}. Give a .gguf file."
                    )
                version, count, entries = cursor.numbers("<IQQ")
                if version != _VERSION:
                    raise FormatError(f"{path.name} is GGUF version {version}; {_VERSION} is read.")
                metadata = {cursor.string(): cursor.value() for _ in range(_limited(path, entries, size))}
                after = cursor.place
                infos = [_info(cursor) for _ in range(_limited(path, count, size))]
            except (UnicodeDecodeError, KeyError, ValueError, OverflowError, struct.error) as error:
                if isinstance(error, FormatError):
                    raise
                raise _damaged(path, f"its header cannot be read ({type(error).__name__}: {error})") from error
            start = -(-cursor.place // _alignment(path, metadata)) * _alignment(path, metadata)
            checksums = metadata.get(CHECKSUMS)
            if checksums is not None and (not isinstance(checksums, list) or len(checksums) != count + 1):
                raise _damaged(path, f"{CHECKSUMS} does not have a number for each of its {count} tensors")
            if verify and checksums is not None:
                file.seek(0)
                header = zlib.crc32(file.read(after - 4 * len(checksums)))
                file.seek(after)
                header = zlib.crc32(file.read(start - after), header)
                if header != checksums[0]:
                    raise _damaged(path, "its header is not the one that was written")
        tensors: dict[str, GgufTensor] = {}
        for number, (name, type_name, shape, offset) in enumerate(infos, 1):
            found = GgufTensor(
                name,
                type_name,
                shape,
                start + offset,
                nbytes(type_name, shape),
                None if checksums is None else checksums[number],
            )
            if found.offset + found.nbytes > size:
                raise FormatError(
                    f"{path.name} is truncated: tensor {name!r} ends at byte {found.offset + found.nbytes}, the file "
                    f"has {size}. Make or download it again."
                )
            tensors[name] = found
        return cls(path=path, metadata=metadata, tensors=tensors, data_start=start)

    def read(self, name: str) -> Tensor:
        """One tensor as it lies in the file: plain numbers, or the blocks of each row as bytes.

        Raises:
            FormatError: its bytes are not those that were written.
        """
        tensor = self.tensors[name]
        raw = torch.empty(tensor.nbytes, dtype=torch.uint8)
        target = memoryview(raw.numpy().data)
        with self.path.open("rb", buffering=0) as file:
            file.seek(tensor.offset)
            done = 0
            while done < tensor.nbytes:
                got = file.readinto(target[done : done + _CHUNK])
                if not got:
                    raise _damaged(self.path, f"tensor {name!r} is cut short")
                done += got
        if tensor.checksum is not None and zlib.crc32(target) != tensor.checksum:
            raise _damaged(self.path, f"the bytes of tensor {name!r} are not those that were written")
        if tensor.type in _PLAIN:
            return raw.view(_PLAIN[tensor.type]).view(tensor.shape)
        return raw.view(*tensor.shape[:-1], -1)


class _Cursor:
    """Reads a header from its start on."""

    def __init__(self, path: Path, file: Any) -> None:
        self._path, self._file = path, file
        self._size = path.stat().st_size
        self.place = 0

    def take(self, count: int) -> bytes:
        if count > self._size - self.place:
            raise FormatError(
                f"{self._path.name} is truncated: its header goes on behind byte {self._size}, the end of the file. "
                "Make or download it again."
            )
        self.place += count
        return self._file.read(count)

    def numbers(self, form: str) -> tuple[Any, ...]:
        return struct.unpack(form, self.take(struct.calcsize(form)))

    def string(self) -> str:
        (count,) = self.numbers("<Q")
        return self.take(count).decode("utf-8", errors="surrogateescape")

    def value(self) -> Any:
        (kind,) = self.numbers("<I")
        if kind != _ARRAY:
            return self._one(kind)
        kind, count = self.numbers("<IQ")
        if kind in _NUMBERS:
            return list(self.numbers(f"<{count}{_NUMBERS[kind]}"))
        return [self._one(kind) for _ in range(count)]

    def _one(self, kind: int) -> Any:
        return self.string() if kind == _STRING else self.numbers("<" + _NUMBERS[kind])[0]


def _info(cursor: _Cursor) -> tuple[str, str, tuple[int, ...], int]:
    name = cursor.string()
    (dimensions,) = cursor.numbers("<I")
    if dimensions > 4:
        raise ValueError(f"tensor {name!r} has {dimensions} dimensions")
    shape = cursor.numbers(f"<{dimensions}Q")
    kind, offset = cursor.numbers("<IQ")
    type_name = GGMLQuantizationType(kind).name
    if shape and shape[0] % GGML_QUANT_SIZES[GGMLQuantizationType(kind)][0]:
        raise ValueError(f"tensor {name!r} of type {type_name} has rows of {shape[0]}")
    return name, type_name, tuple(reversed(shape)), offset


def _alignment(path: Path, metadata: Mapping[str, Any]) -> int:
    found = metadata.get("general.alignment", 32)
    if not isinstance(found, int) or found < 1:
        raise _damaged(path, f"its alignment is {found!r}")
    return found


def _limited(path: Path, count: int, size: int) -> int:
    """A number of entries that the file can hold: each takes at least 12 bytes."""
    if count > size // 12:
        raise _damaged(path, f"it claims {count} entries in {size} bytes")
    return count


def _damaged(path: Path, why: str) -> FormatError:
    return FormatError(f"{path.name} is damaged: {why}. Make or download it again.")
