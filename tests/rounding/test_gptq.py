"""GPTQ against its float64 twins, and what is its own."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from grids.toy_vector import ToyVectorGrid
from mezzotint.core.statistics import Statistics
from mezzotint.errors import ConfigError, NotPositiveDefiniteError
from mezzotint.grids.uniform import UniformGrid
from mezzotint.rounding.gptq import Gptq
from mezzotint.testing import strategies
from mezzotint.testing.problems import ProblemSettings, feedback_error, make_problem
from reference import gptq as reference
from reference import grids as reference_grids
from reference import linalg

F64 = (torch.float64,)
TOYS = [ToyVectorGrid(tile=(1, 2)), ToyVectorGrid(tile=(2, 4))]
# Values at the moment of rounding are of the order of the weights, at most about 1, times the feedback; the condition
# number of a Hessian damped by 1e-3 is below 1e5, and 1e5 * 40 columns * 2.2e-16 = 1e-9.
CLOSE = {"rtol": 1e-8, "atol": 1e-8}


def uniform_quantizer(grid):
    """Nearest values of the grid's parameters, by the twin: nothing of the grid's own code."""
    scale, zero_point = grid.scale.double().numpy(), grid.zero_point.double().numpy()

    def quantize(values, columns):
        groups = [j // grid.group_size for j in columns]
        code = reference_grids.encode_uniform(values, scale[:, groups], zero_point[:, groups], grid.grid.bits, 1)
        return reference_grids.decode_uniform(code, scale[:, groups], zero_point[:, groups], 1)

    return quantize


def toy_quantizer(grid):
    code = grid.new_code()
    return lambda values, columns: grid.encode_(code, torch.from_numpy(values), torch.tensor(columns)).numpy()


def assert_matches_twin(stage, problem, twin=reference.gptq):
    """Same values and same values before rounding as a twin that shares no code and no formula."""
    gram = problem.statistics.gram.numpy()
    tile = problem.grid.grid.tile[1]
    quantize = (uniform_quantizer if tile == 1 else toy_quantizer)(problem.grid)
    order = linalg.visiting_order(gram, stage.order, tile)
    hessian = linalg.damped(gram, stage.damping)
    value, before = twin(problem.weight.numpy(), hessian, quantize, order, tile)
    rounded = stage.round(problem.aim, problem.grid, problem.statistics)
    np.testing.assert_allclose(rounded.value.numpy(), value, rtol=1e-12, atol=0)
    np.testing.assert_allclose(rounded.before.numpy(), before, **CLOSE)


@given(stage=strategies.roundings("gptq"), problem=strategies.linear_problems(dtypes=F64))
def test_uniform_grid_matches_the_textbook(stage, problem):
    assert_matches_twin(stage, problem)


@pytest.mark.parametrize("twin", [reference.gptq_by_refit, reference.ldlq])
@given(stage=strategies.roundings("gptq"), problem=strategies.linear_problems(dtypes=F64))
def test_is_optimal_refit_and_ldlq(twin, stage, problem):
    assert_matches_twin(stage, problem, twin)


@pytest.mark.parametrize("twin", [reference.gptq, reference.gptq_by_refit, reference.ldlq])
@given(stage=strategies.roundings("gptq"), problem=strategies.linear_problems(st.sampled_from(TOYS), dtypes=F64))
def test_vector_grids_match_block_ldlq(twin, stage, problem):
    assert_matches_twin(stage, problem, twin)


@given(stage=strategies.roundings("gptq"), problem=strategies.linear_problems(dtypes=(torch.float32,)))
def test_float32_differs_from_itself_only_at_a_boundary(stage, problem):
    """No probability here: until the first code of a row that differs, values are within the bound of each other.

    In float32, with any block size; after that column the two runs are different roundings of the rest.
    """
    a = stage.round(problem.aim, problem.grid, problem.statistics)
    b = replace(stage, block_size=3).round(problem.aim, problem.grid, problem.statistics)
    factor = problem.statistics.factor(stage.damping, stage.order)
    order = torch.arange(problem.weight.shape[1]) if factor.permutation is None else factor.permutation
    bound = feedback_error(a, problem.weight, factor)[:, order]
    distance = (a.before.double() - b.before.double()).abs()[:, order]
    same_until_here = (a.code != b.code)[:, order].int().cumsum(1) - (a.code != b.code)[:, order].int() == 0
    excess = torch.where(same_until_here, distance - bound, 0.0)
    assert float(excess.max()) <= 0


def test_the_objective_is_below_that_of_nearest():
    """A sanity check that no twin can share a mistake with: averaged over problems, feedback pays."""
    ratios = []
    for seed in range(10):
        settings = ProblemSettings(grid=UniformGrid(bits=3, group_size=None), rows=8, columns=48, tokens=200, seed=seed)
        problem = make_problem(settings)
        hessian, weight = problem.statistics.gram.numpy(), problem.weight.numpy()
        nearest = problem.grid.decode(problem.grid.encode(problem.weight)).numpy()
        value = Gptq().round(problem.aim, problem.grid, problem.statistics).value.numpy()
        ratios.append(reference.objective(value, weight, hessian) / reference.objective(nearest, weight, hessian))
    assert max(ratios) < 0.9
    assert sum(ratios) / len(ratios) < 0.6


@given(problem=strategies.linear_problems())
def test_unknown_inputs_make_it_nearest(problem):
    isotropic = Statistics.isotropic(problem.weight.shape[1], problem.weight)
    rounded = Gptq().round(problem.aim, problem.grid, isotropic)
    torch.testing.assert_close(rounded.code, problem.grid.encode(problem.weight), rtol=0, atol=0)


def test_inputs_that_are_all_zero_make_it_nearest():
    settings = ProblemSettings(grid=UniformGrid(), rows=3, columns=5, tokens=4, seed=0, dead_columns=(0, 1, 2, 3, 4))
    problem = make_problem(settings)
    rounded = Gptq().round(problem.aim, problem.grid, problem.statistics)
    torch.testing.assert_close(rounded.code, problem.grid.encode(problem.weight), rtol=0, atol=0)


def test_needs_statistics():
    problem = make_problem(ProblemSettings(grid=UniformGrid(), rows=1, columns=4, tokens=4, seed=0))
    with pytest.raises(ConfigError, match="'gptq' needs calibration text"):
        Gptq().round(problem.aim, problem.grid, None)


def test_singular_hessian_names_the_column():
    problem = make_problem(ProblemSettings(grid=UniformGrid(), rows=1, columns=4, tokens=9, seed=0))
    gram = problem.statistics.gram.clone()
    gram[1, 1] = -1000
    with pytest.raises(NotPositiveDefiniteError, match=r"at column 1: diagonal -1\.000e\+03"):
        Gptq().round(problem.aim, problem.grid, replace(problem.statistics, gram=gram))
