"""What every grid promises, as checks that run on one's own: each draws problems, and raises where a promise is broken.

A test of one's own:

    @pytest.mark.parametrize("contract", GRID_CONTRACTS, ids=lambda contract: contract.__name__)
    @given(data=st.data())
    def test_grid(contract, data):
        contract(data, GridCase(settings=st.builds(MyGrid, bits=st.integers(2, 4))))
"""

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Any, cast

import torch
from hypothesis import strategies as st
from torch import Tensor

from mezzotint.core.contracts import FittedGrid, Grid
from mezzotint.grids.feedback import feed_tiles_
from mezzotint.testing.problems import LinearProblem, Snapshot, make_problem
from mezzotint.testing.strategies import DTYPES, problem_settings


@dataclass(frozen=True, slots=True, kw_only=True)
class GridCase:
    """A grid under test.

    Attributes:
        settings: draws grids with all kinds of settings.
        has_zero: zero is one of its values; zero weights are common enough that a grid should have it.
        one_code_a_value: no two codes of a tile stand for the same values.
        size: what weights are multiplied with, for a grid whose scales are always of 16 bits: it keeps them away from
            the smallest numbers.
    """

    settings: st.SearchStrategy[Grid]
    has_zero: bool = True
    one_code_a_value: bool = True
    size: float = 1.0

    def problem(self, data: st.DataObject, dtypes: tuple[torch.dtype, ...] = DTYPES) -> LinearProblem:
        """A linear layer to quantize on it."""
        return make_problem(data.draw(problem_settings(self.settings, dtypes), label="problem"))


_exact = partial(torch.testing.assert_close, rtol=0, atol=0)


def _same(what: str, found: object, expected: object) -> None:
    """Raises AssertionError unless the two are equal."""
    if found != expected:
        raise AssertionError(f"{what}: {found}, expected {expected}")


def meets_the_protocols(data: st.DataObject, case: GridCase) -> None:
    """Settings and fitted grid have everything that other stages ask them for."""
    problem = case.problem(data)
    _same("FittedGrid", isinstance(problem.grid, FittedGrid), True)
    _same("Grid", isinstance(problem.grid.grid, Grid), True)
    _same("shape", problem.grid.shape, tuple(problem.weight.shape))
    _same("grid", problem.grid.grid, problem.settings.grid.resolve(problem.grid.shape, problem.weight.dtype))


def encoding_what_codes_decode_to_gives_the_codes(data: st.DataObject, case: GridCase) -> None:
    """Values of the grid are their own nearest ones."""
    problem = case.problem(data)
    code = problem.grid.encode(_drawn_values(data, problem))
    value = problem.grid.decode(code)
    if not case.one_code_a_value and problem.settings.zero_rows:
        return  # such a row has scale zero: its codes say nothing, and the rest of the tile depends on them
    again = problem.grid.encode(value)
    _exact(*((again, code) if case.one_code_a_value else (problem.grid.decode(again), value)))
    _same("shape and dtype", (value.shape, value.dtype), (problem.weight.shape, problem.weight.dtype))


