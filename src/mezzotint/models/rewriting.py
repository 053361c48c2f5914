"""Exact changes of a model's parameters, applied whenever one is read: nothing but factors is kept in memory."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

Change = Callable[[Tensor], Tensor]
"""Takes a parameter's value, in float32 or wider and its own to modify, and gives the changed one."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Scaled:
    """``(value + shift) * factor - shift``.

    Attributes:
        factor: broadcast against the parameter as it is stored, or against one expert of it.
        expert: which one, of a stacked parameter.
        shift: 1 for a gain that is stored less one.
        dtype: what the result is rounded to, where it is stored unquantized; None leaves it in float32 or wider.
    """

    factor: Tensor
    expert: int | None = None
    shift: float = 0.0
    dtype: torch.dtype | None = None

    def __call__(self, value: Tensor) -> Tensor:
        """The changed parameter; modifies ``value``."""
        piece = value if self.expert is None else value[self.expert]
        changed = (piece + self.shift) * self.factor.to(piece) - self.shift
        piece.copy_(changed if self.dtype is None else changed.to(self.dtype))
        return value


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Turned:
    """Vectors along one axis, or pieces of them, times a square matrix from the right; computed and left in float64.

    Attributes:
        matrix: in float64; an axis longer than it holds several pieces, each of which is turned.
        axis: counted from the end.
        index: places on that axis, in the order in which they make up pieces; None is all of them.
    """

    matrix: Tensor
    axis: int = -1
    index: Tensor | None = None

    def __call__(self, value: Tensor) -> Tensor:
        """The changed parameter."""
        moved = value.double().movedim(self.axis, -1)
        piece = moved if self.index is None else moved[..., self.index]
        matrix = self.matrix.to(moved.device)
        turned = (piece.reshape(*piece.shape[:-1], -1, len(matrix)) @ matrix).reshape(piece.shape)
        if self.index is not None:
            moved = moved.clone()
            moved[..., self.index] = turned
            turned = moved
        return turned.movedim(-1, self.axis).contiguous()


@dataclass(slots=True)
class Rewriting:
    """Changes by parameter, in the order in which they were added."""

    _changes: dict[str, list[Change]] = field(default_factory=dict)

    def add(self, parameter: str, change: Change) -> None:
        """Apply ``change`` to the parameter from now on, behind those it has already."""
        self._changes.setdefault(parameter, []).append(change)

    def __contains__(self, parameter: object) -> bool:
        return parameter in self._changes

    @contextmanager
    def kept(self) -> Iterator[None]:
        """Take back at the end what is added meanwhile."""
        before = {name: list(changes) for name, changes in self._changes.items()}
        try:
            yield
        finally:
            self._changes = before

    def apply(self, parameter: str, value: Tensor) -> Tensor:
        """What becomes of a parameter's value in the checkpoint: in float32 or wider where it changes."""
        changes = self._changes.get(parameter, ())
        if changes:
            value = value.to(torch.promote_types(value.dtype, torch.float32), copy=True)
        for change in changes:
            value = change(value)
        return value
