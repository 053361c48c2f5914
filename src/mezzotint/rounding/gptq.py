"""GPTQ, which is LDLQ: round columns in turn and let later columns make up for each error."""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from mezzotint.core.contracts import Aim, FittedGrid, Rounded
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
        """Codes that keep ``tr((V - T) H (V - T)')`` small.

        Raises:
            ConfigError: there are no statistics.
            NotPositiveDefiniteError: the Hessian cannot be factored with any damping.
        """
        if fit is None:
            raise ConfigError("rounding 'gptq' needs calibration statistics; give calibration text or use 'nearest'.")
        tile = grid.grid.tile[1]
        factor = fit.factor(self.damping, self.order, tile)
        upper = factor.upper.to(aim.matrix.dtype)
        width = aim.matrix.shape[1]
        columns = factor.columns
        work = aim.matrix.index_select(1, columns)
        code = grid.new_code()
        step = max(tile, self.block_size // tile * tile)
        for start in range(0, width, step):
            end = min(start + step, width)
            piece = work[:, start:end].contiguous()
            error = grid.feed_(code, piece, upper[start:end, start:end].contiguous(), columns[start:end])
            work[:, start:end] = piece
            work[:, end:].addmm_(error, upper[start:end, end:], alpha=-1)
        before = torch.empty_like(work)
        before.index_copy_(1, columns, work)
        return finished(code, grid, before, factor=factor, damping=self.damping)
