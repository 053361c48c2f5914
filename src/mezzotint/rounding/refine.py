"""Refinement: coordinate descent over codes, scales and zero points on the layer's quadratic, from several starts."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from mezzotint.core.contracts import AffineGrid, FittedGrid, Grid, Quadratic, Rounded
from mezzotint.core.curvature import Curvature
from mezzotint.core.panels import in_memory
from mezzotint.errors import ConfigError
from mezzotint.grids.uniform import UniformGrid

Start = Literal["nearest", "clipped", "refitted"]

_BLOCK = 128
_CLIPPED = (0.9, 0.8)


@dataclass(frozen=True, slots=True, kw_only=True)
class Descent:
    """Settings of the refinement (MATH.md section 10: the layer-wise part of PV-Tuning).

    Each pass visits every column once: with all else fixed, the best value of weight j is ``v_j - r_j / G_jj`` with the
    gradient ``r = V G - C``, and rounding it to the grid never raises the quadratic. Then each group's scale and zero
    point are refitted to its codes and kept where they lower it. Where the loss has a curvature in outputs, rows share
    a quadratic, and each moves as those of its block that went before have left it.

    Attributes:
        passes: sweeps over all columns.
        parameters: refit scales and zero points after each pass.
        starts: descend from these too, and keep the best of every row: ``nearest``, the codes nearest to the target;
            ``clipped``, the rounding on scales of 0.9 and 0.8 of the fitted ones; ``refitted``, the rounding on the
            parameters that the best so far ended with.
    """

    kind: ClassVar[str] = "descent"
    passes: int = 2
    parameters: bool = True
    starts: tuple[Start, ...] = ()

    def __post_init__(self) -> None:
        if not 1 <= self.passes <= 100:
            raise ConfigError(f"refinement.passes is {self.passes}; it must be from 1 to 100.")

    def refuses(self, grid: Grid) -> str | None:
        """Scales and zero points are refitted row by row."""
        if not isinstance(grid, UniformGrid):
            return f"serves grids of kind uniform, not {grid.kind!r}"
        return (
            "gives every row a scale of its own, and grid.scale_per is 'matrix'" if grid.scale_per == "matrix" else None
        )

    def refine(
        self,
        rounded: Rounded,
        target: Float[Tensor, "out in"],
        quadratic: Quadratic,
        round_on: Callable[[FittedGrid], Rounded],
    ) -> Rounded:
        """Codes and grid with a quadratic that is at most that of ``rounded``, by rows or blocks, up to rounding.

        Raises:
            ConfigError: the grid has no scales and zero points to refit.
        """
        grid = rounded.grid
        if not isinstance(grid, AffineGrid):
            raise ConfigError(
                f"refinement 'descent' needs a uniform grid, not {grid.grid.kind!r}. Set refinement.kind=none."
            )
        found = [self._descended(rounded, quadratic)]
        if "nearest" in self.starts:
            code = grid.encode(target)
            found.append(self._descended(Rounded(code=code, grid=grid, value=grid.decode(code)), quadratic))
        if "clipped" in self.starts:
            for factor in _CLIPPED:
                narrow = grid.with_parameters(grid.storable(grid.scale * factor), grid.zero_point)
                found.append(self._descended(round_on(narrow), quadratic))
        best = best_rows(found, quadratic)
        if "refitted" in self.starts:
            best = best_rows([best, self._descended(round_on(best.grid), quadratic)], quadratic)
        return best

    def _descended(self, rounded: Rounded, quadratic: Quadratic) -> Rounded:
        current = rounded
        for _ in range(self.passes):
            current = descend_codes(current, quadratic)
            if self.parameters:
                current = refit_parameters(current, quadratic)
        return current


def best_rows(found: Sequence[Rounded], quadratic: Quadratic) -> Rounded:
    """Of each row, or block of rows that share a quadratic, the one with the lowest.

    All are on the same kind of affine grid, with codes ``[out, in]``.
    """
    best = found[0]
    least = _losses(best.value, quadratic)
    for other in found[1:]:
        loss = _losses(other.value, quadratic)
        better = (loss < least)[:, None]
        least = torch.minimum(loss, least)
        grid, others = best.grid, other.grid
        assert isinstance(grid, AffineGrid)
        assert isinstance(others, AffineGrid)
        best = Rounded(
            code=torch.where(better, other.code, best.code),
            grid=grid.with_parameters(
                torch.where(better, others.scale, grid.scale), torch.where(better, others.zero_point, grid.zero_point)
            ),
            value=torch.where(better, other.value, best.value),
        )
    return best


def _losses(value: Tensor, quadratic: Quadratic) -> Float[Tensor, " out"]:
    """What each row can be chosen by."""
    loss = quadratic.value(value)
    return loss if quadratic.curvature is None else quadratic.curvature.shared(loss)


def descend_codes(rounded: Rounded, quadratic: Quadratic) -> Rounded:
    """One pass over all columns, every weight to the best code while the others stay.

    Columns are taken in blocks: inside a block the gradient follows every change, the rest of it is brought up to date
    by one matrix product per block, so a pass costs about one GPTQ.
    """
    grid = rounded.grid
    assert isinstance(grid, AffineGrid)
    gram = in_memory(quadratic.gram).to(rounded.value.dtype)
    value, code = rounded.value.clone(), rounded.code.clone()
    gradient = quadratic.mixed(value @ gram - quadratic.cross)
    curvature = None if quadratic.curvature is None else quadratic.curvature.blocks
    width = value.shape[1]
    for start in range(0, width, _BLOCK):
        block = slice(start, min(start + _BLOCK, width))
        before = value[:, block].clone()
        now = value[:, block].contiguous()
        columns = torch.arange(block.start, block.stop, device=code.device)
        slope = gradient[:, block].contiguous()
        grid.descend_(code, now, slope, gram[block, block].contiguous(), columns, curvature=curvature)
        value[:, block] = now
        gradient.addmm_(quadratic.mixed(now - before), gram[block])
    return replace(rounded, code=code, value=value, before=None)


def refit_parameters(rounded: Rounded, quadratic: Quadratic) -> Rounded:
    """One pass over all groups: the best scale for the group's codes, then the best zero point, in closed form.

    With ``c`` the group's codes less its zero point and ``r`` the gradient: ``s <- s - r c' / (c G c')``, rounded to
    its storage dtype; and the zero point moves by the whole number nearest to ``r 1' / (1 G 1') / s``. Either is kept
    per row where the quadratic falls, the scale where it stays within a factor of two. Rows that share a quadratic take
    turns.
    """
    grid = rounded.grid
    assert isinstance(grid, AffineGrid)
    gram = in_memory(quadratic.gram).to(rounded.value.dtype)
    value = rounded.value
    scale, zero_point = grid.scale.clone(), grid.zero_point.clone()
    gradient = quadratic.mixed(value @ gram - quadratic.cross)
    for index in range(scale.shape[1]):
        columns = slice(index * grid.group_size, min((index + 1) * grid.group_size, value.shape[1]))
        shape = value[:, columns] / scale[:, index, None]  # codes less zero point
        block = gram[columns, columns]
        turned = shape @ block
        pulls = torch.stack([(gradient[:, columns] * shape).sum(1), gradient[:, columns].sum(1)])
        bends = torch.stack([(turned * shape).sum(1), turned.sum(1)])
        joint = None if quadratic.curvature is None else _between(quadratic.curvature, turned, shape)
        stretch, shift = grid.refit_(scale[:, index], zero_point[:, index], pulls, bends, block.sum(), joint=joint)
        change = stretch[:, None] * shape + shift[:, None]
        gradient.addmm_(quadratic.mixed(change), gram[columns])
    better = grid.with_parameters(scale, zero_point)
    return replace(rounded, grid=better, value=better.decode(rounded.code), before=None)


def _between(curvature: Curvature, turned: Tensor, shape: Tensor) -> tuple[Tensor, Tensor]:
    """What a step of one row's scale does to the slopes of the others in its block, and the curvature itself."""
    blocks = curvature.blocks.to(shape.dtype)
    return blocks * (curvature.in_blocks(turned) @ curvature.in_blocks(shape).mT), blocks
