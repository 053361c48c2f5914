"""GPTQ, which is the same as LDLQ: round columns in turn, and let later columns compensate each error."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import ClassVar, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mezzotint.core.contracts import AffineGrid, Aim, FittedGrid, Rounded
from mezzotint.core.statistics import Statistics
from mezzotint.errors import ConfigError
from mezzotint.rounding.feedback import check_settings, finished


@dataclass(frozen=True, slots=True, kw_only=True)
class Gptq:
    """Settings of GPTQ (arXiv 2210.17323, Alg. 1; equal to LDLQ of arXiv 2307.13304 on unbounded grids).

    Attributes:
        damping: ridge added to H, as a fraction of its mean diagonal.
        order: in which columns (whole tiles) are visited: ``diagonal``, decreasing diag(H), or ``natural``. Groups
            stay in the original order, and nothing of the order is stored.
        block_size: columns per lazy update, a multiple of the tile; chosen for speed, never changes the result.
    """

    kind: ClassVar[str] = "gptq"
    damping: float = 0.01
    order: Literal["diagonal", "natural"] = "diagonal"
    block_size: int = 128
    needs: ClassVar[frozenset[str]] = frozenset({"gram"})
    accepts_corrected: ClassVar[bool] = True
    scalar_only: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_settings(self.damping, self.block_size)

    def round(self, aim: Aim, grid: FittedGrid, fit: Statistics | None) -> Rounded:
        """Codes that keep ``tr(A (V - T) H (V - T)')`` small, ``A`` the aim's curvature, or 1 without any.

        With a curvature the rows of a block make up for each other too, column by column (YAQA, arXiv 2505.22988).

        Raises:
            ConfigError: there are no statistics, or a curvature and a grid of another kind than uniform.
            NotPositiveDefiniteError: the Hessian cannot be factored with any damping.
        """
        if fit is None:
            raise ConfigError("rounding 'gptq' needs calibration text. Give one, or use rounding.kind=nearest.")
        tile = grid.grid.tile[1]
        factor = fit.factor(self.damping, self.order, tile)
        upper = factor.upper.to(aim.matrix.dtype)
        width = aim.matrix.shape[1]
        columns = factor.columns
        work = aim.matrix.index_select(1, columns)
        feed, turned, rows = grid.feed_, grid, None
        if aim.curvature is not None:
            rows, taken = aim.curvature.feedback()
            turned, feed = _by_rows(grid, rows, taken)
            work = work.index_select(0, rows)
        code = turned.new_code()
        step = max(tile, self.block_size // tile * tile)
        for start in range(0, width, step):
            end = min(start + step, width)
            piece = work[:, start:end].contiguous()
            error = feed(code, piece, upper[start:end, start:end].contiguous(), columns[start:end])
            work[:, start:end] = piece
            work[:, end:].addmm_(error, upper[start:end, end:], alpha=-1)
        before = torch.empty_like(work)
        before.index_copy_(1, columns, work)
        if rows is not None:
            back = rows.argsort()
            code, before = code[back], before[back]
        return finished(code, grid, before, factor=factor, damping=self.damping)


def _by_rows(
    grid: FittedGrid, rows: Int[Tensor, " out"], taken: Float[Tensor, "blocks size size"]
) -> tuple[FittedGrid, Callable[..., Tensor]]:
    """The grid of rows in another order, and how it is fed with what they take of each other's errors."""
    if not isinstance(grid, AffineGrid):
        raise ConfigError(f"curvature needs a uniform grid, not {grid.grid.kind!r}. Set curvature.kind=none.")
    turned = grid.with_parameters(grid.scale[rows], grid.zero_point[rows])
    return turned, partial(turned.feed_, taken=taken)
