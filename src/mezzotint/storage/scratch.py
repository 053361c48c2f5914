"""A temporary file, read and written by offset, never mapped: mapped pages would count as memory of the process."""

import os
import tempfile
import weakref
from pathlib import Path

import torch
from torch import Tensor

from mezzotint.errors import WriteError


class Scratch:
    """A file that nobody sees and that goes with the process, however that ends.

    Args:
        folder: where it lies.
        what: is kept there, for messages.
        size: bytes that are zero at first.
    """

    def __init__(self, folder: Path, what: str, size: int = 0) -> None:
        self._folder = folder
        self._what = what
        self._handle, name = tempfile.mkstemp(dir=folder, prefix="spill-")
        Path(name).unlink(missing_ok=True)  # at once: nothing is left behind
        os.truncate(self._handle, size)
        self.close = weakref.finalize(self, os.close, self._handle)

    def write(self, value: Tensor, offset: int) -> None:
        """Put a contiguous tensor of the CPU there.

        Raises:
            WriteError: there is no room.
        """
        view, done = _bytes(value), 0
        try:
            while done < len(view):
                done += os.pwrite(self._handle, view[done:], offset + done)
        except OSError as error:
            raise WriteError(
                f"cannot write {len(view)} bytes of {self._what} to {str(self._folder)!r}: {error.strerror}. "
                "Free space there, or raise --memory so that less goes to disk."
            ) from error

    def read_(self, value: Tensor, offset: int) -> Tensor:
        """Fill a contiguous tensor of the CPU from there; gives it back.

        Raises:
            WriteError: the file has less than was written.
        """
        view, done = _bytes(value), 0
        while done < len(view) and (count := os.preadv(self._handle, [view[done:]], offset + done)):
            done += count
        if done < len(view):
            raise WriteError(
                f"{self._what} that were written to {str(self._folder)!r} are lost: {len(view)} bytes were "
                f"written, {done} are "
                "there. Check the disk, and run the same command with --resume."
            )
        return value


def _bytes(value: Tensor) -> memoryview:
    assert value.is_contiguous()
    assert value.device.type == "cpu"
    return value.detach().flatten().view(torch.uint8).numpy().data
