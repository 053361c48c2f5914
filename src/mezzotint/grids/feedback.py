"""Rounding with error feedback on any grid, tile by tile: the inner loop of GPTQ and block LDLQ in plain torch."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mezzotint.core.contracts import FittedGrid


def feed_tiles_(
    grid: FittedGrid,
    code: Tensor,
    work: Float[Tensor, "out k"],
    upper: Float[Tensor, "k k"],
    columns: Int[Tensor, " k"],
    *,
    carry: Float[Tensor, "k k"] | None = None,
) -> Float[Tensor, "out k"]:
    """Round tiles of columns in turn, feeding each error forward; modifies ``code`` and ``work``.

    For the tile ``t`` with values ``w_t`` at its turn: ``E_t U_tt = w_t - decode(encode(w_t))``, then
    ``w_later -= E_t U_t,later`` (GPTQ Alg. 1 for one column; QuIP# block LDLQ for several).

    Args:
        grid: decides what a tile is and what it can stand for.
        code: codes of the whole matrix, written at ``columns``.
        work: targets of these columns; on return, their values at the moment of rounding.
        upper: the diagonal block of the factor ``U`` with ``inv(H) = U' U`` for these columns.
        columns: their places in the matrix, in visiting order, whole tiles.
        carry: strictly upper; later columns also gain ``w_t @ carry[t, later]``, the values before rounding (GPTAQ).

    Returns:
        ``E``: what later columns must be corrected by is ``E @ U[these, later]``.
    """
    width = grid.grid.tile[1]
    error = torch.empty_like(work)
    for start in range(0, work.shape[1], width):
        end = start + width
        now = work[:, start:end]
        value = grid.encode_(code, now, columns[start:end])
        if width == 1:
            error[:, start:end] = (now - value) / upper[start, start]
        else:
            tile = upper[start:end, start:end]
            error[:, start:end] = torch.linalg.solve_triangular(tile, now - value, upper=True, left=False)
        work[:, end:] -= error[:, start:end] @ upper[start:end, end:]
        if carry is not None:
            work[:, end:] += now @ carry[start:end, end:]
    return error
