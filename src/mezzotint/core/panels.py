"""Square matrices of sums that are too large for memory: stored on disk, processed in panels of rows."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.utils import _pytree as pytree

PANEL_BYTES = 2**26  # in memory at a time; smaller squares need no file
_aten = torch.ops.aten


def is_wide(width: int, itemsize: int = 4) -> bool:
    """Whether a square of so many columns is larger than a panel."""
    return width * width * itemsize > PANEL_BYTES


@runtime_checkable
class Storage(Protocol):
    """Bytes somewhere else, zero at first."""

    def write(self, value: Tensor, offset: int) -> None:
        """Put a contiguous tensor of the CPU there."""
        ...

    def read_(self, value: Tensor, offset: int) -> Tensor:
        """Fill a contiguous tensor of the CPU from there; gives it back."""
        ...


def mirror_(square: Float[Tensor, "n n"]) -> None:
    """Make a square symmetric to the last bit by what lies above its diagonal. Modifies it.

    A product of a matrix with its own transpose is not that on every processor: sums of the two sides may be in
    another order.
    """
    square.copy_(square.triu() + square.triu(1).t())


class StoredSquare(Tensor):
    """A square matrix of the CPU that lies in a storage.

    Products from the left, its diagonal and copies of rows take a panel of memory; whatever else is done with it reads
    the whole matrix first. It is changed by `panels_` only.

    Args:
        width: rows and columns.
        dtype: of its values.
        storage: as large as it is.
    """

    @staticmethod
    def __new__(cls, width: int, dtype: torch.dtype, storage: Storage) -> "StoredSquare":  # noqa: D102
        make = torch.Tensor._make_wrapper_subclass  # noqa: SLF001  # pyright: ignore[reportAttributeAccessIssue]
        return make(cls, (width, width), dtype=dtype)

    def __init__(self, width: int, dtype: torch.dtype, storage: Storage) -> None:
        self._storage = storage
        self._step = max(1, PANEL_BYTES // (width * dtype.itemsize))

    @classmethod
    def __torch_dispatch__(
        cls, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Do by panels what can be, the rest on the whole matrix."""
        match func, args:
            case _aten.mm.default, (Tensor() as left, StoredSquare() as square) if not isinstance(left, StoredSquare):
                return square.product_(left, left.new_zeros(left.shape))
            case _aten.addmm_.default, (Tensor() as into, Tensor() as left, StoredSquare() as square) if not kwargs:
                return square.product_(left, into)
            case _aten.diagonal.default, (StoredSquare() as square,):
                return torch.cat([rows[:, start:].diagonal() for start, rows in square.read()])
            case _aten.index.Tensor, (StoredSquare() as square, [Tensor() as chosen]) if chosen.dim() == 1:
                return square.rows(chosen)
            case ((_aten.empty_like.default | _aten.zeros_like.default), (StoredSquare() as square,)):
                return func(torch.empty(1, dtype=square.dtype).expand(square.shape), **(kwargs or {})).contiguous()
            case _aten.detach.default, (StoredSquare() as square,):
                return square
            case _:
                if func._schema.is_mutable:  # noqa: SLF001
                    raise TypeError(f"{func} would change sums that are stored elsewhere; change their panels instead")
                whole = pytree.tree_map_only(cls, cls.whole, (args, dict(kwargs or {})))
                return func(*whole[0], **whole[1])

    def whole(self) -> Float[Tensor, "n n"]:
        """All of it, in memory."""
        return self._storage.read_(torch.empty(self.shape, dtype=self.dtype), 0)

    def panels_(self) -> Iterator[tuple[int, Float[Tensor, "rows n"]]]:
        """Rows from the one named on; what is done to them is kept."""
        for start, rows in self.read():
            yield start, rows
            self._storage.write(rows, self._offset(start))

    def reflect_(self) -> None:
        """Fill in what lies left of the diagonal in each panel from what lies above it."""
        for start, rows in self.panels_():
            mirror_(rows[:, start : start + len(rows)])
            for above in range(0, start, self._step):
                block = rows.new_empty(self._step, len(rows))
                for row in range(self._step):
                    self._storage.read_(block[row], self._offset(above + row, start))
                rows[:, above : above + self._step] = block.t()

    def read(self) -> Iterator[tuple[int, Float[Tensor, "rows n"]]]:
        """Rows from the one named on."""
        width = self.shape[0]
        for start in range(0, width, self._step):
            rows = torch.empty(min(self._step, width - start), width, dtype=self.dtype)
            yield start, self._storage.read_(rows, self._offset(start))

    def rows(self, chosen: Int[Tensor, " rows"]) -> Float[Tensor, "rows n"]:
        """Copies of some rows."""
        found = torch.empty(len(chosen), self.shape[1], dtype=self.dtype)
        for row, index in zip(found, chosen.tolist(), strict=True):
            self._storage.read_(row, self._offset(index))
        return found

    def product_(self, left: Float[Tensor, "m n"], into: Float[Tensor, "m n"]) -> Float[Tensor, "m n"]:
        """``into + left @ self``, in its place."""
        for start, rows in self.read():
            into.addmm_(left[:, start : start + len(rows)], rows)
        return into

    def _offset(self, row: int, column: int = 0) -> int:
        return (row * self.shape[1] + column) * self.dtype.itemsize


def read(matrix: Float[Tensor, "m n"], step: int) -> Iterator[tuple[int, Float[Tensor, "rows n"]]]:
    """Rows of a matrix from the one named on: so many, or of one in a storage as many as a panel has."""
    return matrix.read() if isinstance(matrix, StoredSquare) else _pieces(matrix, step)


def panels_(matrix: Float[Tensor, "m n"], step: int) -> Iterator[tuple[int, Float[Tensor, "rows n"]]]:
    """The same, to be changed in place."""
    return matrix.panels_() if isinstance(matrix, StoredSquare) else _pieces(matrix, step)


def _pieces(matrix: Float[Tensor, "m n"], step: int) -> Iterator[tuple[int, Float[Tensor, "rows n"]]]:
    for start in range(0, len(matrix), step):
        yield start, matrix[start : start + step]


def in_memory(square: Float[Tensor, "n n"]) -> Float[Tensor, "n n"]:
    """A matrix that pieces will be taken of again and again."""
    return square.whole() if isinstance(square, StoredSquare) else square
