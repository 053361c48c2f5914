"""Where tensors live: in memory up to a budget, in a file past it."""

import math
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mezzotint.errors import NonFiniteError
from mezzotint.storage.scratch import Scratch


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


class _Place(NamedTuple):
    """A piece of the file."""

    offset: int
    size: int


@contextmanager
def temporary_stores(count: int, memory: int | None, folder: Path | None = None) -> Iterator[list[Any]]:
    """Stores and, last, a shelf with a budget together, and files for what does not fit.

    Args:
        count: of stores.
        memory: bytes that they may hold; None is no limit.
        folder: of the files, which have no name in it; None is the system's, where they get a folder of their own.
    """
    budget = Budget(memory)
    with TemporaryDirectory(prefix="mezzotint-") if folder is None else nullcontext(folder) as own:
        stores = [*(Store(budget, Path(own)) for _ in range(count)), Shelf(budget, Path(own))]
        try:
            yield stores
        finally:
            for store in stores:
                store.close()


class Store:
    """Tensors by index; those that do not fit the budget go to a temporary file.

    Args:
        budget: shared with other stores.
        folder: where the temporary file is made when it is needed.
    """

    def __init__(self, budget: Budget, folder: Path) -> None:
        self._budget = budget
        self._folder = folder
        self._held: dict[int, Tensor] = {}
        self._spilled: dict[int, tuple[_Place, torch.Size, torch.dtype, torch.device]] = {}
        self._file: Scratch | None = None
        self._end = 0
        self._free: list[_Place] = []

    def put(self, index: int, value: Tensor) -> None:
        """Keep a tensor; replaces the one of that index."""
        nbytes = value.numel() * value.element_size()
        if index in self._held:
            self._budget.give_back(self._held.pop(index).nbytes)
        if self._budget.take(nbytes):
            self._held[index] = value
            self._release(index)
            return
        if self._file is None:
            self._file = Scratch(self._folder, "activations")
        known = self._spilled.get(index)
        if known is None or known[0].size < nbytes:
            self._release(index)
            place = self._place(nbytes)
        else:
            place = known[0]
        self._file.write(value.detach().cpu().contiguous(), place.offset)
        self._spilled[index] = (place, value.shape, value.dtype, value.device)

    def get(self, index: int) -> Tensor:
        """The tensor of that index."""
        if index in self._held:
            return self._held[index]
        place, shape, dtype, device = self._spilled[index]
        assert self._file is not None
        value = self._file.read_(torch.empty(shape, dtype=dtype), place.offset)
        return value.to(device)

    def pop(self, index: int) -> Tensor:
        """The tensor of that index, which is forgotten; its place in the file is used again."""
        value = self.get(index)
        if index in self._held:
            self._budget.give_back(self._held.pop(index).nbytes)
        else:
            self._release(index)
        return value

    def close(self) -> None:
        """Forget everything and remove the file."""
        for value in self._held.values():
            self._budget.give_back(value.nbytes)
        self._held.clear()
        self._spilled.clear()
        if self._file is not None:
            self._file.close()
            self._file = None

    @property
    def spilled_bytes(self) -> int:
        """Size of the file."""
        return self._end

    def _place(self, nbytes: int) -> "_Place":
        """A free place of at least that size: the smallest one given back, or the end of the file."""
        fitting = [place for place in self._free if place.size >= nbytes]
        if fitting:
            best = min(fitting, key=lambda place: place.size)
            self._free.remove(best)
            return best
        self._end += nbytes
        return _Place(self._end - nbytes, nbytes)

    def _release(self, index: int) -> None:
        """Give a spilled tensor's place back, if it has one."""
        known = self._spilled.pop(index, None)
        if known is not None:
            self._free.append(known[0])


class Shelf:
    """Tensors that get a key when they are kept.

    Args:
        budget: shared with stores.
        folder: where what does not fit the budget is spilled.
    """

    def __init__(self, budget: Budget, folder: Path) -> None:
        self._store = Store(budget, folder)
        self._next_key = 0

    def hold(self, value: Tensor) -> int:
        """Keep a tensor; gives its key."""
        self._next_key += 1
        self._store.put(self._next_key, value)
        return self._next_key

    def held(self, key: int) -> Tensor:
        """A tensor that is kept."""
        return self._store.get(key)

    def release(self, key: int) -> Tensor:
        """Forget a tensor that is kept; gives it."""
        return self._store.pop(key)

    def close(self) -> None:
        """Forget everything and remove the file."""
        self._store.close()


def check_finite(name: str, value: Tensor) -> None:
    """Refuse a tensor of the checkpoint with NaN or infinity in it.

    Raises:
        NonFiniteError: names it, with how many there are.
    """
    # the sum of finite weights is finite, and takes a fraction of the time of looking at each
    if not math.isfinite(float(value.sum(dtype=torch.float32))) and not torch.isfinite(value).all():
        raise NonFiniteError(
            f"{name} holds NaN or infinity in {int((~torch.isfinite(value)).sum())} of {value.numel()} values; the "
            "checkpoint is broken. Download it again, or give another one."
        )
