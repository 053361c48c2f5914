"""Trellis-coded weights: tiles of 16 x 16 as one path through a trellis, at any eighth of a bit from 1 to 6."""

import tomllib
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from importlib.resources import files
from typing import ClassVar, Literal, NamedTuple

import torch
from jaxtyping import Float, Int, Int32
from torch import Tensor

from mezzotint import kernels
from mezzotint.core.contracts import Bits
from mezzotint.errors import ConfigError
from mezzotint.grids.feedback import feed_tiles_

SIDE = 16  # of a tile
RATES = range(8, 49)  # bits per eight weights
_PRECISION = 2.0**11  # of float16


class Measured(NamedTuple):
    """What the code does to Gaussian weights of unit variance.

    Attributes:
        factor: to multiply them by before encoding, for the least error.
        distortion: mean squared error.
    """

    factor: float
    distortion: float


@lru_cache
def measured(states: int) -> Mapping[int, Measured]:
    """The committed table of `benchmarks/trellis_table.py`, by rate."""
    table = tomllib.loads(files("mezzotint.grids").joinpath("trellis_table.toml").read_text(encoding="utf-8"))
    rows = table[f"states_{states}"]["rates"]
    return {row["rate"]: Measured(row["factor"], row["distortion"]) for row in rows}


@dataclass(frozen=True, slots=True, kw_only=True)
class TrellisGrid:
    """Settings of the trellis code.

    A bitshift trellis with a computed code (QTIP, arXiv 2406.11235) whose shift varies with the position, so that one
    code serves every rate; docs/format.md has it bit by bit.

    Attributes:
        bits: of a weight, a multiple of 1/8 from 1 to 6.
        states: bits of the trellis' state: 12, fast to encode, or 16, 3 to 10 % less error up to 4 bits, at a
            sixteenth of the speed.
        scale_per: one scale for the ``matrix``, for weights that a transform has made alike; or one a ``row``.
        window: steps on both sides of the seam that the search looks at to close the path, 1 to 128.
    """

    kind: ClassVar[str] = "trellis"
    bits: float | int = 3.0
    states: int = 12
    scale_per: Literal["matrix", "row"] = "matrix"
    window: int = 32

    def __post_init__(self) -> None:
        if self.bits * 8 not in RATES:
            raise ConfigError(f"grid.bits is {self.bits}; the trellis takes eighths from 1 to 6, such as 3.25.")
        if self.states not in (12, 16):
            raise ConfigError(f"grid.states is {self.states}; it must be 12 (fast) or 16 (best).")
        if not 1 <= self.window <= 128:
            raise ConfigError(f"grid.window is {self.window}; it must be from 1 to 128 (default 32).")

    @property
    def tile(self) -> tuple[int, int]:
        """One path."""
        return (SIDE, SIDE)

    @property
    def multiple(self) -> tuple[int, int]:
        """Whole tiles."""
        return (SIDE, SIDE)

    @property
    def pads(self) -> bool:
        """Other shapes are filled with zeros."""
        return True

    @property
    def needs(self) -> frozenset[str]:
        """No statistics."""
        return frozenset()

    @property
    def rowwise(self) -> bool:
        """Unless there is one scale for the whole matrix."""
        return self.scale_per != "matrix"

    @property
    def rate(self) -> int:
        """Bits per eight weights."""
        return int(self.bits * 8)

    def resolve(self, shape: tuple[int, int], dtype: torch.dtype, widths: Collection[int] = ()) -> "TrellisGrid":
        """Nothing is left open."""
        return self

    def stored_bits(self, shape: tuple[int, int]) -> Bits:
        """Codes of the weights; padding to whole tiles, and scales: float16 a row or float32 a matrix."""
        return Bits.of(-(-shape[0] * shape[1] * self.rate // 8), self.specs(shape))

    def specs(self, shape: tuple[int, int]) -> Mapping[str, tuple[torch.dtype, tuple[int, ...]]]:
        """Codes of whole tiles, and scales: of the rows without padding, or of the matrix."""
        rows, columns = shape
        scale = (torch.float16, (rows,)) if self.scale_per == "row" else (torch.float32, (1,))
        return {"packed": (torch.int32, (-(-columns // SIDE), -(-rows // SIDE), self.rate)), "scale": scale}

    def restore(
        self, shape: tuple[int, int], stored: Mapping[str, Tensor]
    ) -> tuple[Int32[Tensor, "in_tiles out_tiles words"], "FittedTrellis"]:
        """The inverse of `FittedTrellis.store`; rows of the padding have scale zero."""
        rows, columns = (-(-size // SIDE) * SIDE for size in shape)
        scale = stored["scale"].float()
        if self.scale_per == "row":
            scale = torch.nn.functional.pad(scale, (0, rows - len(scale)))
        return stored["packed"], FittedTrellis(grid=self, shape=(rows, columns), scale=scale)

    def fit(self, target: Float[Tensor, "out in"], importance: Float[Tensor, " in"] | None) -> "FittedTrellis":
        """Scales from root mean squares, by the factor that is best for Gaussian weights; of zeros it is zero.

        That of a matrix has the precision of float16 too, if not its range: EXL3 stores it so.
        """
        power = target.double().square().mean(dim=1 if self.scale_per == "row" else None).reshape(-1)
        scale = power.sqrt() / measured(self.states)[self.rate].factor
        mantissa, exponent = torch.frexp(scale)
        scale = torch.ldexp((mantissa * _PRECISION).round() / _PRECISION, exponent)
        stored = torch.float16 if self.scale_per == "row" else torch.float32
        limits = torch.finfo(stored)
        scale = torch.where(power > 0, scale.clamp(limits.smallest_normal, limits.max), 0.0).to(stored)
        scale = scale.to(target.dtype)
        return FittedTrellis(grid=self, shape=(target.shape[0], target.shape[1]), scale=scale)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class FittedTrellis:
    """The trellis code with the scales of one matrix; codes are ``int32 [in/16, out/16, rate]``, as they are stored.

    Attributes:
        shape: whole tiles.
        scale: ``[1]`` or ``[out]``.
    """

    grid: TrellisGrid
    shape: tuple[int, int]
    scale: Float[Tensor, " scales"]

    @property
    def affine(self) -> None:
        """Values are not evenly spaced."""
        return None

    @property
    def parameters(self) -> Mapping[str, Tensor]:
        """The scales."""
        return {"scale": self.scale}

    def new_code(self) -> Int32[Tensor, "in_tiles out_tiles words"]:
        """An empty code tensor."""
        rows, columns = self.shape
        tiles = columns // SIDE, rows // SIDE, self.grid.rate
        return torch.zeros(tiles, dtype=torch.int32, device=self.scale.device)

    def encode_(
        self,
        code: Int32[Tensor, "in_tiles out_tiles words"],
        values: Float[Tensor, "out k"],
        columns: Int[Tensor, " k"],
    ) -> Float[Tensor, "out k"]:
        """Write the codes of whole tiles of columns into ``code`` and return what they decode to."""
        piece = self.encode(values)
        code[columns[::SIDE] // SIDE] = piece
        return self.decode(piece)

    def encode(self, values: Float[Tensor, "out in"]) -> Int32[Tensor, "in_tiles out_tiles words"]:
        """The codes of the least squared error."""
        # the search works on integers of 1/295 of a standard deviation: float32 is more than enough
        scale = self.scale[:, None]
        tiles = kernels.to_tiles(torch.where(scale > 0, values / scale, 0.0).float())
        packed = kernels.trellis_encode(
            tiles.flatten(0, 1), self.grid.rate, states=self.grid.states, window=self.grid.window
        )
        return packed.view(*tiles.shape[:2], self.grid.rate)

    def feed_(
        self,
        code: Int32[Tensor, "in_tiles out_tiles words"],
        work: Float[Tensor, "out k"],
        upper: Float[Tensor, "k k"],
        columns: Int[Tensor, " k"],
    ) -> Float[Tensor, "out k"]:
        """`feed_tiles_` for this grid: block LDLQ with blocks of 16."""
        return feed_tiles_(self, code, work, upper, columns)

    def decode(self, code: Int32[Tensor, "in_tiles out_tiles words"]) -> Float[Tensor, "out in"]:
        """The values that the codes stand for, in the scales' dtype."""
        tiles = kernels.trellis_decode(code.flatten(0, 1), states=self.grid.states)
        return kernels.from_tiles(tiles.view(*code.shape[:2], SIDE * SIDE)).to(self.scale.dtype) * self.scale[:, None]

    def store(self, code: Int32[Tensor, "in_tiles out_tiles words"], shape: tuple[int, int]) -> Mapping[str, Tensor]:
        """The codes as they are, and the scales of what is no padding."""
        scale = self.scale[: shape[0]].to(torch.float16) if self.grid.scale_per == "row" else self.scale.float()
        return {"packed": code, "scale": scale}

    def take_rows(self, rows: slice) -> "FittedTrellis":
        """The grid of some rows, whole tiles of them."""
        count = len(range(*rows.indices(self.shape[0])))
        scale = self.scale[rows] if self.grid.scale_per == "row" else self.scale
        return replace(self, shape=(count, self.shape[1]), scale=scale)

    def join_rows(self, code: Tensor, join: Callable[[Tensor, int], Tensor]) -> tuple[Tensor, "FittedTrellis"]:
        """Codes and grid of the whole matrix."""
        code = join(code, 1)
        scale = join(self.scale, 0) if self.grid.scale_per == "row" else self.scale
        return code, replace(self, shape=(code.shape[1] * SIDE, self.shape[1]), scale=scale)

    def scaled(self, factor: float) -> "FittedTrellis":
        """The grid of ``factor`` times the values."""
        return replace(self, scale=self.scale * factor)
