"""Refinement never raises the quadratic it descends, and leaves codes, grid and value in step."""

import pytest
import torch

from mezzotint.core.contracts import Aim
from mezzotint.core.statistics import Accumulator
from mezzotint.grids.uniform import UniformGrid
from mezzotint.registry import ROUNDINGS
from mezzotint.rounding.refine import Descent, descend_codes, refit_scales
from mezzotint.targets.qep import quadratic_of


@pytest.mark.parametrize("kind", ["nearest", "gptq"])
@pytest.mark.parametrize("symmetric", [False, True])
def test_every_step_lowers_the_quadratic_of_every_row(kind: str, symmetric: bool) -> None:
    generator = torch.Generator().manual_seed(3)
    inputs = torch.randn(300, 96, generator=generator) @ torch.randn(96, 96, generator=generator)
    sums = Accumulator(96, frozenset(), dtype=torch.float64)
    sums.add(inputs)
    fit = sums.finish()
    weight = torch.randn(16, 96, generator=generator, dtype=torch.float64)
    grid = UniformGrid(bits=3, group_size=32, symmetric=symmetric, scale_dtype="float32").fit(weight, fit.importance)
    current = ROUNDINGS[kind]().round(Aim(matrix=weight), grid, fit)
    quadratic = quadratic_of(weight, fit)
    start = last = quadratic.value(current.value)
    for step in (descend_codes, refit_scales, descend_codes, refit_scales):
        current = step(current, quadratic)
        now = quadratic.value(current.value)
        assert (now <= last + 1e-9 * start).all()
        torch.testing.assert_close(current.value, current.grid.decode(current.code))
        last = now
    assert last.sum() < 0.95 * start.sum()
    whole = Descent(passes=2).refine(ROUNDINGS[kind]().round(Aim(matrix=weight), grid, fit), quadratic)
    torch.testing.assert_close(whole.value, current.value)
