"""What every stage promises: protocols and frozen dataclasses of tensors.

Order of work: rewrite -> statistics -> target -> basis -> grid -> rounding -> format. Shapes are those of the stored
matrix seen as ``[out, in]``. A new grid, transform, target, rounding or format meets one protocol and nothing else.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal, NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mezzotint.core.aims import Aim, Quadratic
from mezzotint.core.bits import Bits
from mezzotint.core.curvature import Squares
from mezzotint.core.statistics import Statistics
from mezzotint.core.structure import Block, InputGroup, Matrix, ModelMap, NormEdge, Reader, Role

__all__ = [
    "Affine",
    "AffineGrid",
    "Aim",
    "Basis",
    "Bits",
    "Block",
    "FittedGrid",
    "Grid",
    "InputGroup",
    "Matrix",
    "ModelMap",
    "NormEdge",
    "Quadratic",
    "QuantizedWeight",
    "Reader",
    "Refinement",
    "Role",
    "Rounded",
    "Rounding",
    "Target",
    "Transform",
]


@runtime_checkable
class Target(Protocol):
    """Chooses the matrix to approximate.

    Attributes:
        norm_scale: where a residual is collected, inputs and stream of each token are divided by the root mean square
            of the stream that its output makes: of each stream's own (``own``), of the full-precision one for both
            (``original``), or not at all (``none``).
        decides: by the statistics of held-out tokens.
    """

    kind: ClassVar[str]

    @property
    def needs(self) -> frozenset[str]: ...  # noqa: D102
    @property
    def norm_scale(self) -> Literal["none", "own", "original"]: ...  # noqa: D102
    @property
    def decides(self) -> bool: ...  # noqa: D102

    def aim(self, weight: Float[Tensor, "out in"], fit: Statistics | None, held_out: Statistics | None) -> Aim:
        """The aim for ``weight``; ``fit`` and ``held_out`` are disjoint sets of tokens."""
        ...


# ---- basis ----------------------------------------------------------------------------------------------------------


@runtime_checkable
class Basis(Protocol):
    """An exactly invertible change of basis ``T' = L T R``, ``x' = R^-1 x``, ``y = L^-1 y'``.

    Attributes:
        stored: signs and channel scales: counted as side data.
        run_time: something is left to do when the model runs.
    """

    @property
    def kind(self) -> str: ...  # noqa: D102
    @property
    def stored(self) -> Mapping[str, Tensor]: ...  # noqa: D102
    @property
    def run_time(self) -> bool: ...  # noqa: D102

    def weight(self, w: Float[Tensor, "out in"]) -> Float[Tensor, "out in"]:
        """The matrix in the new basis."""
        ...

    def inverse(self, w: Float[Tensor, "out in"]) -> Float[Tensor, "out in"]:
        """The matrix back in the original basis, exactly."""
        ...

    def statistics(self, s: Statistics) -> Statistics:
        """The statistics of ``x' = R^-1 x``."""
        ...

    def input(self, x: Float[Tensor, "tokens in"]) -> Float[Tensor, "tokens in"]:
        """``x' = R^-1 x`` of every token, before the matrix in the new basis."""
        ...

    def output(self, y: Float[Tensor, "tokens out"]) -> Float[Tensor, "tokens out"]:
        """``y = L^-1 y'`` of every token, after the matrix in the new basis."""
        ...


@runtime_checkable
class Transform(Protocol):
    """Fits one basis per matrix; the input side is shared by an input group.

    Attributes:
        run_time: its bases leave something to do when the model runs.
    """

    kind: ClassVar[str]
    needs: ClassVar[frozenset[str]]
    run_time: ClassVar[bool]

    def specs(self, shape: tuple[int, int]) -> Mapping[str, tuple[torch.dtype, tuple[int, ...]]]:
        """Dtype and shape of what a basis for a matrix of that shape stores; known without weights."""
        ...

    def restore(self, shape: tuple[int, int], stored: Mapping[str, Tensor]) -> Basis:
        """The basis that stored these tensors."""
        ...

    def fit(
        self,
        aims: Sequence[Aim],
        fit: Statistics | None,
        probe: Callable[[Tensor], float] | None,
        generator: torch.Generator,
    ) -> tuple[Basis, ...]:
        """One basis per aim."""
        ...


# ---- grid and rounding ----------------------------------------------------------------------------------------------


class Affine(NamedTuple):
    """``value = scale * code + offset`` per ``[out, group]``; ``group_size`` columns a group, in the original order."""

    scale: Float[Tensor, "out groups"]
    offset: Float[Tensor, "out groups"]
    group_size: int


