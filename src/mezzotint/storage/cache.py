"""The user's cache: tensors that took long to compute, under a digest of all that determines them.

What lies here only saves time. A file that cannot be read or written is as good as none, and old ones go where there is
more than the limit.
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from mezzotint.errors import ConfigError
from mezzotint.process.machine import cache_folder
from mezzotint.storage.files import replaced

LIMIT = "MEZZOTINT_CACHE_BYTES"  # variable of the environment: bytes that may lie in the cache; 0 is no cache
_LIMIT = 2 * 2**30
_SUFFIX = ".safetensors"
_PACKAGE = Path(__file__).parents[1]


class Cache:
    """Tensors by kind and digest, the least recently used ones removed past the limit.

    Raises:
        ConfigError: the variable `LIMIT` is no number of bytes.
    """

    def __init__(self) -> None:
        self.folder = cache_folder() / "computed"
        asked = os.environ.get(LIMIT, str(_LIMIT))
        if not asked.isdecimal():
            raise ConfigError(f"{LIMIT} is {asked!r}. Give a number of bytes; 0 keeps nothing.")
        self.limit = int(asked)

    def tensors(
        self, kind: str, depends_on: Mapping[str, Any], make: Callable[[], Mapping[str, Tensor]]
    ) -> Mapping[str, Tensor]:
        """What lies in the cache, or is made and kept there.

        Args:
            kind: what it is, a word for the name of the file.
            depends_on: everything that determines the tensors, as JSON holds it; the version of the program is added.
            make: computes them.
        """
        told = json.dumps([_program(), torch.__version__, depends_on], sort_keys=True)
        path = self.folder / f"{kind}-{hashlib.sha256(told.encode()).hexdigest()[:32]}{_SUFFIX}"
        if self.limit and path.is_file():
            try:
                found = load_file(path)
                os.utime(path)
            except (SafetensorError, OSError):
                pass  # damaged, or not ours to read: made again
            else:
                return found
        found = {name: value.contiguous() for name, value in make().items()}
        self._keep(path, found)
        return found

    def files(self) -> list[tuple[Path, int]]:
        """Files and their bytes, those that were not used for longest first."""
        return [(path, size) for _, path, size in sorted(self._files())]

    def clear(self) -> int:
        """Remove everything; gives the bytes that are free now."""
        return self._shrink(0)

    def _keep(self, path: Path, tensors: dict[str, Tensor]) -> None:
        size = sum(value.nbytes for value in tensors.values())
        if size > self.limit // 2:  # one result must not push out all others
            return
        self._shrink(self.limit - size)
        with suppress(OSError, SafetensorError):  # a full disk, a home that is read-only
            path.parent.mkdir(parents=True, exist_ok=True)
            with replaced(path) as temporary:
                save_file(tensors, temporary)

    def _files(self) -> Iterator[tuple[float, Path, int]]:
        if self.folder.is_dir():
            for path in self.folder.iterdir():
                with suppress(FileNotFoundError):  # another process removes too
                    status = path.stat()
                    yield status.st_mtime, path, status.st_size

    def _shrink(self, room: int) -> int:
        """Remove files until no more than that lies here; gives the bytes removed."""
        files = self.files()
        total = before = sum(size for _, size in files)
        for path, size in files:
            if total <= room:
                break
            with suppress(OSError):
                path.unlink(missing_ok=True)
                total -= size
        return before - total


def _program() -> str:
    """The version of the program, and its text where it is worked on."""
    digest = hashlib.sha256(version("mezzotint").encode())
    for path in sorted(_PACKAGE.rglob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()