def columns_can_be_encoded_in_any_order(data: st.DataObject, case: GridCase) -> None:
    """Whole tiles of columns, a few at a time, give the codes of the whole matrix."""
    problem = case.problem(data)
    values, columns = _drawn_values(data, problem), _shuffled_tiles(data, problem)
    width = problem.grid.grid.tile[1]
    cut = data.draw(st.integers(0, len(columns) // width), label="cut") * width
    code = problem.grid.new_code()
    for part in (columns[:cut], columns[cut:]):
        near = problem.grid.encode_(code, values[:, part], part)
        _exact(near, problem.grid.decode(problem.grid.encode(values))[:, part])
    _exact(code, problem.grid.encode(values))


def feeding_errors_equals_the_plain_loop(data: st.DataObject, case: GridCase) -> None:
    """The kernel takes the steps of `feed_tiles_`, each rounded the same: no bit differs."""
    problem = case.problem(data)
    columns = _shuffled_tiles(data, problem)
    gram = problem.statistics.gram[columns][:, columns].double()
    ridge = (0.01 * gram.diagonal().mean() + 1e-9) * torch.eye(len(columns), dtype=torch.float64)
    upper = torch.linalg.cholesky(torch.linalg.inv(gram + ridge), upper=True).to(problem.weight.dtype)
    results = []
    for feed in (problem.grid.feed_, partial(feed_tiles_, problem.grid)):
        code, work = problem.grid.new_code(), problem.weight[:, columns].contiguous()
        results.append((code, work, feed(code, work, upper, columns)))
    for kernel, plain in zip(*results, strict=True):
        _exact(kernel, plain)


def zero_is_a_value(data: st.DataObject, case: GridCase) -> None:
    """Zeros stay zeros."""
    if not case.has_zero:
        return
    problem = case.problem(data)
    zeros = torch.zeros_like(problem.weight)
    _exact(problem.grid.decode(problem.grid.encode(zeros)), zeros)


def arguments_are_left_alone(data: st.DataObject, case: GridCase) -> None:
    """Nothing that is passed is changed, but for the codes that `encode_` writes."""
    problem = case.problem(data)
    grid, values, code = problem.grid, _drawn_values(data, problem), problem.grid.new_code()
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
    grid.take_rows(_drawn_rows(data, problem))
    before.check(*arguments)
    _exact(code, before_decoding)


def rows_are_fitted_and_taken_independently(data: st.DataObject, case: GridCase) -> None:
    """Rows have the grid and the codes that they would have alone, unless scales belong to the matrix."""
    problem = case.problem(data)
    grid, rows = problem.grid, _drawn_rows(data, problem)
    part = grid.take_rows(rows)
    fitted = grid.grid.fit(problem.weight[rows], problem.statistics.importance)
    _same("rowwise", grid.grid.rowwise, getattr(grid.grid, "scale_per", "row") != "matrix")
    if not grid.grid.rowwise:  # fitted on all rows, and kept by some of them
        whole = {key: value[rows] if value.ndim == 2 else value for key, value in grid.parameters.items()}
        fitted = replace(cast(Any, fitted), **whole)
    Snapshot.of(part.parameters, part.affine).check(fitted.parameters, fitted.affine)
    _same("shape", (part.shape, fitted.shape), (tuple(problem.weight[rows].shape),) * 2)
    values = _drawn_values(data, problem)
    _exact(part.decode(part.encode(values[rows])), grid.decode(grid.encode(values))[rows])


def rows_that_were_taken_are_joined(data: st.DataObject, case: GridCase) -> None:
    """Parts of the rows, from several processes, make the whole again."""
    problem = case.problem(data)
    grid, height = problem.grid, problem.grid.grid.tile[0]
    code = grid.encode(problem.weight)
    cut = data.draw(st.integers(1, max(1, grid.shape[0] // height - 1)), label="tiles") * height
    halves = [slice(0, cut), slice(cut, grid.shape[0])] if cut < grid.shape[0] else [slice(0, cut)]
    parts = [(grid.take_rows(rows), grid.take_rows(rows).encode(problem.weight[rows])) for rows in halves]
    # what another part would hand over, in the order in which it is asked for
    rest: list[Tensor] = []
    for part, own in parts[1:]:
        part.join_rows(own, lambda value, _: (rest.append(value), value)[1])
    part, own = parts[0]
    joined, whole = part.join_rows(own, lambda value, axis: torch.cat([value, rest.pop(0)] if rest else [value], axis))
    _exact(joined, code)
    _same("shape", whole.shape, grid.shape)
    Snapshot.of(whole.parameters).check(grid.parameters)
    _exact(whole.decode(joined), grid.decode(code))


def power_of_two_scale_commutes(data: st.DataObject, case: GridCase) -> None:
    """A grid of twice the values is met by twice the weights with the same codes."""
    problem = case.problem(data)
    grid, values = problem.grid, _drawn_values(data, problem)
    factor = 2.0 ** data.draw(st.integers(-8, 8), label="k")
    code, scaled = grid.encode(values), grid.scaled(factor)
    _exact(scaled.encode(values * factor), code)
    _exact(scaled.decode(code), grid.decode(code) * factor)
    rows = _drawn_rows(data, problem)
    a, b = scaled.take_rows(rows), grid.take_rows(rows).scaled(factor)
    Snapshot.of(a.parameters).check(b.parameters)


def fit_of_a_power_of_two_scales(data: st.DataObject, case: GridCase) -> None:
    """With scales that keep their precision, and but for groups of zeros, which have no scale of their own."""
    problem = case.problem(data)
    grid: Any = problem.grid.grid
    if "scale_dtype" in {f.name for f in fields(grid)}:
        grid = replace(grid, scale_dtype="float32")
    factor = 2.0 ** data.draw(st.integers(-8, 8), label="k")
    weight, importance = problem.weight * case.size, problem.statistics.importance
    a, b = grid.fit(weight, importance), grid.fit(weight * factor, importance)
    code = a.encode(weight)
    _exact(b.encode(weight * factor), code)
    _exact(b.decode(code), a.decode(code) * factor)


def scale_of_the_importance_does_not_matter(data: st.DataObject, case: GridCase) -> None:
    """Only how inputs compare matters."""
    problem = case.problem(data)
    factor = 4.0 ** data.draw(st.integers(-8, 8), label="k")
    again = problem.grid.grid.fit(problem.weight, problem.statistics.importance * factor)
    Snapshot.of(problem.grid.parameters).check(again.parameters)


def affine_form_gives_the_values(data: st.DataObject, case: GridCase) -> None:
    """Where a grid says that it is affine, ``scale * code + offset`` are its values."""
    problem = case.problem(data)
    affine = problem.grid.affine
    if affine is None:
        return
    groups = torch.arange(problem.weight.shape[1]) // affine.group_size
    code = problem.grid.encode(_drawn_values(data, problem))
    value = affine.scale[:, groups] * code + affine.offset[:, groups]
    # scale * code and the offset are rounded, and so is their sum: three errors of at most u times the larger one
    size = (affine.scale[:, groups] * code).abs() + affine.offset[:, groups].abs()
    excess = (value - problem.grid.decode(code)).abs() - 3 * torch.finfo(value.dtype).eps / 2 * size
    _same("values farther off than rounding explains", float(excess.clamp(min=0).max()), 0.0)


def what_is_stored_gives_codes_and_parameters_back(data: st.DataObject, case: GridCase) -> None:
    """Files hold what `specs` says, and everything that was fitted."""
    problem = case.problem(data, (torch.float32,))
    fitted, shape = problem.grid, problem.grid.shape
    code = fitted.encode(_drawn_values(data, problem))
    stored = fitted.store(code, shape)
    specs = {key: (value.dtype, tuple(value.shape)) for key, value in stored.items()}
    _same("specs", specs, dict(fitted.grid.specs(shape)))
    again, restored = fitted.grid.restore(shape, stored)
    _same("grid and shape", (restored.grid, restored.shape), (fitted.grid, shape))
    _exact(again, code)
    Snapshot.of(restored.parameters).check(fitted.parameters)
    _exact(restored.decode(again), fitted.decode(code))


def settings_are_frozen_and_hashable(data: st.DataObject, case: GridCase) -> None:
    """Settings are values: they compare, serve as keys, and never change."""
    grid: Any = data.draw(case.settings, label="grid")
    _same("hash", hash(grid), hash(replace(grid)))
    _same("settings", grid, replace(grid))
    for f in fields(grid):
        try:
            setattr(grid, f.name, None)
        except (AttributeError, TypeError):
            continue
        raise AssertionError(f"{type(grid).__name__}.{f.name} can be changed; make it a frozen dataclass")


GRID_CONTRACTS: tuple[Callable[[st.DataObject, GridCase], None], ...] = (
    meets_the_protocols,
    encoding_what_codes_decode_to_gives_the_codes,
    columns_can_be_encoded_in_any_order,
    feeding_errors_equals_the_plain_loop,
    zero_is_a_value,
    arguments_are_left_alone,
    rows_are_fitted_and_taken_independently,
    rows_that_were_taken_are_joined,
    power_of_two_scale_commutes,
    fit_of_a_power_of_two_scales,
    scale_of_the_importance_does_not_matter,
    affine_form_gives_the_values,
    what_is_stored_gives_codes_and_parameters_back,
    settings_are_frozen_and_hashable,
)


def _drawn_values(data: st.DataObject, problem: LinearProblem) -> Tensor:
    """Values in and far out of the range of the grid."""
    spread = data.draw(st.sampled_from([0.3, 1.0, 10.0]), label="spread")
    noise = torch.randn(problem.weight.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    size = problem.weight.double().abs().mean() + 1e-3
    return (problem.weight.double() + spread * size * noise).to(problem.weight.dtype)


def _shuffled_tiles(data: st.DataObject, problem: LinearProblem) -> Tensor:
    """The columns, whole tiles in any order."""
    width = problem.grid.grid.tile[1]
    tiles = data.draw(st.permutations(range(problem.weight.shape[1] // width)), label="tiles")
    return torch.tensor([tile * width + j for tile in tiles for j in range(width)])


def _drawn_rows(data: st.DataObject, problem: LinearProblem) -> slice:
    height = problem.grid.grid.tile[0]
    tiles = problem.weight.shape[0] // height
    first = data.draw(st.integers(0, tiles - 1), label="first")
    return slice(first * height, data.draw(st.integers(first + 1, tiles), label="last") * height)
