"""Inputs times a packed matrix: fused for a few tokens on a CPU, else by decoding it for the moment."""

from collections.abc import Mapping
from functools import lru_cache

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional

from mezzotint import kernels
from mezzotint.formats.native import Scheme
from mezzotint.grids.codebook import CodebookGrid
from mezzotint.grids.trellis import SIDE, TrellisGrid
from mezzotint.grids.uniform import UniformGrid

FEW = 8  # tokens; from some tens on, decoding once and multiplying dense matrices is faster


def product(
    x: Float[Tensor, "tokens in"], scheme: Scheme, parts: Mapping[str, Tensor], dtype: torch.dtype
) -> Float[Tensor, "tokens out"]:
    """``x @ V.T`` with the matrix ``V`` that the codes stand for, in its own basis.

    Args:
        x: in the basis of the codes.
        scheme: how ``V`` is stored.
        parts: its tensors, by the names of `Grid.specs`.
        dtype: that the decoded matrix is multiplied in; a fused product is at least as precise, and in float32.
    """
    if x.device.type == "cpu" and len(x) <= FEW and dtype != torch.float64:
        fused = _fused(x, scheme, parts)
        if fused is not None:
            return fused
    rows, columns = scheme.shape
    code, fitted = scheme.grid.restore(scheme.shape, parts)
    return functional.linear(x.to(dtype), fitted.decode(code)[:rows, :columns].to(dtype))


def rows_of(rows: Int[Tensor, " tokens"], scheme: Scheme, parts: Mapping[str, Tensor]) -> Float[Tensor, "tokens in"]:
    """Some rows of the matrix that the codes stand for, in its own basis and in float32; no other is decoded.

    Args:
        rows: numbers of rows, from 0.
        scheme: how the matrix is stored.
        parts: its tensors, by the names of `Grid.specs`.
    """
    grid, (height, columns) = scheme.grid, scheme.shape
    if not isinstance(grid, TrellisGrid):
        assert grid.tile[0] == 1, f"grid {grid.kind} encodes rows together"
        one = isinstance(grid, CodebookGrid | UniformGrid) and grid.scale_per == "matrix"
        whole = ("scale", "zero_point") if one else ()
        taken = {
            name: parts[name] if name in whole else parts[name].index_select(0, rows)
            for name in grid.specs(scheme.shape)
        }
        code, fitted = grid.restore((len(rows), columns), taken)
        return fitted.decode(code)
    tiles, place = (rows // SIDE).unique(return_inverse=True)
    scale = parts["scale"]
    if grid.scale_per == "row":
        scale = scale[(tiles[:, None] * SIDE + torch.arange(SIDE, device=tiles.device)).clamp(max=height - 1).flatten()]
    taken = {"packed": parts["packed"].index_select(1, tiles), "scale": scale}
    code, fitted = grid.restore((len(tiles) * SIDE, columns), taken)
    return fitted.decode(code)[place * SIDE + rows % SIDE, :columns]


def _fused(
    x: Float[Tensor, "tokens in"], scheme: Scheme, parts: Mapping[str, Tensor]
) -> Float[Tensor, "tokens out"] | None:
    """The product by a kernel that decodes between the load and the multiplication; None for a grid that has none."""
    grid, (rows, columns) = scheme.grid, scheme.shape
    if isinstance(grid, TrellisGrid):
        wide = x if columns % SIDE == 0 else functional.pad(x, (0, -columns % SIDE))
        return kernels.trellis_matmul(wide, parts["packed"], states=grid.states)[:, :rows] * parts["scale"].float()
    if isinstance(grid, UniformGrid):
        scale, zero_point = grid.restore_parameters(parts)
        return kernels.packed_matmul(
            x, parts["packed"], scale, zero_point, grid.columns_per_group(columns), bits=grid.bits
        )
    if isinstance(grid, CodebookGrid):
        size = grid.columns_per_group(columns)
        scale = parts["scale"].float().expand(rows, -1)  # of the matrix, or of its rows' groups
        return kernels.table_matmul(x, parts["packed"], scale, _levels(grid), size)
    return None


@lru_cache(maxsize=64)
def _levels(grid: CodebookGrid) -> kernels.LevelTable:
    book = grid.codebook(torch.float64, torch.device("cpu"))
    every = torch.arange(2**grid.index_bits, dtype=book.code_dtype)
    return kernels.LevelTable.of(book.values(every[None]).view(-1, grid.tile[1]))
