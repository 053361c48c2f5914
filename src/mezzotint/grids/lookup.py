"""Lookup grid: one fixed table of values for all weights, as optimal for normal numbers as a scalar grid can be."""

from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar, Literal

import torch
from jaxtyping import Float, Int32, UInt8
from torch import Tensor

from mezzotint.errors import ConfigError
from mezzotint.grids import scales
from mezzotint.grids.codebook import CodebookGrid

Table = Literal["gaussian", "nf4", "even"]
_NF4_BITS = 4
_REACH = 2.4


@dataclass(frozen=True, slots=True, kw_only=True)
class LookupGrid(CodebookGrid):
    """Settings of the lookup grid.

    Attributes:
        bits: of one code, 2 to 8.
        table: ``gaussian``, the values of least squared error for normal numbers (Lloyd-Max), symmetric and without a
            zero; ``nf4``, the 4-bit NormalFloat of QLoRA, with a zero; ``even``, evenly spaced up to 2.4 deviations
            on either side (QuIP, arXiv 2307.13304, whose scale is 2.4 times the root mean square of a matrix).
    """

    kind: ClassVar[str] = "lookup"
    bits: int = 4
    table: Table = "gaussian"

    def __post_init__(self) -> None:
        if not 2 <= self.bits <= 8:
            raise ConfigError(f"grid.bits is {self.bits}; the lookup grid takes 2 to 8. Choose one of these.")
        if self.table == "nf4" and self.bits != _NF4_BITS:
            raise ConfigError(f"grid.bits is {self.bits}; the table 'nf4' has 4. Use grid.table=gaussian for others.")
        scales.check_group_size(self.group_size)

    @property
    def tile(self) -> tuple[int, int]:
        """Scalar."""
        return (1, 1)

    @property
    def index_bits(self) -> int:
        """Bits of one code."""
        return self.bits

    def codebook(self, dtype: torch.dtype, device: torch.device) -> "LookupTable":
        """The table, made once."""
        return lookup_table(self.table, self.bits, dtype, device)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LookupTable:
    """Increasing values, and how the nearest one is found: in a few operations, where a binary search takes many.

    The line is cut into cells so narrow that each has at most one of the points halfway between neighbours. `_place` is
    monotone, rounding included: points in earlier cells are lower than x, those in later cells higher, and only the one
    in its own cell has to be compared.

    Attributes:
        halfway: the points between neighbouring values, and infinity.
        before: for each cell, how many of these points lie in earlier ones.
    """

    width: ClassVar[int] = 1
    code_dtype: ClassVar[torch.dtype] = torch.uint8
    deviation: float
    largest: float
    entries: Float[Tensor, " levels"]
    halfway: Float[Tensor, " levels"]
    before: Int32[Tensor, " cells"]

    def nearest(self, x: Float[Tensor, "*rows k"]) -> UInt8[Tensor, "*rows k"]:
        """Codes of the nearest values; a value halfway between two goes to the lower."""
        flat = x.reshape(-1)
        code = self.before.index_select(0, _place(flat, self.halfway, len(self.before)))
        code += flat > self.halfway.index_select(0, code)
        return code.to(torch.uint8).view(x.shape)

    def values(self, code: UInt8[Tensor, "*rows k"]) -> Float[Tensor, "*rows k"]:
        """What codes stand for."""
        return self.entries.index_select(0, code.reshape(-1).int()).view(code.shape)


def _place(x: Float[Tensor, " n"], halfway: Float[Tensor, " levels"], cells: int) -> Int32[Tensor, " n"]:
    """The cell of each value; the cells divide the stretch from the first to the last finite point evenly."""
    return ((x - halfway[0]) * (cells / (halfway[-2] - halfway[0]))).clamp_(0, cells - 1).to(torch.int32)


@lru_cache(maxsize=64)
def lookup_table(table: Table, bits: int, dtype: torch.dtype, device: torch.device) -> LookupTable:
    """The table of that name in that dtype."""
    if table == "nf4":
        entries, deviation = nf4_levels()
    else:
        entries = gaussian_levels(2**bits) if table == "gaussian" else even_levels(2**bits)
        deviation = 1.0
    between = ((entries[1:] + entries[:-1]) / 2).to(device, dtype)
    halfway = torch.cat((between, between.new_full((1,), torch.inf)))
    cells = 2**bits
    while len((places := _place(between, halfway, cells)).unique()) < len(between):
        cells *= 2
    return LookupTable(
        deviation=deviation,
        largest=float(entries.abs().max()),
        entries=entries.to(device, dtype),
        halfway=halfway,
        before=torch.searchsorted(places, torch.arange(cells, dtype=torch.int32, device=device), out_int32=True),
    )