@runtime_checkable
class Grid(Protocol):
    """Settings of one colour of the palette: frozen, hashable, known without weights.

    Attributes:
        bits: of one code.
        tile: (rows, columns) encoded together: (1, 1) scalar, (1, 2) vector, (16, 16) trellis.
        multiple: what out and in are padded to, or must divide if ``pads`` is false.
        rowwise: `fit` gives rows (multiples of ``tile[0]``) the same parameters with and without the other rows.
    """

    kind: ClassVar[str]

    @property
    def bits(self) -> float: ...  # noqa: D102
    @property
    def tile(self) -> tuple[int, int]: ...  # noqa: D102
    @property
    def multiple(self) -> tuple[int, int]: ...  # noqa: D102
    @property
    def pads(self) -> bool: ...  # noqa: D102
    @property
    def needs(self) -> frozenset[str]: ...  # noqa: D102
    @property
    def rowwise(self) -> bool: ...  # noqa: D102

    def resolve(self, shape: tuple[int, int], dtype: torch.dtype, widths: Collection[int] = ()) -> "Grid":
        """The grid with every ``auto`` setting decided for a matrix of that shape in a checkpoint of that dtype.

        ``widths`` are those of all matrices that had better share what is decided.
        """
        ...

    def stored_bits(self, shape: tuple[int, int]) -> Bits:
        """Exact bits of a matrix of that shape, padding included."""
        ...

    def specs(self, shape: tuple[int, int]) -> Mapping[str, tuple[torch.dtype, tuple[int, ...]]]:
        """Dtype and shape of the tensors that store a matrix of that shape, padding left out; known without weights."""
        ...

    def restore(self, shape: tuple[int, int], stored: Mapping[str, Tensor]) -> tuple[Tensor, "FittedGrid"]:
        """Codes and grid that `FittedGrid.store` stored; parameters in float32, on the device of the tensors."""
        ...

    def fit(self, target: Float[Tensor, "out in"], importance: Float[Tensor, " in"] | None) -> "FittedGrid":
        """Parameters for one target; ``importance`` is the mean square of each input (diag H)."""
        ...


@runtime_checkable
class FittedGrid(Protocol):
    """A grid with parameters for one matrix, already rounded to the dtype they are stored in."""

    @property
    def grid(self) -> Grid: ...  # noqa: D102
    @property
    def parameters(self) -> Mapping[str, Tensor]: ...  # noqa: D102
    @property
    def shape(self) -> tuple[int, int]: ...  # noqa: D102
    @property
    def affine(self) -> Affine | None: ...  # noqa: D102

    def new_code(self) -> Tensor:
        """An empty code tensor; the layout is the grid's own."""
        ...

    def encode_(
        self, code: Tensor, values: Float[Tensor, "out k"], columns: Int[Tensor, " k"]
    ) -> Float[Tensor, "out k"]:
        """Write the codes of whole tiles of columns into ``code`` and return what they decode to."""
        ...

    def encode(self, values: Float[Tensor, "out in"]) -> Tensor:
        """The nearest codes of a whole matrix."""
        ...

    def feed_(
        self,
        code: Tensor,
        work: Float[Tensor, "out k"],
        upper: Float[Tensor, "k k"],
        columns: Int[Tensor, " k"],
    ) -> Float[Tensor, "out k"]:
        """Round tiles of columns in turn, feeding each error forward: `mezzotint.grids.feedback.feed_tiles_`."""
        ...

    def decode(self, code: Tensor) -> Float[Tensor, "out in"]:
        """The values that the codes stand for."""
        ...

    def store(self, code: Tensor, shape: tuple[int, int]) -> Mapping[str, Tensor]:
        """The tensors of `Grid.specs` for these codes; ``shape`` is that of the matrix without padding."""
        ...

    def take_rows(self, rows: slice) -> "FittedGrid":
        """The same grid for some rows (multiples of ``tile[0]``): how ranks share a matrix."""
        ...

    def join_rows(self, code: Tensor, join: Callable[[Tensor, int], Tensor]) -> tuple[Tensor, "FittedGrid"]:
        """Codes and grid of the matrix of which this grid has some rows, and ``code`` their codes.

        Args:
            code: of these rows.
            join: gives a tensor and what the other rows have in its place, one behind another on an axis.
        """
        ...

    def scaled(self, factor: float) -> "FittedGrid":
        """The grid of ``factor`` times the values."""
        ...


