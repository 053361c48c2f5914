"""What every registered rounding promises on every registered grid it serves, and on two small vector grids."""

from dataclasses import fields, replace
from functools import partial
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from grids.toy_vector import ToyVectorGrid
from mezzotint.grids.uniform import UniformGrid
from mezzotint.registry import GRIDS, ROUNDINGS
from mezzotint.testing import strategies
from mezzotint.testing.problems import (
    ProblemSettings,
    Snapshot,
    column_scale,
    expected_share,
    feedback_error,
    make_problem,
)

F64 = (torch.float64,)
TOYS = {"toy 1x2": ToyVectorGrid(tile=(1, 2)), "toy 2x4": ToyVectorGrid(tile=(2, 4))}
SCALAR = [name for name in GRIDS if GRIDS[name]().tile == (1, 1)]
PAIRS = [(r, g) for r in ROUNDINGS for g in [*GRIDS, *TOYS] if g in SCALAR or not ROUNDINGS[r].scalar_only]


def setting_names(rounding):
    return {f.name for f in fields(ROUNDINGS[rounding])}


def is_affine(grid):
    """The bounds on shares of differing codes are in units of the distance between neighbouring values."""
    return (
        make_problem(ProblemSettings(grid=GRIDS[grid](), rows=1, columns=256, tokens=3, seed=0)).grid.affine is not None
    )


BLOCKED = [pair for pair in PAIRS if "block_size" in setting_names(pair[0])]
AFFINE = [pair for pair in PAIRS if pair[1] in SCALAR and is_affine(pair[1])]

every_pair = pytest.mark.parametrize(("rounding", "grid"), PAIRS)
every_blocked_pair = pytest.mark.parametrize(("rounding", "grid"), BLOCKED)
some_data = given(data=st.data())
exact = partial(torch.testing.assert_close, rtol=0, atol=0)


def settings_of(grid, dtypes=strategies.DTYPES):
    chosen = st.just(TOYS[grid]) if grid in TOYS else strategies.grids(grid)
    return strategies.problem_settings(chosen, dtypes)


def case_of(data, rounding, grid, dtypes=strategies.DTYPES):
    """A rounding with drawn settings, and a drawn problem."""
    chosen = data.draw(strategies.roundings(rounding), label="rounding")
    return chosen, make_problem(data.draw(settings_of(grid, dtypes), label="problem"))


def solve(rounding, problem):
    return rounding.round(problem.aim, problem.grid, problem.statistics)


@every_pair
@some_data
def test_values_codes_and_arguments(rounding, grid, data):
    """Values are what the codes decode to, those before rounding give them, arguments stay, and so does the result."""
    stage = data.draw(strategies.roundings(rounding), label="rounding")
    settings = data.draw(settings_of(grid), label="problem")
    problem = make_problem(settings)
    before = Snapshot.of(problem)
    rounded = solve(stage, problem)
    before.check(problem)
    exact(rounded.value, rounded.grid.decode(rounded.code))
    empty = rounded.grid.new_code()
    assert (rounded.value.shape, rounded.value.dtype) == (problem.weight.shape, problem.weight.dtype)
    assert (rounded.code.shape, rounded.code.dtype) == (empty.shape, empty.dtype)
    if rounded.before is not None:
        exact(rounded.grid.encode(rounded.before), rounded.code)
    Snapshot.of(rounded).check(solve(stage, make_problem(settings)))


@every_pair
@some_data
def test_scales_of_weights_and_of_statistics(rounding, grid, data):
    """The first, a power of two, comes out again exactly; the second does not matter."""
    stage, problem = case_of(data, rounding, grid)
    k, j = (data.draw(st.integers(-8, 8), label="k") for _ in range(2))
    plain, scaled = solve(stage, problem), solve(stage, problem.scaled(2.0**k))
    exact(scaled.code, plain.code)
    exact(scaled.value, plain.value * 2.0**k)
    other = replace(problem, statistics=problem.statistics.scaled(4.0**j))
    exact(solve(stage, other).code, plain.code)


@every_pair
@some_data
def test_rows_are_independent_in_float64(rounding, grid, data):
    stage, problem = case_of(data, rounding, grid, F64)
    height = problem.grid.grid.tile[0]
    tiles = problem.weight.shape[0] // height
    first = data.draw(st.integers(0, tiles - 1), label="first")
    last = data.draw(st.integers(first + 1, tiles), label="last")
    rows = slice(first * height, last * height)
    exact(solve(stage, problem.take_rows(rows)).value, solve(stage, problem).value[rows])


