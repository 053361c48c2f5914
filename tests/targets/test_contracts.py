"""What every registered target promises."""

from dataclasses import fields, replace
from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mezzotint.core.contracts import Target
from mezzotint.registry import TARGETS
from mezzotint.testing import strategies
from mezzotint.testing.problems import Snapshot, make_problem, make_tokens

F64 = (torch.float64,)
every_target = pytest.mark.parametrize("name", TARGETS)
some_problem = given(data=st.data())
exact = partial(torch.testing.assert_close, rtol=0, atol=0)


def case_of(data, dtypes=strategies.DTYPES):
    """A problem, and the statistics of other tokens of the same inputs."""
    settings = data.draw(strategies.problem_settings(dtypes=dtypes), label="problem")
    tokens = make_tokens(replace(settings, tokens=settings.tokens + 5))
    return make_problem(settings), tokens.statistics()


def aim_of(name, problem, held_out):
    return TARGETS[name]().aim(problem.weight, problem.statistics, held_out)


@every_target
@some_problem
def test_aims_are_wide_and_of_the_same_shape(name, data):
    problem, held_out = case_of(data)
    aim = aim_of(name, problem, held_out)
    assert (aim.matrix.dtype, aim.matrix.shape) == (problem.weight.dtype, problem.weight.shape)
    assert bool(aim.matrix.isfinite().all())
    assert isinstance(TARGETS[name](), Target)


@every_target
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@some_problem
def test_narrow_weights_give_float32_aims(name, dtype, data):
    problem, held_out = case_of(data, (torch.float32,))
    narrow = problem.weight.to(dtype)
    aim = TARGETS[name]().aim(narrow, problem.statistics, held_out)
    assert aim.matrix.dtype == torch.float32
    wide = TARGETS[name]().aim(narrow.float(), problem.statistics, held_out)
    exact(aim.matrix, wide.matrix)


@every_target
@some_problem
def test_arguments_are_left_alone(name, data):
    problem, held_out = case_of(data)
    before = Snapshot.of(problem, held_out)
    aim_of(name, problem, held_out)
    before.check(problem, held_out)


@every_target
@some_problem
def test_same_input_gives_the_same_bits(name, data):
    problem, held_out = case_of(data)
    Snapshot.of(aim_of(name, problem, held_out)).check(aim_of(name, make_problem(problem.settings), held_out))


@every_target
@some_problem
def test_power_of_two_scale_is_exact(name, data):
    problem, held_out = case_of(data)
    factor = 2.0 ** data.draw(st.integers(-8, 8), label="k")
    scaled_held_out = replace(held_out, residual=held_out.residual * factor)
    a, b = aim_of(name, problem, held_out), aim_of(name, problem.scaled(factor), scaled_held_out)
    exact(b.matrix, a.matrix * factor)


@every_target
@some_problem
def test_scale_of_the_statistics_does_not_matter(name, data):
    problem, held_out = case_of(data)
    factor = 4.0 ** data.draw(st.integers(-8, 8), label="k")
    rescaled = replace(problem, statistics=problem.statistics.scaled(factor))
    exact(aim_of(name, rescaled, held_out.scaled(factor)).matrix, aim_of(name, problem, held_out).matrix)


@every_target
@some_problem
def test_rows_are_independent(name, data):
    """Up to the order of sums in matrix products, which may change with the number of rows."""
    problem, held_out = case_of(data, F64)
    first = data.draw(st.integers(0, problem.weight.shape[0] - 1), label="first")
    rows = slice(first, data.draw(st.integers(first + 1, problem.weight.shape[0]), label="last"))
    part = TARGETS[name]().aim(
        problem.weight[rows],
        problem.take_rows(rows).statistics,
        replace(held_out, residual=held_out.residual[rows]),
    )
    whole = aim_of(name, problem, held_out).matrix[rows]
    # solves with a condition number of up to 1e5 over 40 columns: 1e5 * 40 * 2.2e-16
    torch.testing.assert_close(part.matrix, whole, rtol=1e-8, atol=1e-9 * float(whole.abs().max()))


@every_target
def test_settings_are_frozen_hashable_and_named(name):
    target = TARGETS[name]()
    assert hash(target) == hash(TARGETS[name]())
    assert target == TARGETS[name]()
    assert TARGETS[name].kind == name
    assert target.needs <= strategies.STATISTICS
    for f in fields(target):
        with pytest.raises((AttributeError, TypeError)):
            setattr(target, f.name, None)


@every_target
def test_bad_settings_are_refused(name):
    for settings in strategies.bad_settings(TARGETS[name]):
        strategies.assert_refused(TARGETS[name], settings)
