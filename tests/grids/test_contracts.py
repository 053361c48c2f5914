"""What every registered grid promises, and two small vector grids with it."""

from dataclasses import fields, replace
from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from grids.toy_vector import ToyVectorGrid
from mezzotint.core.contracts import FittedGrid, Grid
from mezzotint.grids.feedback import feed_tiles_
from mezzotint.registry import GRIDS
from mezzotint.testing import strategies
from mezzotint.testing.problems import Snapshot, make_problem
from reference import grids as reference

TOYS = {"toy 1x2": ToyVectorGrid(tile=(1, 2)), "toy 2x4": ToyVectorGrid(tile=(2, 4))}
# Grids that cannot stand for zero, with the reason; zero weights are common enough that a grid should.
WITHOUT_ZERO = {
    "lookup": "levels of least error for normal numbers are symmetric and even in number: none is zero",
    "vector": "no mean of a cell lies on zero but by symmetry, which k-means of a plane does not keep",
    "trellis": "neighbouring weights share bits, so no path stays at one value",
    "gguf": "minima are no multiples of scales, and the table of IQ4_NL has none: test_gguf.py has types with one",
}
# Grids where several codes stand for the same values, with the reason.
MANY_CODES = {"trellis": "states outnumber their values, and paths may cross"}


def codebook_sizes(grid, shape, index_bits, tile):
    scale_bits = grid.storage_dtype.itemsize * 8
    return reference.codebook_sizes(
        shape,
        index_bits=index_bits,
        tile=tile,
        group_size=grid.group_size,
        scale_bits=scale_bits,
        one_scale=grid.scale_per == "matrix",
    )


# Bits of what is stored, (codes, side data), by the twin; a new grid adds a line.
SIZES = {
    "uniform": lambda grid, shape: reference.uniform_sizes(
        shape,
        bits=grid.bits,
        group_size=grid.group_size,
        scale_bits=grid.storage_dtype.itemsize * 8,
        symmetric=grid.symmetric,
        one_scale=grid.scale_per == "matrix",
    ),
    "lookup": lambda grid, shape: codebook_sizes(grid, shape, grid.bits, 1),
    "vector": lambda grid, shape: codebook_sizes(grid, shape, int(2 * grid.bits), 2),
    "trellis": lambda grid, shape: reference.trellis_sizes(shape, rate=grid.rate, row_scales=grid.scale_per == "row"),
    "gguf": lambda grid, shape: reference.gguf_sizes(shape, type_name=grid.type),
}
_SUB, _MIN = {"super_scale": torch.float16, "sub_scale": torch.int8}, {"super_min": torch.float16}
GGUF_PARAMETERS = {
    **{name: {"super_scale": torch.float16} for name in ("Q4_0", "Q5_0", "Q8_0", "IQ4_NL")},
    **{name: {"super_scale": torch.float16, **_MIN} for name in ("Q4_1", "Q5_1")},
    "Q2_K": {**_SUB, **_MIN, "sub_scale": 4, "sub_min": 4},
    "Q3_K": _SUB,
    **{name: {**_SUB, **_MIN, "sub_scale": 6, "sub_min": 6} for name in ("Q4_K", "Q5_K")},
    "Q6_K": _SUB,
}
# Dtype that each fitted parameter is stored in; an integer is a number of bits.
STORED = {
    "uniform": lambda grid: {"scale": grid.storage_dtype, "zero_point": grid.bits},
    "lookup": lambda grid: {"scale": grid.storage_dtype},
    "vector": lambda grid: {"scale": grid.storage_dtype},
    "trellis": lambda grid: {"scale": torch.float16 if grid.scale_per == "row" else torch.float32},
    "gguf": lambda grid: GGUF_PARAMETERS[grid.type],
}
every_grid = pytest.mark.parametrize("name", [*GRIDS, *TOYS])
registered = pytest.mark.parametrize("name", GRIDS)
some_data = given(data=st.data())
exact = partial(torch.testing.assert_close, rtol=0, atol=0)


def grids(name):
    return st.just(TOYS[name]) if name in TOYS else strategies.grids(name)


def problem_of(data, name, dtypes=strategies.DTYPES):
    return make_problem(data.draw(strategies.problem_settings(grids(name), dtypes), label="problem"))


