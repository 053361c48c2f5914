"""A vector grid of a few values, as plain as possible, to test what works tile by tile.

A tile of ``(rows, columns)`` weights is one code: the nearest row of a table, times one scale a row of tiles.
"""

from dataclasses import dataclass, replace
from functools import lru_cache
from math import log2
from typing import ClassVar

import torch
from torch import Tensor

from mezzotint.core.contracts import Bits
from mezzotint.grids.feedback import feed_tiles_

_ENTRIES = 16


@lru_cache
def table(tile: tuple[int, int]) -> Tensor:
    """``[entries, rows * columns]``; the first entry is zero."""
    entries = torch.randn(_ENTRIES, tile[0] * tile[1], generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    entries[0] = 0
    return entries


@dataclass(frozen=True, slots=True, kw_only=True)
class ToyVectorGrid:
    kind: ClassVar[str] = "toy"
    tile: tuple[int, int] = (1, 2)
    pads: ClassVar[bool] = False
    rowwise: ClassVar[bool] = True
    needs: ClassVar[frozenset[str]] = frozenset()

    @property
    def bits(self) -> float:
        return log2(_ENTRIES) / (self.tile[0] * self.tile[1])

    @property
    def multiple(self) -> tuple[int, int]:
        return self.tile

    def resolve(self, shape, dtype):
        return self

    def stored_bits(self, shape):
        tiles = shape[0] // self.tile[0], shape[1] // self.tile[1]
        return Bits(code=tiles[0] * tiles[1] * int(log2(_ENTRIES)), side=tiles[0] * 32)

    def specs(self, shape):
        tiles = shape[0] // self.tile[0], shape[1] // self.tile[1]
        return {"code": (torch.int64, tiles), "scale": (torch.float32, tiles[:1])}

    def restore(self, shape, stored):
        return stored["code"], FittedToy(grid=self, shape=shape, scale=stored["scale"])

    def fit(self, target, importance):
        power = target.double().square().reshape(target.shape[0] // self.tile[0], -1).mean(1)
        scale = torch.where(power > 0, power.sqrt(), 1.0).float()
        return FittedToy(grid=self, shape=tuple(target.shape), scale=scale.to(target.dtype))


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class FittedToy:
    grid: ToyVectorGrid
    shape: tuple[int, int]
    scale: Tensor  # [out / tile rows]
    affine: ClassVar[None] = None

    @property
    def parameters(self):
        return {"scale": self.scale}

    def new_code(self):
        rows, columns = self.grid.tile
        return torch.zeros(self.shape[0] // rows, self.shape[1] // columns, dtype=torch.int64)

    def encode_(self, code, values, columns):
        width = self.grid.tile[1]
        tiles = columns.view(-1, width)
        torch.testing.assert_close(tiles, tiles[:, :1] // width * width + torch.arange(width), rtol=0, atol=0)
        piece = self.encode(values)
        code[:, tiles[:, 0] // width] = piece
        return self.decode(piece)

    def encode(self, values):
        rows, width = self.grid.tile
        tiles = (
            values.reshape(values.shape[0] // rows, rows, values.shape[1] // width, width).transpose(1, 2).flatten(2)
        )
        entries = table(self.grid.tile).to(values.dtype) * self.scale[:, None, None]
        return (tiles[:, :, None] - entries[:, None]).square().sum(-1).argmin(-1)

    def feed_(self, code, work, upper, columns):
        return feed_tiles_(self, code, work, upper, columns)

    def decode(self, code):
        rows, width = self.grid.tile
        tiles = table(self.grid.tile).to(self.scale.dtype)[code] * self.scale[:, None, None]
        return tiles.unflatten(2, (rows, width)).transpose(1, 2).reshape(code.shape[0] * rows, code.shape[1] * width)

    def store(self, code, shape):
        return {"code": code, "scale": self.scale.float()}

    def take_rows(self, rows):
        height = self.grid.tile[0]
        kept = self.scale[rows.start // height : rows.stop // height]
        return replace(self, shape=(kept.shape[0] * height, self.shape[1]), scale=kept)

    def join_rows(self, code, join):
        scale = join(self.scale, 0)
        return join(code, 0), replace(self, shape=(scale.shape[0] * self.grid.tile[0], self.shape[1]), scale=scale)

    def scaled(self, factor):
        return replace(self, scale=self.scale * factor)

    def storable(self, scale):
        return scale

    def with_scale(self, scale):
        return replace(self, scale=scale)
