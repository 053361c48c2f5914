"""Checksums of tensors beside the files that hold them: stock formats have no place for any inside."""

import json
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from mezzotint.errors import FormatError
from mezzotint.storage.files import write_json

FILE = "mezzotint.checksums.json"


def write_checksums(folder: Path, checksums: Mapping[str, int]) -> None:
    """Write the CRC-32 of tensors by name; without any, nothing."""
    if checksums:
        write_json(folder / FILE, {name: f"{value:08x}" for name, value in sorted(checksums.items())})


def checking(folder: Path) -> Callable[[str, Tensor], None] | None:
    """What compares a tensor, by name, with the folder's checksums; None where there are none.

    Raises:
        FormatError: the file of checksums cannot be read; when a tensor is compared, that it is damaged.
    """
    path = folder / FILE
    if not path.is_file():
        return None
    try:
        known = {str(name): int(value, 16) for name, value in json.loads(path.read_text(encoding="utf-8")).items()}
    except (ValueError, TypeError, AttributeError) as error:
        raise FormatError(f"{FILE} cannot be read ({error}). Make or download the folder again.") from error

    def compare(name: str, value: Tensor) -> None:
        found = zlib.crc32(value.contiguous().reshape(-1).view(torch.uint8).numpy().data)
        if known.get(name, found) != found:
            raise FormatError(
                f"{name} is damaged: it has checksum {found:08x}, not {known[name]:08x} as when it was written. Make "
                "or download the folder again."
            )

    return compare