def drawn_values(data, problem):
    """Values in and far out of the range of the grid."""
    spread = data.draw(st.sampled_from([0.3, 1.0, 10.0]), label="spread")
    noise = torch.randn(problem.weight.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    size = problem.weight.double().abs().mean() + 1e-3
    return (problem.weight.double() + spread * size * noise).to(problem.weight.dtype)


def shuffled_tiles(data, problem):
    """The columns, whole tiles in any order."""
    width = problem.grid.grid.tile[1]
    tiles = data.draw(st.permutations(range(problem.weight.shape[1] // width)), label="tiles")
    return torch.tensor([tile * width + j for tile in tiles for j in range(width)])


def drawn_rows(data, problem):
    height = problem.grid.grid.tile[0]
    tiles = problem.weight.shape[0] // height
    first = data.draw(st.integers(0, tiles - 1), label="first")
    return slice(first * height, data.draw(st.integers(first + 1, tiles), label="last") * height)


@every_grid
@some_data
def test_meets_the_protocols(name, data):
    problem = problem_of(data, name)
    assert isinstance(problem.grid, FittedGrid)
    assert isinstance(problem.grid.grid, Grid)
    assert problem.grid.shape == tuple(problem.weight.shape)
    assert problem.grid.grid == problem.settings.grid.resolve(problem.grid.shape, problem.weight.dtype)


@every_grid
@some_data
def test_encoding_what_codes_decode_to_gives_the_codes(name, data):
    problem = problem_of(data, name)
    code = problem.grid.encode(drawn_values(data, problem))
    value = problem.grid.decode(code)
    if name in MANY_CODES and problem.settings.zero_rows:
        return  # such a row has scale zero: its codes say nothing, and the rest of the tile depends on them
    again = problem.grid.encode(value)
    exact(*((problem.grid.decode(again), value) if name in MANY_CODES else (again, code)))
    assert (value.shape, value.dtype) == (problem.weight.shape, problem.weight.dtype)


@every_grid
@some_data
def test_columns_can_be_encoded_in_any_order(name, data):
    problem = problem_of(data, name)
    values, columns = drawn_values(data, problem), shuffled_tiles(data, problem)
    width = problem.grid.grid.tile[1]
    cut = data.draw(st.integers(0, len(columns) // width), label="cut") * width
    code = problem.grid.new_code()
    for part in (columns[:cut], columns[cut:]):
        near = problem.grid.encode_(code, values[:, part], part)
        exact(near, problem.grid.decode(problem.grid.encode(values))[:, part])
    exact(code, problem.grid.encode(values))


@every_grid
@some_data
def test_feeding_errors_equals_the_plain_loop(name, data):
    """The kernel takes the steps of `feed_tiles_`, each rounded the same: no bit differs."""
    problem = problem_of(data, name)
    columns = shuffled_tiles(data, problem)
    gram = problem.statistics.gram[columns][:, columns].double()
    ridge = (0.01 * gram.diagonal().mean() + 1e-9) * torch.eye(len(columns), dtype=torch.float64)
    upper = torch.linalg.cholesky(torch.linalg.inv(gram + ridge), upper=True).to(problem.weight.dtype)
    results = []
    for feed in (problem.grid.feed_, partial(feed_tiles_, problem.grid)):
        code, work = problem.grid.new_code(), problem.weight[:, columns].contiguous()
        results.append((code, work, feed(code, work, upper, columns)))
    for kernel, plain in zip(*results, strict=True):
        exact(kernel, plain)


@every_grid
@some_data
def test_zero_is_a_value(name, data):
    if name in WITHOUT_ZERO:
        return
    problem = problem_of(data, name)
    zeros = torch.zeros_like(problem.weight)
    exact(problem.grid.decode(problem.grid.encode(zeros)), zeros)


@every_grid
@some_data
def test_arguments_are_left_alone(name, data):
    problem = problem_of(data, name)
    grid, values, code = problem.grid, drawn_values(data, problem), problem.grid.new_code()
    importance = problem.statistics.importance
    columns = torch.arange(values.shape[1])
    arguments = (problem, values, importance, columns, grid.parameters)
    before = Snapshot.of(*arguments)
    problem.settings.grid.resolve(grid.shape, values.dtype).fit(values, importance)
    grid.encode_(code, values, columns)
    before_decoding = code.clone()
    grid.decode(code)
    grid.scaled(2.0).decode(code)
    grid.encode(values)
    grid.take_rows(drawn_rows(data, problem))
    before.check(*arguments)
    exact(code, before_decoding)


@every_grid
@some_data
def test_rows_are_fitted_and_taken_independently(name, data):
    problem = problem_of(data, name)
    grid, rows = problem.grid, drawn_rows(data, problem)
    part = grid.take_rows(rows)
    fitted = grid.grid.fit(problem.weight[rows], problem.statistics.importance)
    if getattr(grid.grid, "scale_per", "row") == "matrix":  # fitted on all rows, and kept by some of them
        whole = {key: value[rows] if value.ndim == 2 else value for key, value in grid.parameters.items()}
        fitted = replace(fitted, **whole)
    Snapshot.of(part.parameters, part.affine).check(fitted.parameters, fitted.affine)
    assert part.shape == fitted.shape == tuple(problem.weight[rows].shape)
    values = drawn_values(data, problem)
    exact(part.decode(part.encode(values[rows])), grid.decode(grid.encode(values))[rows])


@every_grid
@some_data
def test_power_of_two_scale_commutes(name, data):
    problem = problem_of(data, name)
    grid, values = problem.grid, drawn_values(data, problem)
    factor = 2.0 ** data.draw(st.integers(-8, 8), label="k")
    code, scaled = grid.encode(values), grid.scaled(factor)
    exact(scaled.encode(values * factor), code)
    exact(scaled.decode(code), grid.decode(code) * factor)
    rows = drawn_rows(data, problem)
    a, b = scaled.take_rows(rows), grid.take_rows(rows).scaled(factor)
    Snapshot.of(a.parameters).check(b.parameters)


@every_grid
@some_data
def test_fit_of_a_power_of_two_scales(name, data):
    """With scales that keep their precision, and but for groups of zeros, which have no scale of their own."""
    problem = problem_of(data, name)
    grid = problem.grid.grid
    if "scale_dtype" in {f.name for f in fields(grid)}:
        grid = replace(grid, scale_dtype="float32")
    # a type whose scales are float16 always gets weights that keep them away from its smallest numbers
    factor, lift = 2.0 ** data.draw(st.integers(-8, 8), label="k"), 2.0**12 if name == "gguf" else 1.0
    weight, importance = problem.weight * lift, problem.statistics.importance
    a, b = grid.fit(weight, importance), grid.fit(weight * factor, importance)
    code = a.encode(weight)
    exact(b.encode(weight * factor), code)
    exact(b.decode(code), a.decode(code) * factor)


@every_grid
@some_data
def test_scale_of_the_importance_does_not_matter(name, data):
    problem = problem_of(data, name)
    factor = 4.0 ** data.draw(st.integers(-8, 8), label="k")
    again = problem.grid.grid.fit(problem.weight, problem.statistics.importance * factor)
    Snapshot.of(problem.grid.parameters).check(again.parameters)


@every_grid
@some_data
def test_affine_form_gives_the_values(name, data):
    problem = problem_of(data, name)
    affine = problem.grid.affine
    if affine is None:
        return
    groups = torch.arange(problem.weight.shape[1]) // affine.group_size
    code = problem.grid.encode(drawn_values(data, problem))
    value = affine.scale[:, groups] * code + affine.offset[:, groups]
    # scale * code and the offset are rounded, and so is their sum: three errors of at most u times the larger one
    size = (affine.scale[:, groups] * code).abs() + affine.offset[:, groups].abs()
    excess = (value - problem.grid.decode(code)).abs() - 3 * torch.finfo(value.dtype).eps / 2 * size
    assert float(excess.max()) <= 0


@registered
def test_a_new_grid_says_how_it_is_stored(name):
    assert name in SIZES, "add a line to SIZES, with a twin in tests/reference/grids.py"
    assert name in STORED, "add a line to STORED"


@registered
@some_data
def test_stored_bits_are_the_sizes_of_what_is_stored(name, data):
    problem = problem_of(data, name)
    grid, shape = problem.grid.grid, problem.grid.shape
    assert tuple(grid.stored_bits(shape)) == SIZES[name](grid, shape)


@every_grid
@some_data
def test_what_is_stored_gives_codes_and_parameters_back(name, data):
    problem = problem_of(data, name, (torch.float32,))
    fitted, shape = problem.grid, problem.grid.shape
    code = fitted.encode(drawn_values(data, problem))
    stored = fitted.store(code, shape)
    assert {key: (value.dtype, tuple(value.shape)) for key, value in stored.items()} == fitted.grid.specs(shape)
    again, restored = fitted.grid.restore(shape, stored)
    assert (restored.grid, restored.shape) == (fitted.grid, shape)
    exact(again, code)
    Snapshot.of(restored.parameters).check(fitted.parameters)
    exact(restored.decode(again), fitted.decode(code))


@registered
@some_data
def test_parameters_are_exact_in_the_dtype_they_are_stored_in(name, data):
    problem = problem_of(data, name)
    stored = STORED[name](problem.grid.grid)
    assert set(stored) == set(problem.grid.parameters)
    for key, parameter in problem.grid.parameters.items():
        dtype = stored[key]
        if isinstance(dtype, torch.dtype):
            exact(parameter.to(dtype).to(parameter.dtype), parameter)
            assert bool(parameter.isfinite().all())
            continue
        exact(parameter.round().clamp(0, 2**dtype - 1), parameter)


@registered
@some_data
def test_settings_are_frozen_and_hashable(name, data):
    grid = data.draw(strategies.grids(name))
    assert hash(grid) == hash(replace(grid))
    assert grid == replace(grid)
    for f in fields(grid):
        with pytest.raises((AttributeError, TypeError)):
            setattr(grid, f.name, None)


@registered
def test_name_and_needs(name):
    assert GRIDS[name].kind == name
    assert GRIDS[name]().needs <= strategies.STATISTICS


@registered
def test_bad_settings_are_refused(name):
    for settings in strategies.bad_settings(GRIDS[name]):
        strategies.assert_refused(GRIDS[name], settings)
