"""Where tensors live: in memory up to a budget, in a file past it."""

import os
import tempfile
from pathlib import Path

import torch
from torch import Tensor

from mezzotint.errors import WriteError


class Budget:
    """Bytes that several stores share.

    Args:
        limit: bytes that may be held in memory; None is no limit.
    """

    def __init__(self, limit: int | None) -> None:
        self.limit = limit
        self.used = 0

    def take(self, nbytes: int) -> bool:
        """Reserve bytes; False if they do not fit."""
        if self.limit is not None and self.used + nbytes > self.limit:
            return False
        self.used += nbytes
        return True

    def give_back(self, nbytes: int) -> None:
        """Release reserved bytes."""
        self.used -= nbytes


class Store:
    """Tensors by index; those that do not fit the budget go to a temporary file.

    The file is read and written by offset, not mapped: mapped pages would count as memory of the process.

    Args:
        budget: shared with other stores.
        folder: where the temporary file is made when it is needed.
    """

    def __init__(self, budget: Budget, folder: Path) -> None:
        self._budget = budget
        self._folder = folder
        self._held: dict[int, Tensor] = {}
        self._spilled: dict[int, tuple[int, torch.Size, torch.dtype, torch.device]] = {}
        self._file: int | None = None
        self._end = 0
        self._free: list[tuple[int, int]] = []

    def put(self, index: int, value: Tensor) -> None:
        """Keep a tensor; replaces the one of that index."""
        nbytes = value.numel() * value.element_size()
        if index in self._held:
            self._budget.give_back(self._held.pop(index).nbytes)
        if self._budget.take(nbytes):
            self._held[index] = value
            return
        if self._file is None:
            self._file = self._open()
        known = self._spilled.get(index)
        same = known is not None and known[1] == value.shape and known[2] == value.dtype
        offset = known[0] if known is not None and same else self._place(nbytes)
        self._write(value.detach().cpu().contiguous().view(torch.uint8).flatten(), offset)
        self._spilled[index] = (offset, value.shape, value.dtype, value.device)

    def get(self, index: int) -> Tensor:
        """The tensor of that index."""
        if index in self._held:
            return self._held[index]
        offset, shape, dtype, device = self._spilled[index]
        assert self._file is not None
        value = torch.empty(shape, dtype=dtype)
        view = value.view(torch.uint8).flatten().numpy().data
        done = 0
        while done < len(view):
            done += os.preadv(self._file, [view[done:]], offset + done)
        return value.to(device)

    def pop(self, index: int) -> Tensor:
        """The tensor of that index, which is forgotten; its place in the file is used again."""
        value = self.get(index)
        if index in self._held:
            self._budget.give_back(self._held.pop(index).nbytes)
        else:
            offset = self._spilled.pop(index)[0]
            self._free.append((offset, value.nbytes))
        return value

    def close(self) -> None:
        """Forget everything and remove the file."""
        for value in self._held.values():
            self._budget.give_back(value.nbytes)
        self._held.clear()
        self._spilled.clear()
        if self._file is not None:
            os.close(self._file)
            self._file = None

    @property
    def spilled_bytes(self) -> int:
        """Size of the file."""
        return self._end

    def _place(self, nbytes: int) -> int:
        """Offset of a free place of that size: one given back, or the end of the file."""
        for position, (offset, free) in enumerate(self._free):
            if free >= nbytes:
                del self._free[position]
                return offset
        self._end += nbytes
        return self._end - nbytes

    def _open(self) -> int:
        # unlinked at once: nothing is left behind, however the process ends
        handle, name = tempfile.mkstemp(dir=self._folder, prefix="stream-")
        Path(name).unlink()
        return handle

    def _write(self, data: Tensor, offset: int) -> None:
        assert self._file is not None
        view = data.numpy().data
        done = 0
        try:
            while done < len(view):
                done += os.pwrite(self._file, view[done:], offset + done)
        except OSError as error:
            raise WriteError(
                f"cannot spill {len(view)} bytes of activations into {str(self._folder)!r}: {error.strerror}. "
                "Free space there, or raise --memory so that less is spilled."
            ) from error
