"""Vector grid: pairs of neighbouring weights share a code, which fits normal numbers better than one code each."""

from dataclasses import dataclass
from functools import lru_cache
from importlib.resources import files
from typing import ClassVar

import numpy as np
import torch
from jaxtyping import Float, Int16, Int32
from torch import Tensor

from mezzotint.errors import ConfigError
from mezzotint.grids import scales
from mezzotint.grids.codebook import CodebookGrid

_CHUNK = 2**14  # pairs whose intermediate results stay in the cache
_MOST_SQUARES = 128


@dataclass(frozen=True, slots=True, kw_only=True)
class VectorGrid(CodebookGrid):
    """Settings of the vector grid: ``2^(2 bits)`` points of the plane, from k-means of pairs of normal numbers.

    Of the gain over a scalar table of as many bits, .17 dB comes from the shape of the cells (hexagons instead of
    squares) and the rest from how the points are spread (Gray 1998, Quantization; codebooks as in Q-Palette, arXiv
    2509.20214).

    Attributes:
        bits: of one weight, half of those of a code: 1.5 to 6 in steps of 0.5.
    """

    kind: ClassVar[str] = "vector"
    bits: float | int = 3.0

    def __post_init__(self) -> None:
        if not 1.5 <= self.bits <= 6 or not float(2 * self.bits).is_integer():
            raise ConfigError(
                f"grid.bits is {self.bits}; the vector grid takes 1.5 to 6 in steps of 0.5. Choose one of these."
            )
        scales.check_group_size(self.group_size, self.tile[1])

    @property
    def tile(self) -> tuple[int, int]:
        """Two columns."""
        return (1, 2)

    @property
    def index_bits(self) -> int:
        """Bits of the code of a pair."""
        return round(2 * self.bits)

    def codebook(self, dtype: torch.dtype, device: torch.device) -> "PairTable":
        """The points, made ready once."""
        return pair_table(self.index_bits, dtype, device)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PairTable:
    """Points of the plane, and which of them can be the nearest in each square of a lattice around them.

    Attributes:
        entries: the points.
        axes: their two coordinates.
        candidates: for each square, in increasing order, filled up with the first.
        side: squares in a row and in a column.
        reach: the lattice covers ``-reach`` to ``reach`` both ways; beyond, all points are tried.
    """

    width: ClassVar[int] = 2
    code_dtype: ClassVar[torch.dtype] = torch.int16
    deviation: ClassVar[float] = 1.0
    largest: float
    entries: Float[Tensor, "entries 2"]
    axes: tuple[Float[Tensor, " entries"], Float[Tensor, " entries"]]
    candidates: Int32[Tensor, "most squares"]
    side: int
    reach: float

    def nearest(self, x: Float[Tensor, "*rows k"]) -> Int16[Tensor, "*rows tiles"]:
        """Codes of the nearest points; of several at the same distance the lowest."""
        across, down = x.reshape(-1, 2).t().contiguous().unbind()
        parts = zip(across.split(_CHUNK), down.split(_CHUNK), strict=True)
        code = torch.cat([self._nearest_in_squares(*part) for part in parts])
        outside = (torch.maximum(across.abs(), down.abs()) >= self.reach).nonzero().squeeze(1)
        for part in outside.split(max(1, 2 * _CHUNK // len(self.entries))):
            code[part] = self._nearest_of_all(across[part], down[part])
        return code.to(torch.int16).view(*x.shape[:-1], x.shape[-1] // 2)

    def values(self, code: Int16[Tensor, "*rows tiles"]) -> Float[Tensor, "*rows k"]:
        """What codes stand for."""
        return self.entries.index_select(0, code.reshape(-1).int()).view(*code.shape[:-1], 2 * code.shape[-1])

    def _nearest_in_squares(
        self, across: Float[Tensor, " pairs"], down: Float[Tensor, " pairs"]
    ) -> Int32[Tensor, " pairs"]:
        per_unit = self.side / (2 * self.reach)
        column, row = (((x + self.reach) * per_unit).clamp_(0, self.side - 1).to(torch.int32) for x in (across, down))
        squares = column * self.side + row
        code = torch.zeros_like(squares)
        least = torch.full_like(across, torch.inf)
        for some in self.candidates:
            candidate = some.index_select(0, squares)
            x, y = (axis.index_select(0, candidate) for axis in self.axes)
            distance = (x - across).square_() + (y - down).square_()
            code = torch.where(distance < least, candidate, code)
            least = torch.minimum(distance, least)
        return code

    def _nearest_of_all(
        self, across: Float[Tensor, " pairs"], down: Float[Tensor, " pairs"]
    ) -> Int32[Tensor, " pairs"]:
        x, y = self.axes
        return ((x - across.unsqueeze(1)).square_() + (y - down.unsqueeze(1)).square_()).argmin(1).int()


@lru_cache(maxsize=64)
def pair_table(index_bits: int, dtype: torch.dtype, device: torch.device) -> PairTable:
    """The codebook of ``2^index_bits`` points in that dtype."""
    entries = pair_entries(index_bits).to(device, dtype)
    across, down = entries.t().contiguous().unbind()
    largest = float(entries.abs().max())
    side, reach = min(2 ** ((index_bits + 1) // 2 + 2), _MOST_SQUARES), largest + 1
    return PairTable(
        largest=largest,
        entries=entries,
        axes=(across, down),
        candidates=_candidates(index_bits, side, reach).to(device),
        side=side,
        reach=reach,
    )


def pair_entries(index_bits: int) -> Float[Tensor, "entries 2"]:
    """Points of least mean squared error for pairs of standard normal numbers, in float64.

    They are shipped, in float16 and one codebook after another from 8 points to 4096, because k-means is unstable:
    what codes stand for must not depend on the order in which a machine adds up. ``tests/grids/make_pairs.py`` makes
    them.

    Args:
        index_bits: 3 to 12.
    """
    with files("mezzotint.grids").joinpath("pairs.npy").open("rb") as file:
        every = torch.from_numpy(np.load(file))
    return every[2**index_bits - 8 : 2 ** (index_bits + 1) - 8].double()


@lru_cache(maxsize=16)
def _candidates(index_bits: int, side: int, reach: float) -> Int32[Tensor, "most squares"]:
    """Points that are nearest to some place in each square.

    From the middle of a square to any place in it is at most half a diagonal, so the nearest point to that place is at
    most a whole diagonal farther from the middle than the nearest point to the middle.
    """
    entries = pair_entries(index_bits)
    step = 2 * reach / side
    middle = torch.arange(side, dtype=torch.float64) * step + step / 2 - reach
    middles = torch.cartesian_prod(middle, middle)
    lists = []
    for part in middles.split(256):
        distance = torch.cdist(part, entries, compute_mode="donot_use_mm_for_euclid_dist")
        near = distance <= distance.amin(1, keepdim=True) + 2**0.5 * step * 1.001  # a little more, for rounding
        lists += [row.nonzero().squeeze(1) for row in near]
    most = max(len(found) for found in lists)
    filled = [torch.cat((found, found[:1].expand(most - len(found)))) for found in lists]
    return torch.stack(filled, dim=1).int()
