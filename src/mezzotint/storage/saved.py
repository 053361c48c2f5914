"""Tensors in files of a work folder: written whole and durably, read one by one, checked by checksum."""

import zlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mezzotint.core.dtypes import SAFETENSORS_DTYPES, SAFETENSORS_NAMES
from mezzotint.errors import MezzotintError, OutputError, WriteError
from mezzotint.storage.files import replacing

Index = Mapping[str, Any]  # what JSON holds of a file: its name, its size, its tensors


def save(path: Path, tensors: Iterable[tuple[str, Tensor]]) -> Index:
    """Write tensors one behind another; the file has its name only when it is complete and on the disk.

    Args:
        path: of the file.
        tensors: names and values, taken one at a time.

    Returns:
        What `Saved` needs to read them.

    Raises:
        WriteError: the disk is full or broken.
    """
    rows: list[list[Any]] = []
    try:
        with replacing(path) as file:
            for name, value in tensors:
                data = value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data
                file.write(data)
                rows.append([name, SAFETENSORS_NAMES[value.dtype], list(value.shape), zlib.crc32(data)])
            size = file.tell()
    except OSError as error:
        if isinstance(error, MezzotintError):
            raise  # of what makes the tensors
        raise WriteError(f"cannot save the state of the run to {path}: {error.strerror}. Free some space.") from error
    return {"file": path.name, "bytes": size, "tensors": rows}


class _Place(NamedTuple):
    """Where a tensor lies."""

    path: Path
    offset: int
    dtype: torch.dtype
    shape: tuple[int, ...]
    checksum: int


class Saved:
    """Tensors that `save` wrote, from one or several files of a folder.

    Args:
        folder: of the files.
        indices: what `save` returned of each.

    Raises:
        OutputError: a file is missing or truncated.
    """

    def __init__(self, folder: Path, indices: Sequence[Index]) -> None:
        self._places: dict[str, _Place] = {}
        for index in indices:
            path = folder / index["file"]
            size = path.stat().st_size if path.is_file() else None
            if size != index["bytes"]:
                found = "is missing" if size is None else f"is truncated: {size} of {index['bytes']} bytes"
                raise damaged(path, found)
            offset = 0
            for name, kind, shape, checksum in index["tensors"]:
                dtype = SAFETENSORS_DTYPES[kind]
                self._places[name] = _Place(path, offset, dtype, tuple(shape), checksum)
                offset += torch.Size(shape).numel() * dtype.itemsize

    def __contains__(self, name: str) -> bool:
        return name in self._places

    @property
    def names(self) -> tuple[str, ...]:
        """Of all tensors, in the order in which they were written."""
        return tuple(self._places)

    def verify(self) -> None:
        """Read everything once.

        Raises:
            OutputError: some bytes are not those that were written.
        """
        for name in self._places:
            self.read(name)

    def read(self, name: str) -> Tensor:
        """One tensor.

        Raises:
            OutputError: its bytes are not those that were written.
        """
        place = self._places[name]
        value = torch.empty(place.shape, dtype=place.dtype)
        view = value.flatten().view(torch.uint8).numpy().data
        with place.path.open("rb", buffering=0) as file:
            file.seek(place.offset)
            done = 0
            while done < len(view) and (count := file.readinto(view[done:])):
                done += count
        if done < len(view) or zlib.crc32(view) != place.checksum:
            raise damaged(place.path, f"is damaged at {name!r}")
        return value


def damaged(path: Path, how: str) -> OutputError:
    """The error for a file of the work folder from which nothing can be continued."""
    return OutputError(f"{path} {how}. The run cannot be continued from it: remove {path.parents[1]} and start anew.")
