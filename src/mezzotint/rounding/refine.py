"""Refinement: coordinate descent over codes and scales on the layer's quadratic, from any rounding's result."""

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from mezzotint.core.contracts import Quadratic, Rounded
from mezzotint.errors import ConfigError

_BLOCK = 128


@dataclass(frozen=True, slots=True, kw_only=True)
class Descent:
    """Settings of the refinement (MATH.md section 10: the layer-wise part of PV-Tuning).

    Each pass visits every column once: with all else fixed, the best value of weight j is ``v_j - r_j / G_jj`` with the
    gradient ``r = V G - C``, and rounding it to the grid never raises the quadratic. Then each group's scale is
    refitted to its codes and kept where it lowers the quadratic after rounding to its storage dtype.

    Attributes:
        passes: sweeps over all columns.
        scales: refit scales after each pass.
    """

    kind: ClassVar[str] = "descent"
    passes: int = 2
    scales: bool = True

    def __post_init__(self) -> None:
        if not 1 <= self.passes <= 100:
            raise ConfigError(f"refinement.passes is {self.passes}; it must be from 1 to 100.")

    def refine(self, rounded: Rounded, quadratic: Quadratic) -> Rounded:
        """Codes and grid with a quadratic that is at most that of ``rounded``, row by row up to rounding."""
        current = rounded
        for _ in range(self.passes):
            current = descend_codes(current, quadratic)
            if self.scales:
                current = refit_scales(current, quadratic)
        return current


def descend_codes(rounded: Rounded, quadratic: Quadratic) -> Rounded:
    """One pass over all columns, every weight to the best code while the others stay.

    Columns are taken in blocks: inside a block the gradient follows every change, the rest of it is brought up to date
    by one matrix product per block, so a pass costs about one GPTQ.
    """
    grid = rounded.grid
    gram = quadratic.gram.to(rounded.value.dtype)
    curvature = gram.diagonal()
    value, code = rounded.value.clone(), rounded.code.clone()
    gradient = value @ gram - quadratic.cross
    width = value.shape[1]
    for start in range(0, width, _BLOCK):
        block = slice(start, min(start + _BLOCK, width))
        local = gradient[:, block].contiguous()
        before = value[:, block].clone()
        for j in range(block.start, block.stop):
            if float(curvature[j]) <= 0:
                continue  # an input that never fires: nothing to gain
            ideal = value[:, j : j + 1] - local[:, j - start : j - start + 1] / curvature[j]
            chosen = grid.encode_(code, ideal, torch.tensor([j], device=code.device))
            local += (chosen - value[:, j : j + 1]) * gram[j, block]
            value[:, j : j + 1] = chosen
        gradient += (value[:, block] - before) @ gram[block]
    return replace(rounded, code=code, value=value, before=None)


def refit_scales(rounded: Rounded, quadratic: Quadratic) -> Rounded:
    """One pass over all groups: ``s <- s - r c' / (c G c')`` for the group's codes ``c`` less their zero points.

    A new scale is rounded to its storage dtype and kept per row where the quadratic falls.
    """
    fitted = rounded.grid
    affine = fitted.affine
    if affine is None:
        return rounded
    gram = quadratic.gram.to(rounded.value.dtype)
    value = rounded.value.clone()
    scale = affine.scale.clone()
    gradient = value @ gram - quadratic.cross
    for index in range(scale.shape[1]):
        columns = slice(index * affine.group_size, min((index + 1) * affine.group_size, value.shape[1]))
        old = scale[:, index : index + 1]
        shape = value[:, columns] / old  # codes less zero points
        spread = ((shape @ gram[columns, columns]) * shape).sum(1, keepdim=True)
        slope = (gradient[:, columns] * shape).sum(1, keepdim=True)
        new = fitted.storable(old - slope / spread.clamp_min(torch.finfo(spread.dtype).tiny))
        step = new - old
        gain = step * step * spread + 2 * step * slope
        step = torch.where((gain < 0) & (new > 0), step, torch.zeros_like(step))
        scale[:, index : index + 1] = old + step
        change: Float[Tensor, "out k"] = step * shape
        value[:, columns] += change
        gradient += change @ gram[columns]
    better = fitted.with_scale(scale)
    return replace(rounded, grid=better, value=better.decode(rounded.code), before=None)
