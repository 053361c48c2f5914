"""What is particular to the uniform grid: how ranges are chosen and `auto` is resolved."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mezzotint.errors import ConfigError
from mezzotint.grids.uniform import UniformGrid
from mezzotint.testing import strategies
from reference import grids as reference


def uniform_problems(group_sizes, ranges, *, most_bits, symmetric=None):
    grid = st.builds(
        UniformGrid,
        bits=st.integers(2, most_bits),
        group_size=st.sampled_from(group_sizes),
        symmetric=st.booleans() if symmetric is None else st.just(symmetric),
        range=st.sampled_from(ranges),
        scale_dtype=st.just("float32"),
    )
    return strategies.linear_problems(grid, dtypes=(torch.float64,))


def groups(problem):
    """(row, group, columns) of every group; where there is one scale, it belongs to every row."""
    rows, width = problem.weight.shape
    size = problem.grid.group_size
    for start in range(0, width, size):
        for row in range(rows):
            yield row, start // size, slice(start, min(start + size, width))


@given(uniform_problems([None, 1, 3, 16], ["minmax"], most_bits=8))
def test_the_plain_range_clips_nothing(problem):
    """Every error is at most half a step, or a whole one where the rounded zero point moves an end by half a step."""
    value = problem.grid.decode(problem.grid.encode(problem.weight))
    for row, group, columns in groups(problem):
        scale = float(problem.grid.scale[row, group])
        error = float((value - problem.weight)[row, columns].abs().max())
        # 2e-5: the scale is rounded to float32, half an ulp (6e-8), and up to 255 steps of it add up
        assert error <= scale * ((0.5 if problem.grid.grid.symmetric else 1.0) + 2e-5)


@given(uniform_problems([None, 5], ["error", "weighted"], most_bits=4))
def test_the_search_finds_the_least_error_of_all_candidates(problem):
    weight, importance = problem.weight.numpy()[:2], problem.statistics.importance.numpy()
    grid = problem.grid.grid
    if grid.range == "error":
        importance = np.ones_like(importance)
    for row, group, columns in groups(problem):
        if row >= len(weight) or group >= 2 or not weight[row, columns].any():
            continue
        pair = float(problem.grid.scale[row, group]), float(problem.grid.zero_point[row, group])
        of = weight[row, columns], importance[columns]
        found = reference.error_of(*of, *pair, grid.bits, grid.range_power)
        least = reference.least_error(*of, grid.bits, power=grid.range_power, symmetric=grid.symmetric)
        # scales are rounded to float32: 6e-8 of a value, on values of at most 2^4 steps and errors of at least some
        # percent of a step, twice for the square, and once more because another candidate may win by that much
        assert found == pytest.approx(least, rel=1e-4, abs=1e-12)


@given(uniform_problems([None, 5], ["error"], most_bits=8, symmetric=False))
def test_no_range_search_loses_to_the_plain_range_it_contains(problem):
    """Asymmetric, the full range is the first candidate."""
    power = problem.grid.grid.range_power
    plain = replace(problem.grid.grid, range="minmax").fit(problem.weight, None)
    errors = [
        (g.decode(g.encode(problem.weight)) - problem.weight).abs().pow(power).sum() for g in (problem.grid, plain)
    ]
    assert errors[0] <= errors[1] * (1 + 1e-12)


@given(strategies.linear_problems(strategies.grids("uniform")))
def test_groups_of_zeros_and_symmetric_zero_points(problem):
    half = 2 ** (problem.grid.grid.bits - 1)
    if problem.grid.grid.symmetric:
        torch.testing.assert_close(problem.grid.zero_point, torch.full_like(problem.grid.zero_point, half))
    for row, group, columns in groups(problem):
        one = problem.grid.grid.scale_per == "matrix"
        if not (problem.weight if one else problem.weight[row, columns]).any():
            assert float(problem.grid.scale[row, group]) == 1.0


@given(strategies.linear_problems(strategies.grids("uniform")), st.data())
def test_every_code_decodes_and_encodes_back(problem, data):
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    code = torch.randint(0, 2**problem.grid.grid.bits, problem.weight.shape, generator=generator, dtype=torch.uint8)
    torch.testing.assert_close(problem.grid.encode(problem.grid.decode(code)), code, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("width", "dtype", "group_size", "scale_dtype"),
    [
        (256, torch.bfloat16, 128, "bfloat16"),
        (192, torch.float16, 64, "float16"),
        (96, torch.float32, 32, "float32"),
        (100, torch.float64, None, "float32"),
    ],
)
def test_auto_is_resolved_by_shape_and_dtype(width, dtype, group_size, scale_dtype):
    resolved = UniformGrid().resolve((8, width), dtype)
    assert (resolved.group_size, resolved.scale_dtype) == (group_size, scale_dtype)
    assert resolved.resolve((8, width), torch.float32) == resolved


def test_explicit_settings_survive_resolve():
    grid = UniformGrid(group_size=48, scale_dtype="float16")
    assert grid.resolve((4, 100), torch.bfloat16) == grid
    assert UniformGrid(group_size=None).resolve((4, 256), torch.bfloat16).group_size is None


def test_what_is_not_resolved_is_refused():
    with pytest.raises(ConfigError, match=r"group_size is still 'auto'; call resolve"):
        UniformGrid().stored_bits((4, 4))
    with pytest.raises(ConfigError, match=r"scale_dtype is still 'auto'; call resolve"):
        UniformGrid(group_size=4).stored_bits((4, 4))


def test_weighted_range_needs_statistics():
    grid = UniformGrid(group_size=None, scale_dtype="float32")
    assert grid.needs == {"gram"}
    assert replace(grid, range="error").needs == frozenset()
    with pytest.raises(ConfigError, match="'weighted' but there are no statistics"):
        grid.fit(torch.ones(1, 4), None)


@given(uniform_problems([None, 5], ["minmax", "error", "weighted"], most_bits=8), st.sampled_from(["row", "matrix"]))
def test_scales_of_rows_and_of_matrices_are_those_of_longer_groups(problem, scale_per):
    """A row is one group, and a matrix the one group of a single long row."""
    weight, importance = problem.weight, problem.statistics.importance
    rows, width = weight.shape
    grid = replace(problem.grid.grid, scale_per=scale_per, group_size=5).resolve((rows, width), weight.dtype)
    found = grid.fit(weight, importance)
    long = replace(grid, group_size=None, scale_per="group")
    if scale_per == "row":
        expected = long.fit(weight, importance)
    else:
        expected = long.fit(weight.reshape(1, -1), importance.repeat(rows))
    for name, value in found.parameters.items():
        assert value.shape == (rows, 1)
        torch.testing.assert_close(value, expected.parameters[name].expand(rows, 1), rtol=0, atol=0)


def test_size_of_a_known_matrix():
    grid = UniformGrid(bits=3, group_size=128, scale_dtype="bfloat16")
    # 4096 x 4096 at 3 bits; 32 groups a row with a scale of 16 bits and a zero point of 3
    assert tuple(grid.stored_bits((4096, 4096))) == (3 * 2**24, 4096 * 32 * 19)
    # one scale of 16 bits; one zero point of 3 bits in a byte of its own
    row, matrix = (replace(grid, scale_per=per).resolve((4096, 4096), torch.bfloat16) for per in ("row", "matrix"))
    assert tuple(row.stored_bits((4096, 4096))) == (3 * 2**24, 4096 * (16 + 8))
    assert tuple(matrix.stored_bits((4096, 4096))) == (3 * 2**24, 16 + 8)
    assert tuple(replace(matrix, symmetric=True).stored_bits((4096, 4096))) == (3 * 2**24, 16)