@lru_cache(maxsize=16)
def gaussian_levels(levels: int) -> Float[Tensor, " levels"]:
    """The values of least mean squared error for standard normal numbers (Lloyd 1957, Max 1960), in float64.

    Each value is the mean of its cell, ``c_i = (phi(a_i) - phi(b_i)) / (Phi(b_i) - Phi(a_i))``, and the cell reaches
    halfway to its neighbours. Alternating the two converges slowly, by a factor of ``1 - O(levels^-2)``; Newton's
    method on the positive half, whose Jacobian is tridiagonal, takes six steps from the quantiles of the density
    ``phi^(1/3)`` that is optimal for many levels (Panter and Dite 1951), which are those of variance 3.

    Args:
        levels: even, at least 2.

    Example:
        >>> gaussian_levels(4)
        tensor([-1.5104, -0.4528,  0.4528,  1.5104], dtype=torch.float64)
    """
    half = levels // 2
    places = (torch.arange(half, dtype=torch.float64) + 0.5 + half) / levels
    c = 3**0.5 * torch.special.ndtri(places)
    for _ in range(6):  # from .5 each step squares the error, down to the noise: 1e-13 for 16 levels, 5e-11 for 256
        mean, to_lower, to_upper = _cells(c)
        jacobian = (
            torch.diag(1 - (to_lower + to_upper) / 2)
            - torch.diag(to_lower[1:] / 2, -1)
            - torch.diag(to_upper[:-1] / 2, 1)
        )
        c = c + torch.linalg.solve(jacobian, mean - c)
    return torch.cat((-c.flip(0), c))


def _cells(c: Float[Tensor, " half"]) -> tuple[Tensor, Tensor, Tensor]:
    """Mean of each cell of the positive values, and how it moves with its lower and its upper end.

    The first lower end is zero, by symmetry, and the last upper end infinity: neither moves.
    """
    between = (c[1:] + c[:-1]) / 2
    low = torch.cat((between.new_zeros(1), between))
    high = torch.cat((between, between.new_full((1,), torch.inf)))
    low_density, high_density = (torch.exp(-x * x / 2) / (2 * torch.pi) ** 0.5 for x in (low, high))
    mass = torch.special.ndtr(-low) - torch.special.ndtr(-high)
    mean = (low_density - high_density) / mass
    to_lower, to_upper = low_density * (mean - low) / mass, high_density * (high - mean) / mass
    to_lower[0], to_upper[-1] = 0, 0
    return mean, to_lower, to_upper


def even_levels(levels: int) -> Float[Tensor, " levels"]:
    """Evenly spaced values from -2.4 to 2.4, symmetric and without a zero, in float64."""
    half = _REACH * (2 * torch.arange(levels // 2, dtype=torch.float64) + 1) / (levels - 1)
    return torch.cat((-half.flip(0), half))


def nf4_levels() -> tuple[Float[Tensor, " levels"], float]:
    """The 16 values of NormalFloat and the deviation of the normal numbers they are quantiles of, in float64.

    Quantiles of the normal distribution at evenly spaced probabilities, divided by the largest: eight above zero, from
    ``p`` down to 1/2, seven below, from ``1 - p`` up to 1/2, and zero itself; ``p`` lies halfway between ``1 - 1/32``
    and ``1 - 1/30``, to the seven digits that give the list of the paper (QLoRA, arXiv 2305.14314, section 3 and
    appendix E).
    """
    p = 0.9677083
    above = torch.special.ndtri(torch.linspace(0.5, p, 9, dtype=torch.float64)[1:])
    below = -torch.special.ndtri(torch.linspace(p, 0.5, 8, dtype=torch.float64)[:-1])
    largest = above[-1]
    return torch.cat((below, above.new_zeros(1), above)) / largest, 1 / float(largest)
