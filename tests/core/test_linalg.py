"""Factors of the Hessian against the explicit inverse."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mezzotint.core.linalg import damped, inverse_cholesky_upper
from mezzotint.errors import MezzotintError, NotPositiveDefiniteError
from mezzotint.testing import strategies
from mezzotint.testing.problems import Snapshot
from reference import linalg as reference

F64 = (torch.float64,)
dampings = st.sampled_from([0.001, 0.01, 1.0])


def permutations(data, n):
    drawn = data.draw(st.one_of(st.none(), st.permutations(range(n))), label="permutation")
    return None if drawn is None else torch.tensor(drawn)


@given(strategies.linear_problems(dtypes=F64), dampings, st.data())
def test_factor_is_that_of_the_explicit_inverse(problem, damping, data):
    gram = problem.statistics.gram
    permutation = permutations(data, len(gram))
    before = Snapshot.of(gram, permutation)
    factor = inverse_cholesky_upper(gram, damping=damping, permutation=permutation)
    before.check(gram, permutation)
    order = list(range(len(gram))) if permutation is None else permutation.tolist()
    hessian = reference.damped(gram.numpy(), damping)[np.ix_(order, order)]
    wanted = reference.inverse_factor(hessian)
    # the twin inverts: condition number up to 40 / damping, n u each way
    tolerance = 40 / damping * len(gram) * 2e-16 * 10
    np.testing.assert_allclose(factor.upper.numpy(), wanted, rtol=0, atol=tolerance * np.abs(wanted).max())
    assert factor.permutation is permutation


@given(strategies.linear_problems(dtypes=F64), dampings, st.data())
def test_factor_is_upper_triangular_and_inverts_the_hessian(problem, damping, data):
    gram = problem.statistics.gram
    permutation = permutations(data, len(gram))
    upper = inverse_cholesky_upper(gram, damping=damping, permutation=permutation).upper
    torch.testing.assert_close(upper.tril(-1), torch.zeros_like(upper), rtol=0, atol=0)
    assert bool((upper.diagonal() > 0).all())
    hessian = damped(gram, damping, permutation)
    # U H U' = I: the product of rounded factors, relative to |U| |H| |U'|
    limit = len(gram) ** 2 * 2.3e-16 * float((upper.abs() @ hessian.abs() @ upper.abs().t()).max())
    torch.testing.assert_close(upper @ hessian @ upper.t(), torch.eye(len(gram), dtype=gram.dtype), rtol=0, atol=limit)


@given(strategies.linear_problems(), dampings, st.integers(-8, 8))
def test_scale_of_the_hessian_scales_the_factor_exactly(problem, damping, k):
    gram = problem.statistics.gram
    a, b = (inverse_cholesky_upper(g, damping=damping).upper for g in (gram, gram * 4.0**k))
    live = gram.diagonal() > 0
    if live.any():
        torch.testing.assert_close(b, a * 2.0**-k, rtol=0, atol=0)
    else:
        torch.testing.assert_close(b, a, rtol=0, atol=0)


@given(strategies.linear_problems(dtypes=F64), st.sampled_from([0.0, 0.01]), st.data())
def test_damping_matches_the_twin(problem, damping, data):
    gram = problem.statistics.gram
    permutation = permutations(data, len(gram))
    order = list(range(len(gram))) if permutation is None else permutation.tolist()
    wanted = reference.damped(gram.numpy(), damping)[np.ix_(order, order)]
    np.testing.assert_allclose(damped(gram, damping, permutation).numpy(), wanted, rtol=1e-14, atol=0)


@pytest.mark.parametrize("damping", [0.0, 0.01])
def test_dead_columns_neither_give_nor_take(damping):
    gram = torch.diag(torch.tensor([2.0, 0.0, 3.0], dtype=torch.float64))
    gram[0, 2] = gram[2, 0] = 1
    upper = inverse_cholesky_upper(gram, damping=damping).upper
    assert upper[0, 1] == upper[1, 2] == 0
    assert upper[1, 1] > 0


@pytest.mark.parametrize("permutation", [None, [0, 1, 2, 3], [3, 1, 0, 2], [2, 3, 1, 0]])
@pytest.mark.parametrize("column", [0, 2, 3])
def test_what_is_not_definite_names_the_column(column, permutation):
    gram = torch.eye(4, dtype=torch.float64)
    gram[column, column] = -1
    order = None if permutation is None else torch.tensor(permutation)
    with pytest.raises(NotPositiveDefiniteError) as caught:
        inverse_cholesky_upper(gram, damping=0.0, permutation=order)
    message = str(caught.value)
    assert f"Hessian (4, 4) torch.float64 is not positive definite at column {column}: diagonal -1.000e+00" in message
    assert "mean 5.000e-01. Raise `damping` (now 0, typical 0.01)" in message
    assert isinstance(caught.value, MezzotintError)
    assert isinstance(caught.value, ArithmeticError)


def test_duplicated_columns_need_damping():
    gram = torch.ones(3, 3, dtype=torch.float64)
    with pytest.raises(NotPositiveDefiniteError):
        inverse_cholesky_upper(gram, damping=0.0)
    inverse_cholesky_upper(gram, damping=0.01)


def test_not_a_number_is_an_error():
    gram = torch.eye(4)
    gram[2, 1] = gram[1, 2] = torch.nan
    with pytest.raises(NotPositiveDefiniteError):
        inverse_cholesky_upper(gram, damping=0.01)