@runtime_checkable
class AffineGrid(FittedGrid, Protocol):
    """A fitted grid of values ``scale * (code - zero_point)`` per ``[out, group]``: what refinement can improve."""

    @property
    def scale(self) -> Float[Tensor, "out groups"]: ...  # noqa: D102
    @property
    def zero_point(self) -> Float[Tensor, "out groups"]: ...  # noqa: D102
    @property
    def group_size(self) -> int: ...  # noqa: D102

    def storable(self, scale: Float[Tensor, "*any"]) -> Float[Tensor, "*any"]:
        """Scales rounded to the dtype they are stored in."""
        ...

    def with_parameters(self, scale: Tensor, zero_point: Tensor) -> "AffineGrid":
        """The grid with other parameters, which can be stored exactly."""
        ...

    def feed_(
        self,
        code: Tensor,
        work: Float[Tensor, "out k"],
        upper: Float[Tensor, "k k"],
        columns: Int[Tensor, " k"],
        *,
        taken: Float[Tensor, "blocks size size"] | None = None,
    ) -> Float[Tensor, "out k"]:
        """As of every grid; with ``taken`` rows make up for each other too: `Curvature.feedback`."""
        ...

    def descend_(
        self,
        code: Tensor,
        value: Float[Tensor, "out k"],
        gradient: Float[Tensor, "out k"],
        gram: Float[Tensor, "k k"],
        columns: Int[Tensor, " k"],
        *,
        curvature: Float[Tensor, "blocks size size"] | None = None,
    ) -> None:
        """Move columns to their best codes in turn: `mezzotint.kernels.descend_block_`. Modifies code and value."""
        ...

    def refit_(
        self, scale: Tensor, zero_point: Tensor, pulls: Tensor, bends: Tensor, flat: Tensor, *, joint: Squares = None
    ) -> Float[Tensor, "2 out"]:
        """Move parameters of one group of columns to the best for its codes: `mezzotint.kernels.refit_group_`."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Rounded:
    """Codes with the grid they belong to.

    Attributes:
        value: what the codes decode to, ``[out, in]``.
        before: the values at the moment of rounding: plain rounding of them gives the codes.
        decisions: what was chosen and why, for the report.
    """

    code: Tensor
    grid: FittedGrid
    value: Float[Tensor, "out in"]
    before: Float[Tensor, "out in"] | None = None
    decisions: Mapping[str, float | str] = field(default_factory=dict)


@runtime_checkable
class Refinement(Protocol):
    """Improves the result of a rounding on the layer's quadratic."""

    kind: ClassVar[str]

    def refuses(self, grid: Grid) -> str | None:
        """Why it cannot serve a grid, or None."""
        ...

    def refine(
        self,
        rounded: Rounded,
        target: Float[Tensor, "out in"],
        quadratic: Quadratic,
        round_on: Callable[[FittedGrid], Rounded],
    ) -> Rounded:
        """A result whose quadratic is at most that of ``rounded``, row by row or block by block of its curvature.

        ``round_on`` rounds the target again, in the same way, on another grid.
        """
        ...


@runtime_checkable
class Rounding(Protocol):
    """Chooses the codes, given target, grid and statistics.

    Attributes:
        needs: field names of Statistics it reads.
        accepts_corrected: may be given an aim that already contains the correction for upstream error.
        scalar_only: serves grids of tile (1, 1) only.
    """

    kind: ClassVar[str]
    needs: ClassVar[frozenset[str]]
    accepts_corrected: ClassVar[bool]
    scalar_only: ClassVar[bool]

    def round(self, aim: Aim, grid: FittedGrid, fit: Statistics | None) -> Rounded:
        """Codes for the aim on that grid."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantizedWeight:
    """One matrix as it is stored: codes, grid parameters, basis."""

    shape: tuple[int, int]
    code: Tensor
    grid: FittedGrid
    basis: Basis | None = None

    def dense(self, dtype: torch.dtype = torch.float32) -> Float[Tensor, "out in"]:
        """The matrix that engines compute with, padding cut off."""
        rows, columns = self.shape
        value = self.grid.decode(self.code)[:rows, :columns]
        if self.basis is not None:
            value = self.basis.inverse(value)
        return value.to(dtype)

    def bits(self) -> Bits:
        """Exact bits, the basis included."""
        code, side = self.grid.grid.stored_bits(self.shape)
        stored = {} if self.basis is None else self.basis.stored
        return Bits(code, side + sum(t.numel() * t.element_size() * 8 for t in stored.values()))
