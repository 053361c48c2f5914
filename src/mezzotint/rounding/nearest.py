"""Rounding to the nearest value of the grid (RTN)."""

from dataclasses import dataclass
from typing import ClassVar

from mezzotint.core.contracts import Aim, FittedGrid, Rounded
from mezzotint.core.statistics import Statistics


@dataclass(frozen=True, slots=True, kw_only=True)
class Nearest:
    """Each tile to its nearest code (MATH.md section 1); no settings, no statistics."""

    kind: ClassVar[str] = "nearest"
    needs: ClassVar[frozenset[str]] = frozenset()
    accepts_corrected: ClassVar[bool] = True
    scalar_only: ClassVar[bool] = False

    def round(self, aim: Aim, grid: FittedGrid, fit: Statistics | None) -> Rounded:
        """The nearest codes; ``fit`` is not used."""
        code = grid.encode(aim.matrix)
        return Rounded(code=code, grid=grid, value=grid.decode(code), before=aim.matrix)
