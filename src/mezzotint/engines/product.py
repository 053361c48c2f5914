"""Inputs times a packed matrix: fused for a few tokens on a CPU, else by decoding it for the moment."""

from collections.abc import Mapping

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from mezzotint import kernels
from mezzotint.formats.native import Scheme
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


def _fused(
    x: Float[Tensor, "tokens in"], scheme: Scheme, parts: Mapping[str, Tensor]
) -> Float[Tensor, "tokens out"] | None:
    """The product by a kernel that decodes between the load and the multiplication; None for other grids."""
    grid, (rows, columns) = scheme.grid, scheme.shape
    if isinstance(grid, TrellisGrid):
        wide = x if columns % SIDE == 0 else functional.pad(x, (0, -columns % SIDE))
        return kernels.trellis_matmul(wide, parts["packed"], states=grid.states)[:, :rows] * parts["scale"].float()
    if isinstance(grid, UniformGrid):
        scale, zero_point = grid.restore_parameters(parts)
        return kernels.packed_matmul(
            x, parts["packed"], scale, zero_point, grid.columns_per_group(columns), bits=grid.bits
        )
    return None
