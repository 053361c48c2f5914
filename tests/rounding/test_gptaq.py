"""GPTAQ against its float64 twin, and what is its own."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mezzotint.core.contracts import Aim
from mezzotint.errors import ConfigError
from mezzotint.grids.uniform import UniformGrid
from mezzotint.rounding.gptaq import Gptaq, carry_of
from mezzotint.rounding.gptq import Gptq
from mezzotint.targets.qep import Qep, quadratic_of
from mezzotint.testing import strategies
from mezzotint.testing.problems import ProblemSettings, make_problem
from reference import gptaq as reference
from reference import linalg
from reference import qep as targets_reference
from rounding.test_gptq import uniform_quantizer
from targets.test_qep import DIFFICULT, difficult_tokens

F64 = (torch.float64,)
# As for GPTQ: values of about 1 times the feedback, condition numbers below 1e5, 40 columns, 2.2e-16 each.
CLOSE = {"rtol": 1e-8, "atol": 1e-8}
settings = {
    "damping": st.sampled_from([0.001, 0.01, 0.1, 1.0]),
    "order": st.sampled_from(["natural", "diagonal"]),
    "block_size": st.sampled_from([1, 3, 16, 128]),
}
stages = st.builds(Gptaq, strength=st.sampled_from([0.0, 0.25, 1.0]), **settings)
problems = strategies.linear_problems(dtypes=F64)
exact = {"rtol": 0, "atol": 0}


def solve(stage, problem, **changed):
    return stage.round(problem.aim, problem.grid, replace(problem.statistics, **changed))


@given(stage=stages, problem=problems)
def test_matches_the_columnwise_twin(stage, problem):
    gram, drift = problem.statistics.gram.numpy(), problem.statistics.drift.numpy()
    hessian, order = linalg.damped(gram, stage.damping), linalg.visiting_order(gram, stage.order)
    quantize = uniform_quantizer(problem.grid)
    value, before = reference.gptaq(problem.weight.numpy(), hessian, drift, quantize, order, stage.strength)
    rounded = solve(stage, problem)
    np.testing.assert_allclose(rounded.value.numpy(), value, rtol=1e-12, atol=0)
    np.testing.assert_allclose(rounded.before.numpy(), before, **CLOSE)


@given(problem=problems, damping=settings["damping"], order=settings["order"])
def test_rows_of_the_carry_are_the_drift_fitted_by_later_columns(problem, damping, order):
    gram, drift = problem.statistics.gram.numpy(), problem.statistics.drift.numpy()
    wanted = reference.carry(drift, linalg.damped(gram, damping), linalg.visiting_order(gram, order))
    found = carry_of(problem.statistics.drift, problem.statistics.factor(damping, order)).numpy()
    np.testing.assert_allclose(found, wanted, rtol=1e-8, atol=1e-8 * max(1.0, np.abs(wanted).max()))
    np.testing.assert_array_equal(found[np.tril_indices(len(found))], 0)


@given(problem=problems, size=st.sampled_from([1, 2, 7, 16]), order=settings["order"])
def test_block_size_does_not_matter(problem, size, order):
    """The released code multiplies by rounded values behind a block, so that there the codes depend on its size."""
    a, b = (solve(Gptaq(strength=1.0, order=order, block_size=n), problem) for n in (size, 128))
    torch.testing.assert_close(a.code, b.code, **exact)
    torch.testing.assert_close(a.before, b.before, **CLOSE)


@given(stage=stages, problem=problems, by=st.sampled_from(["strength", "inputs"]))
def test_without_strength_or_drift_it_is_gptq(stage, problem, by):
    stage = replace(stage, strength=0.0) if by == "strength" else stage
    drift = problem.statistics.drift if by == "strength" else torch.zeros_like(problem.statistics.drift)
    wanted = solve(Gptq(damping=stage.damping, order=stage.order, block_size=stage.block_size), problem)
    found = solve(stage, problem, drift=drift)
    torch.testing.assert_close(found.code, wanted.code, **exact)
    torch.testing.assert_close(found.before, wanted.before, **CLOSE)


def test_it_lowers_the_loss_on_drifting_inputs():
    """A sanity check that no twin can share a mistake with: ||W X - V Xh|| against GPTQ's, and against all of it."""
    losses = []
    for seed in range(10):
        grid = UniformGrid(bits=4, group_size=None, range="minmax")
        problem = make_problem(ProblemSettings(grid=grid, rows=8, columns=24, tokens=400, seed=seed))
        generator = torch.Generator().manual_seed(seed)
        mixing = 0.1 * torch.randn(24, 24, generator=generator, dtype=torch.float64)  # x = xh + mixing' xh
        gram = problem.statistics.gram
        problem = replace(problem, statistics=replace(problem.statistics, drift=mixing.t() @ gram, residual=None))
        quadratic = quadratic_of(problem.weight, problem.statistics)
        stages = (Gptq(), Gptaq(strength=0.25), Gptaq(strength=1.0))
        losses.append([float(quadratic.value(solve(stage, problem).value).sum()) for stage in stages])
    plain, weak, strong = np.array(losses).T
    constant = np.abs(losses).max()  # the quadratic is the loss less that of W: only differences mean something
    assert (strong - plain).mean() < (weak - plain).mean() < 0, constant
    assert (strong < plain).all()


@pytest.mark.parametrize("kind", DIFFICULT)
@pytest.mark.parametrize("dtype", strategies.DTYPES)
@pytest.mark.parametrize("damping", [0.01, 1.0])
def test_singular_inputs_give_finite_values(kind, dtype, damping):
    weight, tokens = difficult_tokens(kind, dtype)
    statistics = tokens.statistics()
    grid = UniformGrid(bits=3, group_size=None, range="minmax").resolve(tuple(weight.shape), dtype).fit(weight, None)
    rounded = Gptaq(strength=1.0, damping=damping).round(Aim(matrix=weight), grid, statistics)
    assert bool(rounded.before.isfinite().all())
    assert bool(rounded.value.isfinite().all())
    # what makes up for errors stays of the size of the weights: it is least squares with a ridge
    ridge = targets_reference.ridge_of(tokens.quantized.double().numpy(), damping)
    assert ridge == 0 or float(rounded.before.abs().max()) < 100 * float(weight.abs().max())


def test_a_corrected_aim_is_refused():
    problem = make_problem(ProblemSettings(grid=UniformGrid(), rows=2, columns=6, tokens=20, seed=0))
    corrected = Qep().aim(problem.weight, problem.statistics, None)
    with pytest.raises(
        ConfigError, match="'gptaq' corrects drift itself; with a corrected target, drift would be corrected twice"
    ):
        Gptaq().round(corrected, problem.grid, problem.statistics)
    assert not Gptaq.accepts_corrected


def test_needs_both_streams():
    problem = make_problem(ProblemSettings(grid=UniformGrid(), rows=1, columns=4, tokens=4, seed=0))
    for fit in (None, replace(problem.statistics, drift=None)):
        with pytest.raises(ConfigError, match="'gptaq' needs statistics of the original and the quantized model"):
            Gptaq().round(problem.aim, problem.grid, fit)
