"""What every registered rounding promises on every registered grid it serves, and on two small vector grids."""

from dataclasses import fields, replace
from functools import partial

import pytest
import torch
from grids.toy_vector import ToyVectorGrid
from hypothesis import given
from hypothesis import strategies as st

from mezzotint.core.linalg import Factor
from mezzotint.registry import GRIDS, ROUNDINGS
from mezzotint.testing import strategies
from mezzotint.testing.problems import Snapshot, column_scale, expected_share, feedback_error, make_problem

F64 = (torch.float64,)
GRID_STRATEGIES = {name: partial(strategies.grids, name) for name in GRIDS} | {
    "toy 1x2": lambda: st.just(ToyVectorGrid(tile=(1, 2))),
    "toy 2x4": lambda: st.just(ToyVectorGrid(tile=(2, 4))),
}
SCALAR = {"uniform"}  # grids of tile (1, 1), whatever their settings
PAIRS = [(r, g) for r in ROUNDINGS for g in GRID_STRATEGIES if g in SCALAR or not ROUNDINGS[r].scalar_only]

exact = partial(torch.testing.assert_close, rtol=0, atol=0)


def cases(rounding, grid, dtypes=strategies.DTYPES):
    """Pairs of a rounding's settings and a problem."""
    return st.tuples(
        strategies.roundings(rounding), strategies.linear_problems(GRID_STRATEGIES[grid](), dtypes=dtypes)
    )


def solve(rounding, problem):
    return rounding.round(problem.aim, problem.grid, problem.statistics)


@pytest.fixture(params=PAIRS, ids=lambda pair: f"{pair[0]}-{pair[1]}", scope="module")
def pair(request):
    return request.param


def test_value_is_what_the_codes_decode_to(pair):
    @given(cases(*pair))
    def check(case):
        rounding, problem = case
        rounded = solve(rounding, problem)
        exact(rounded.value, rounded.grid.decode(rounded.code))
        assert rounded.value.shape == problem.weight.shape
        assert rounded.code.shape == rounded.grid.new_code().shape
        assert rounded.code.dtype == rounded.grid.new_code().dtype

    check()


def test_values_before_rounding_give_the_codes(pair):
    @given(cases(*pair))
    def check(case):
        rounding, problem = case
        rounded = solve(rounding, problem)
        if rounded.before is not None:
            exact(rounded.grid.encode(rounded.before), rounded.code)

    check()


def test_power_of_two_scale_is_exact(pair):
    @given(cases(*pair), st.integers(-8, 8))
    def check(case, k):
        rounding, problem = case
        a, b = solve(rounding, problem), solve(rounding, problem.scaled(2.0**k))
        exact(b.code, a.code)
        exact(b.value, a.value * 2.0**k)

    check()


def test_scale_of_the_statistics_does_not_matter(pair):
    @given(cases(*pair), st.integers(-8, 8))
    def check(case, k):
        rounding, problem = case
        rescaled = replace(problem, statistics=problem.statistics.scaled(4.0**k))
        exact(solve(rounding, rescaled).code, solve(rounding, problem).code)

    check()


def test_rows_are_independent(pair):
    @given(cases(*pair, F64), st.data())
    def check(case, data):
        rounding, problem = case
        height = problem.grid.grid.tile[0]
        tiles = problem.weight.shape[0] // height
        first = data.draw(st.integers(0, tiles - 1))
        rows = slice(first * height, data.draw(st.integers(first + 1, tiles)) * height)
        exact(solve(rounding, problem.take_rows(rows)).value, solve(rounding, problem).value[rows])

    check()


def test_arguments_are_left_alone(pair):
    @given(cases(*pair))
    def check(case):
        rounding, problem = case
        before = Snapshot.of(problem)
        solve(rounding, problem)
        before.check(problem)

    check()


def test_same_input_gives_same_bits(pair):
    @given(strategies.roundings(pair[0]), strategies.problem_settings(GRID_STRATEGIES[pair[1]]()))
    def check(rounding, settings):
        Snapshot.of(solve(rounding, make_problem(settings))).check(solve(rounding, make_problem(settings)))

    check()


def test_dead_columns_are_rounded_to_nearest(pair):
    @given(cases(*pair, F64), st.data())
    def check(case, data):
        rounding, problem = case
        width = problem.grid.grid.tile[1]
        tile = data.draw(st.integers(0, problem.weight.shape[1] // width - 1))
        dead = tuple(range(tile * width, (tile + 1) * width))
        problem = make_problem(replace(problem.settings, dead_columns=dead, duplicates=()))
        nearest = problem.grid.decode(problem.grid.encode(problem.weight))
        exact(solve(rounding, problem).value[:, list(dead)], nearest[:, list(dead)])

    check()


def with_block_sizes(rounding, first, second):
    return tuple(replace(rounding, block_size=size) for size in (first, second))


def is_blocked(rounding):
    return "block_size" in {f.name for f in fields(rounding)}


def test_block_size_does_not_matter_in_float64(pair):
    if not is_blocked(ROUNDINGS[pair[0]]):
        pytest.skip("has no block size")

    @given(cases(*pair, F64), st.integers(1, 50), st.integers(1, 50))
    def check(case, first, second):
        rounding, problem = case
        a, b = (solve(r, problem) for r in with_block_sizes(rounding, first, second))
        exact(a.code, b.code)

    check()


@pytest.mark.parametrize("name", ["block size", "rows"])
def test_float32_codes_differ_no_more_than_derived(pair, name):
    """The bound is for error feedback through U; a rounding without feedback changes no code at all and meets it."""
    rounding, grid = ROUNDINGS[pair[0]](), pair[1]
    if grid not in SCALAR or (name == "block size" and not is_blocked(rounding)):
        pytest.skip("does not apply")
    shares, limits = [], []
    for seed in range(8):
        settings = strategies.ProblemSettings(
            grid=GRIDS[grid](), rows=64, columns=96, tokens=200, seed=seed, dtype=torch.float32
        )
        problem = make_problem(settings)
        if name == "block size":
            a, b = (solve(r, problem).value for r in with_block_sizes(rounding, 5, 128))
        else:
            a = torch.cat([solve(rounding, problem.take_rows(slice(r, r + 1))).value for r in range(64)])
            b = solve(rounding, problem).value
        shares.append(float((a != b).double().mean()))
        limits.append(share_limit(rounding, problem))
    # Markov: the mean share exceeds ten times its expectation with a probability below 1/10, under the assumption of
    # `expected_share` and for errors as large as their bounds; real ones are sqrt(n) below them
    assert sum(shares) <= 10 * sum(limits)


def share_limit(rounding, problem):
    rounded = solve(rounding, problem)
    if rounded.before is None or "damping" not in {f.name for f in fields(rounding)}:
        return 0.0
    factor: Factor = problem.statistics.factor(rounding.damping, rounding.order)
    difference = feedback_error(rounded, problem.aim.matrix, factor)
    return expected_share(difference, column_scale(problem.grid), factor.permutation)