@every_pair
@some_data
def test_dead_columns_are_rounded_to_nearest(rounding, grid, data):
    stage = data.draw(strategies.roundings(rounding))
    settings = data.draw(settings_of(grid, F64))
    width = settings.grid.tile[1]
    start = data.draw(st.integers(0, settings.columns // width - 1)) * width
    dead = list(range(start, start + width))
    problem = make_problem(replace(settings, dead_columns=tuple(dead), duplicates=()))
    nearest = problem.grid.decode(problem.grid.encode(problem.weight))
    exact(solve(stage, problem).value[:, dead], nearest[:, dead])


@every_blocked_pair
@some_data
def test_block_size_does_not_matter_in_float64(rounding, grid, data):
    stage, problem = case_of(data, rounding, grid, F64)
    first, second = (data.draw(st.integers(1, 50)) for _ in range(2))
    exact(solve(replace(stage, block_size=first), problem).code, solve(replace(stage, block_size=second), problem).code)


def large_problems(grid):
    return [
        make_problem(
            ProblemSettings(grid=GRIDS[grid](), rows=64, columns=96, tokens=200, seed=seed, dtype=torch.float32)
        )
        for seed in range(4)
    ]


def assert_share_below_limit(rounding, grid, first, second):
    """Two ways to compute the same values: the share of those that differ, against a limit.

    The limit is the expected share if all values differ by as much as their bounds allow. They differ by at most a
    fortieth of that (measured; sums of n random errors grow with sqrt(n), bounds with n), so by Markov less than one
    stream of problems in forty is above it; the streams here are fixed. Without error feedback nothing may differ.
    """
    shares, limits = [], []
    for problem in large_problems(grid):
        shares.append(float((first(problem) != second(problem)).double().mean()))
        limits.append(0.0)
        if "damping" in setting_names(rounding):
            stage = ROUNDINGS[rounding]()
            factor = problem.statistics.factor(stage.damping, stage.order)
            difference = feedback_error(solve(stage, problem), problem.weight, factor)
            limits[-1] = expected_share(difference, column_scale(problem.grid), factor.permutation)
    assert sum(shares) <= sum(limits), (shares, limits)


@pytest.mark.parametrize(("rounding", "grid"), AFFINE)
def test_rows_are_independent_in_float32(rounding, grid):
    stage = ROUNDINGS[rounding]()

    def in_parts(problem):
        cuts = [0, 1, 5, 20, 64]  # shapes for which libraries multiply matrices differently
        return torch.cat([solve(stage, problem.take_rows(slice(a, b))).value for a, b in pairwise(cuts)])

    assert_share_below_limit(rounding, grid, in_parts, lambda problem: solve(stage, problem).value)


@pytest.mark.parametrize(("rounding", "grid"), [pair for pair in AFFINE if pair in BLOCKED])
def test_block_size_does_not_matter_in_float32(rounding, grid):
    small, large = (ROUNDINGS[rounding](block_size=size) for size in (5, 128))
    assert_share_below_limit(
        rounding, grid, lambda problem: solve(small, problem).value, lambda problem: solve(large, problem).value
    )


@pytest.mark.parametrize("rounding", ROUNDINGS)
@some_data
def test_settings_are_frozen_and_hashable(rounding, data):
    stage = data.draw(strategies.roundings(rounding))
    assert hash(stage) == hash(replace(stage))
    assert stage == replace(stage)
    with pytest.raises((AttributeError, TypeError)):  # FrozenInstanceError is an AttributeError
        stage.kind = "other"


@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_name_and_needs(rounding):
    stage = ROUNDINGS[rounding]
    assert stage.kind == rounding
    assert stage.needs <= strategies.STATISTICS
    assert {type(stage.accepts_corrected), type(stage.scalar_only)} == {bool}


@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_bad_settings_are_refused(rounding):
    for settings in strategies.bad_settings(ROUNDINGS[rounding]):
        strategies.assert_refused(ROUNDINGS[rounding], settings)


@pytest.mark.parametrize("rounding", [name for name in ROUNDINGS if "damping" in setting_names(name)])
@pytest.mark.parametrize("kind", ["duplicates", "few tokens", "dead", "constant"])
@pytest.mark.parametrize("damping", [0.0, 0.01])
def test_ill_conditioned_inputs_give_finite_results_and_the_damping_they_needed(rounding, kind, damping):
    settings = ProblemSettings(
        grid=UniformGrid(bits=3, group_size=None, scale_dtype="float32"),
        rows=4,
        columns=24,
        tokens=8 if kind == "few tokens" else 200,
        seed=7,
        dtype=torch.float32,
        dead_columns=(3, 4, 11) if kind == "dead" else (),
        duplicates=((0, 1), (0, 2), (5, 9)) if kind == "duplicates" else (),
    )
    problem = make_problem(settings)
    if kind == "constant":  # every input is the same number: a gram matrix of rank one
        gram = torch.ones_like(problem.statistics.gram) * 200
        problem = replace(problem, statistics=replace(problem.statistics, gram=gram))
    rounded = ROUNDINGS[rounding](damping=damping).round(problem.aim, problem.grid, problem.statistics)
    assert bool(rounded.value.isfinite().all())
    limit = 20 * problem.weight.abs().max()
    assert float(rounded.value.abs().max()) <= float(limit)
    needed = rounded.decisions.get("rounding.damping", damping)
    assert needed >= damping
    if damping > 0:
        assert "rounding.damping" not in rounded.decisions
    if kind == "constant" and damping == 0:
        assert needed > 0
