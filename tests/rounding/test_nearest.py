"""Rounding to nearest against its twin."""

import numpy as np
import torch
from hypothesis import given

from mezzotint.rounding.nearest import Nearest
from mezzotint.testing import strategies
from reference import grids as reference


@given(problem=strategies.linear_problems(dtypes=(torch.float64,)))
def test_every_code_is_the_nearest_of_all(problem):
    grid = problem.grid
    rounded = Nearest().round(problem.aim, grid, None)
    scale, zero_point = grid.scale.numpy(), grid.zero_point.numpy()
    code = reference.encode_uniform(problem.weight.numpy(), scale, zero_point, grid.grid.bits, grid.group_size)
    np.testing.assert_array_equal(rounded.code.numpy(), code)
    value = reference.decode_uniform(code, scale, zero_point, grid.group_size)
    # one product and one exact difference on both sides
    np.testing.assert_allclose(rounded.value.numpy(), value, rtol=2**-52, atol=0)
