"""What every registered grid promises, and two small vector grids with it."""

from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from grids.toy_vector import ToyVectorGrid
from mezzotint.registry import GRIDS
from mezzotint.testing import strategies
from mezzotint.testing.grid_contracts import GRID_CONTRACTS, GridCase
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


def case_of(name):
    return GridCase(
        settings=st.just(TOYS[name]) if name in TOYS else strategies.grids(name),
        has_zero=name not in WITHOUT_ZERO,
        one_code_a_value=name not in MANY_CODES,
        size=2.0**12 if name == "gguf" else 1.0,
    )


@every_grid
@pytest.mark.parametrize("contract", GRID_CONTRACTS, ids=lambda contract: contract.__name__)
@some_data
def test_contract(contract, name, data):
    contract(data, case_of(name))


@registered
def test_a_new_grid_says_how_it_is_stored(name):
    assert name in SIZES, "add a line to SIZES, with a twin in tests/reference/grids.py"
    assert name in STORED, "add a line to STORED"


@registered
@some_data
def test_stored_bits_are_the_sizes_of_what_is_stored(name, data):
    problem = case_of(name).problem(data)
    grid, shape = problem.grid.grid, problem.grid.shape
    assert tuple(grid.stored_bits(shape)) == SIZES[name](grid, shape)


@registered
@some_data
def test_parameters_are_exact_in_the_dtype_they_are_stored_in(name, data):
    problem = case_of(name).problem(data)
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
def test_name_and_needs(name):
    assert GRIDS[name].kind == name
    assert GRIDS[name]().needs <= strategies.STATISTICS


@registered
def test_bad_settings_are_refused(name):
    for settings in strategies.bad_settings(GRIDS[name]):
        strategies.assert_refused(GRIDS[name], settings)
