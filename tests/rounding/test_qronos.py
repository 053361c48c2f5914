"""Qronos against its definition on tokens, and what is its own."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from mezzotint.core.contracts import Aim
from mezzotint.errors import ConfigError
from mezzotint.grids.uniform import UniformGrid
from mezzotint.rounding.gptq import Gptq
from mezzotint.rounding.qronos import Qronos
from mezzotint.targets.qep import Qep
from mezzotint.testing import strategies
from mezzotint.testing.problems import ProblemSettings, make_problem, make_tokens
from reference import gptq as gptq_reference
from reference import linalg
from reference import qep as targets_reference
from reference import qronos as reference
from rounding.test_gptq import uniform_quantizer
from targets.test_qep import DIFFICULT, difficult_tokens

F64 = (torch.float64,)
# As for GPTQ: values of about 1 times the feedback, condition numbers below 1e5, 40 columns, 2.2e-16 each.
CLOSE = {"rtol": 1e-8, "atol": 1e-8}
dampings = st.sampled_from([0.001, 0.01, 0.1, 1.0])
orders = st.sampled_from(["natural", "diagonal"])
sizes = st.sampled_from([1, 3, 16, 128])
problems = strategies.linear_problems(dtypes=F64)
exact = {"rtol": 0, "atol": 0}


def solve(stage, problem, **changed):
    return stage.round(problem.aim, problem.grid, replace(problem.statistics, **changed))


def assert_matches_definition(stage, problem):
    tokens = make_tokens(problem.settings)
    gram = problem.statistics.gram.numpy()
    x, xh = tokens.original.numpy(), tokens.quantized.numpy()
    x, xh = reference.damped_tokens(x, xh, targets_reference.ridge_of(xh, stage.damping))
    order = linalg.visiting_order(gram, stage.order)
    value, before = reference.qronos(problem.weight.numpy(), x, xh, uniform_quantizer(problem.grid), order)
    rounded = solve(stage, problem)
    np.testing.assert_allclose(rounded.value.numpy(), value, rtol=1e-12, atol=0)
    np.testing.assert_allclose(rounded.before.numpy(), before, **CLOSE)


@given(seed=st.integers(0, 2**20), order=orders, size=sizes, bits=st.integers(2, 4))
def test_undamped_it_is_its_definition(seed, order, size, bits):
    grid = UniformGrid(bits=bits, group_size=5)
    problem = make_problem(ProblemSettings(grid=grid, rows=3, columns=12, tokens=60, seed=seed))
    assert_matches_definition(Qronos(damping=0.0, order=order, block_size=size), problem)


@given(problem=problems, damping=dampings, order=orders, size=sizes)
def test_damped_it_is_its_definition_on_more_tokens(problem, damping, order, size):
    """A ridge on H and G alike is one more token for each input, in both streams."""
    assume(bool(problem.statistics.gram.diagonal().any()))  # no inputs, no ridge
    assert_matches_definition(Qronos(damping=damping, order=order, block_size=size), problem)


@given(problem=problems, damping=dampings, order=orders, size=sizes)
def test_without_drift_it_is_gptq(problem, damping, order, size):
    wanted = solve(Gptq(damping=damping, order=order), problem)
    found = solve(
        Qronos(damping=damping, order=order, block_size=size),
        problem,
        drift=torch.zeros_like(problem.statistics.drift),
    )
    torch.testing.assert_close(found.code, wanted.code, **exact)
    torch.testing.assert_close(found.before, wanted.before, **CLOSE)


@pytest.mark.parametrize("dead", [(0,), (2, 3), tuple(range(6))])
@pytest.mark.parametrize("damping", [0.0, 0.01])
@pytest.mark.parametrize("order", ["natural", "diagonal"])
def test_inputs_that_are_never_seen_are_rounded_to_nearest(dead, damping, order):
    grid = UniformGrid(bits=3, group_size=None)
    problem = make_problem(ProblemSettings(grid=grid, rows=3, columns=6, tokens=40, seed=0, dead_columns=dead))
    rounded = solve(Qronos(damping=damping, order=order), problem)
    nearest = problem.grid.encode(problem.weight)
    torch.testing.assert_close(rounded.code[:, dead], nearest[:, dead], **exact)


@given(seed=st.integers(0, 2**20), order=orders)
def test_undamped_it_is_qep_and_gptq_but_for_the_first_column(seed, order):
    grid = UniformGrid(bits=3, group_size=5)
    problem = make_problem(ProblemSettings(grid=grid, rows=3, columns=12, tokens=60, seed=seed))
    rounded = solve(Qronos(damping=0.0, order=order), problem)
    aim = Qep(alpha=1.0, damping=0.0).aim(problem.weight, problem.statistics, None)
    gram, nearest = problem.statistics.gram.numpy(), uniform_quantizer(problem.grid)
    visited = linalg.visiting_order(gram, order)

    def quantize(values, columns):
        """GPTQ's, with Qronos' own choice of the first column."""
        return rounded.value.numpy()[:, columns] if columns == visited[:1] else nearest(values, columns)

    value, before = gptq_reference.gptq(aim.matrix.numpy(), gram, quantize, visited)
    np.testing.assert_allclose(rounded.value.numpy(), value, rtol=1e-12, atol=0)
    np.testing.assert_allclose(rounded.before.numpy()[:, visited[1:]], before[:, visited[1:]], **CLOSE)


@given(problem=problems, damping=dampings, order=orders, size=st.sampled_from([1, 2, 7, 16]))
def test_block_size_does_not_matter(problem, damping, order, size):
    a, b = (solve(Qronos(damping=damping, order=order, block_size=n), problem) for n in (size, 128))
    torch.testing.assert_close(a.code, b.code, **exact)
    torch.testing.assert_close(a.before, b.before, **CLOSE)


@given(problem=strategies.linear_problems(), damping=dampings, order=orders)
def test_weights_on_the_grid_stay_where_they_are(problem, damping, order):
    """Bit for bit, in float32 too: there is nothing to make up for.

    Were ``W (H + D)`` formed and divided by H again, the weights would come back with an error of the condition number
    times u, which for a few thousand columns in float32 is not small.
    """
    weight = problem.grid.decode(problem.grid.encode(problem.weight)).to(problem.weight.dtype)
    rounded = solve(
        Qronos(damping=damping, order=order),
        replace(problem, aim=Aim(matrix=weight)),
        drift=torch.zeros_like(problem.statistics.drift),
    )
    torch.testing.assert_close(rounded.before, weight, **exact)
    torch.testing.assert_close(rounded.value, weight, **exact)


@pytest.mark.parametrize("kind", DIFFICULT)
@pytest.mark.parametrize("dtype", strategies.DTYPES)
@pytest.mark.parametrize("damping", [0.01, 1.0])
def test_singular_inputs_give_finite_values(kind, dtype, damping):
    weight, tokens = difficult_tokens(kind, dtype)
    grid = UniformGrid(bits=3, group_size=None, range="minmax").resolve(tuple(weight.shape), dtype).fit(weight, None)
    rounded = Qronos(damping=damping).round(Aim(matrix=weight), grid, tokens.statistics())
    assert bool(rounded.before.isfinite().all())
    assert bool(rounded.value.isfinite().all())
    assert float(rounded.before.abs().max()) < 100 * float(weight.abs().max())


def test_one_column():
    problem = make_problem(ProblemSettings(grid=UniformGrid(bits=3), rows=4, columns=1, tokens=9, seed=0))
    assert_matches_definition(Qronos(), problem)


def test_a_corrected_aim_is_refused():
    problem = make_problem(ProblemSettings(grid=UniformGrid(), rows=2, columns=6, tokens=20, seed=0))
    corrected = Qep().aim(problem.weight, problem.statistics, None)
    with pytest.raises(
        ConfigError, match="'qronos' corrects drift itself; with a corrected target, drift would be corrected twice"
    ):
        Qronos().round(corrected, problem.grid, problem.statistics)
    assert not Qronos.accepts_corrected


def test_needs_both_streams():
    problem = make_problem(ProblemSettings(grid=UniformGrid(), rows=1, columns=4, tokens=4, seed=0))
    for fit in (None, replace(problem.statistics, drift=None)):
        with pytest.raises(ConfigError, match="'qronos' needs statistics of the original and the quantized model"):
            Qronos().round(problem.aim, problem.grid, fit)
