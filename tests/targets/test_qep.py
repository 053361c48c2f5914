"""QEP against least squares over tokens, and what is its own."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mezzotint.core.linalg import DAMPING_LADDER
from mezzotint.core.statistics import Statistics
from mezzotint.errors import ConfigError, NotPositiveDefiniteError
from mezzotint.grids.uniform import UniformGrid
from mezzotint.targets.loaq import Loaq
from mezzotint.targets.qep import AUTO_ALPHAS, AUTO_DAMPINGS, Qep, quadratic_of
from mezzotint.testing import strategies
from mezzotint.testing.problems import ProblemSettings, Tokens, make_tokens, make_weight
from reference import qep as reference

F64 = (torch.float64,)
alphas = st.sampled_from([0.0, 0.1, 0.5, 1.0])
dampings = st.sampled_from([0.001, 0.01, 1.0, 10.0])
drawn_settings = strategies.problem_settings(dtypes=F64)
# Corrections are a tenth of the weights, which are about 1 at most. The twin solves over tokens, ours over their sums:
# with condition numbers below 40 / 1e-3 * 40 = 2e6 the latter loses 2e6 * 40 columns * 2.2e-16 = 2e-8.
CLOSE = {"rtol": 1e-7, "atol": 1e-7}


def well_conditioned(seed, rows=3, columns=12, tokens=200):
    """A problem that can be solved without damping; half of what drifts can be made up for."""
    grid = UniformGrid(bits=3, group_size=None)
    settings = ProblemSettings(grid=grid, rows=rows, columns=columns, tokens=tokens, seed=seed)
    tokens = make_tokens(settings)
    mixing = 0.1 * torch.randn(columns, columns, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return make_weight(settings), replace(tokens, original=tokens.original + tokens.quantized @ mixing)


def arrays(tokens):
    return tokens.original.numpy(), tokens.quantized.numpy()


def corrected(stage, weight, tokens, held_out=None):
    return stage.aim(weight, tokens.statistics(), None if held_out is None else held_out.statistics())


@given(settings=drawn_settings, alpha=alphas, damping=dampings)
def test_is_the_least_squares_of_the_proximal_identity(settings, alpha, damping):
    weight, tokens = make_weight(settings), make_tokens(settings)
    x, xh = arrays(tokens)
    wanted = reference.qep(weight.numpy(), x, xh, alpha, reference.ridge_of(xh, damping))
    aim = corrected(Qep(alpha=alpha, damping=damping), weight, tokens)
    np.testing.assert_allclose(aim.matrix.numpy(), wanted, **CLOSE)
    assert aim.corrected == (alpha > 0)


@given(seed=st.integers(0, 2**20))
def test_undamped_it_is_the_least_squares_optimum(seed):
    weight, tokens = well_conditioned(seed)
    x, xh = arrays(tokens)
    aim = corrected(Qep(alpha=1.0, damping=0.0), weight, tokens).matrix.numpy()
    np.testing.assert_allclose(aim, reference.least_squares(xh, x @ weight.numpy().T), **CLOSE)
    least = reference.loss(aim, weight.numpy(), x, xh)
    rng = np.random.default_rng(seed)
    for size in (1e-3, 1e-1):
        other = aim + size * rng.standard_normal(aim.shape)
        assert (reference.loss(other, weight.numpy(), x, xh) > least).all()


@given(seed=st.integers(0, 2**20))
def test_undamped_the_loss_falls_with_alpha(seed):
    weight, tokens = well_conditioned(seed)
    aims = [corrected(Qep(alpha=alpha, damping=0.0), weight, tokens).matrix.numpy() for alpha in (0.0, 0.3, 0.6, 1.0)]
    losses = [reference.loss(aim, weight.numpy(), *arrays(tokens)).sum() for aim in aims]
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < 0.8 * losses[0]


@given(settings=drawn_settings, alpha=alphas)
def test_the_ridge_pulls_towards_the_weight(settings, alpha):
    weight, tokens = make_weight(settings), make_tokens(settings)
    distances = [
        float((corrected(Qep(alpha=alpha, damping=damping), weight, tokens).matrix - weight).norm())
        for damping in (0.01, 0.1, 1.0, 10.0, 100.0)
    ]
    assert all(b <= a * (1 + 1e-9) for a, b in itertools.pairwise(distances))
    # ||W D (H + lambda)^-1|| <= ||W D|| / lambda
    limit = (weight @ tokens.statistics().drift).norm() / reference.ridge_of(tokens.quantized.numpy(), 100.0)
    assert distances[-1] <= alpha * float(torch.nan_to_num(limit)) * (1 + 1e-9)


@given(problem=strategies.linear_problems(), alpha=alphas, damping=dampings)
def test_without_drift_it_is_the_weight(problem, alpha, damping):
    still = replace(problem.statistics, drift=torch.zeros_like(problem.statistics.drift))
    aim = Qep(alpha=alpha, damping=damping).aim(problem.weight, still, None)
    torch.testing.assert_close(aim.matrix, problem.weight, rtol=0, atol=0)


@given(problem=strategies.linear_problems(), damping=dampings)
def test_alpha_zero_is_the_weight(problem, damping):
    aim = Qep(alpha=0.0, damping=damping).aim(problem.weight, problem.statistics, None)
    torch.testing.assert_close(aim.matrix, problem.weight, rtol=0, atol=0)
    assert not aim.corrected


@given(settings=drawn_settings, alpha=alphas, damping=dampings)
def test_the_drift_of_outputs_does_as_well_as_that_of_inputs(settings, alpha, damping):
    weight, tokens = make_weight(settings), make_tokens(settings)
    plain = tokens.statistics()
    own = replace(plain, drift=None, output_drift=weight @ plain.drift)
    close = {"rtol": 1e-12, "atol": 1e-12}
    for stage in (Qep(alpha=alpha, damping=damping), Qep(alpha="auto"), Loaq(alpha=alpha, damping=damping)):
        torch.testing.assert_close(stage.aim(weight, own, own).matrix, stage.aim(weight, plain, plain).matrix, **close)
    torch.testing.assert_close(quadratic_of(weight, own).cross, quadratic_of(weight, plain).cross, **close)


@given(settings=drawn_settings, residual=st.booleans(), seed=st.integers(0, 99))
def test_the_quadratic_is_the_loss_less_a_constant(settings, residual, seed):
    weight, tokens = make_weight(settings), make_tokens(settings)
    x, xh = arrays(tokens)
    difference = tokens.difference.numpy() if residual else None
    statistics = tokens.statistics()
    q = quadratic_of(weight, statistics, residual=residual)
    value = weight.numpy() + 0.1 * np.random.default_rng(seed).standard_normal(weight.shape)
    loss, without = (reference.loss(v, weight.numpy(), x, xh, difference) for v in (value, weight.numpy()))
    # differences of sums over up to 120 tokens of 40 columns each, where terms cancel
    atol = 1e-11 * (1 + loss.max() + without.max() + float((weight @ statistics.gram * weight).abs().sum()))
    np.testing.assert_allclose(q.value(torch.from_numpy(value)).numpy(), loss - without, rtol=1e-9, atol=atol)


@given(settings=drawn_settings, sign=st.sampled_from([-1.0, 0.0, 1.0]))
def test_auto_takes_the_best_on_the_held_out_tokens_and_never_less_than_nothing(settings, sign):
    """``sign``: what is held out drifts like the rest, not at all, or the other way."""
    weight, tokens = make_weight(settings), make_tokens(settings)
    other = make_tokens(replace(settings, tokens=settings.tokens + 5))
    held_out = replace(other, original=other.quantized + sign * (other.original - other.quantized))
    aim = corrected(Qep(alpha="auto"), weight, tokens, held_out)
    x, xh = arrays(tokens)
    judged = {(0.0, 0.0): weight.numpy()} | {
        (alpha, damping): weight.numpy() + alpha * (reference.qep(weight.numpy(), x, xh, 1.0, ridge) - weight.numpy())
        for damping in AUTO_DAMPINGS
        for alpha in AUTO_ALPHAS
        for ridge in [reference.ridge_of(xh, damping)]
    }
    losses = {key: reference.loss(v, weight.numpy(), *arrays(held_out)).sum() for key, v in judged.items()}
    chosen = aim.decisions["alpha"], aim.decisions["damping"]
    np.testing.assert_allclose(aim.matrix.numpy(), judged[chosen], **CLOSE)
    # losses are compared after a constant was taken off: ties within rounding of the largest go either way
    slack = 1e-7 * max(losses.values())
    assert losses[chosen] <= min(losses.values()) + slack
    assert losses[chosen] <= losses[0.0, 0.0] + slack
    assert aim.corrected == (chosen[0] > 0)


def test_auto_chooses_nothing_where_any_correction_hurts_and_something_where_it_helps():
    weight, tokens = well_conditioned(seed=1)
    against = replace(tokens, original=2 * tokens.quantized - tokens.original)
    aim = corrected(Qep(alpha="auto"), weight, tokens, against)
    assert aim.decisions == {"alpha": 0.0, "damping": 0.0}
    assert not aim.corrected
    torch.testing.assert_close(aim.matrix, weight, rtol=0, atol=0)
    aim = corrected(Qep(alpha="auto"), weight, tokens, tokens)
    assert aim.decisions == {"alpha": 1.0, "damping": min(AUTO_DAMPINGS)}
    assert aim.corrected


def difficult_tokens(kind, dtype):
    """Inputs whose Hessian is singular: constant, zero, equal columns, fewer tokens than columns."""
    settings = ProblemSettings(grid=UniformGrid(), rows=4, columns=24, tokens=60, seed=3, dtype=dtype)
    tokens = make_tokens(replace(settings, tokens=5) if kind == "few tokens" else settings)
    xh, x = tokens.quantized.clone(), tokens.original.clone()
    if kind == "constant":
        xh[:, 3:20], x[:, 3:20] = 5.0, 5.5
    elif kind == "zero":
        xh[:, ::3], x[:, ::3] = 0.0, 0.0
    elif kind == "zero in one stream":
        xh[:, ::3] = 0.0
    elif kind == "all zero":
        xh, x = torch.zeros_like(xh), torch.zeros_like(x)
    elif kind == "duplicated":
        xh[:, 12:], x[:, 12:] = xh[:, :12], x[:, :12]
    return make_weight(settings), Tokens(quantized=xh, original=x, difference=tokens.difference)


DIFFICULT = ["constant", "zero", "zero in one stream", "all zero", "duplicated", "few tokens"]


@pytest.mark.parametrize("kind", DIFFICULT)
@pytest.mark.parametrize("dtype", strategies.DTYPES)
@pytest.mark.parametrize("damping", [0.01, 1.0])
def test_singular_inputs_give_finite_aims_that_lose_nothing(kind, dtype, damping):
    weight, tokens = difficult_tokens(kind, dtype)
    aim = corrected(Qep(alpha=1.0, damping=damping), weight, tokens).matrix
    assert bool(aim.isfinite().all())
    x, xh = (t.double().numpy() for t in (tokens.original, tokens.quantized))
    loss, before = (reference.loss(v.double().numpy(), weight.double().numpy(), x, xh).sum() for v in (aim, weight))
    # least squares with a ridge that pulls towards W is never worse than W; float32 has 24 bits
    assert loss <= before * (1 + 1e-5) + 1e-9


@pytest.mark.parametrize("target", [Qep(alpha=1.0, damping=0.0), Loaq(damping=0.0)])
def test_singular_inputs_get_the_damping_they_need_and_say_so(target):
    weight, tokens = difficult_tokens("few tokens", torch.float64)
    statistics = tokens.statistics()
    # of rank one exactly, so that no rounding error makes it definite
    ones = replace(statistics, gram=torch.ones_like(statistics.gram))
    aim = target.aim(weight, ones, None)
    assert aim.decisions["target.damping"] == DAMPING_LADDER[0]
    expected = replace(target, damping=DAMPING_LADDER[0]).aim(weight, ones, None)
    torch.testing.assert_close(aim.matrix, expected.matrix, rtol=0, atol=0)
    assert "target.damping" not in expected.decisions


def test_auto_tells_the_damping_that_was_needed(monkeypatch):
    monkeypatch.setattr("mezzotint.targets.qep.AUTO_DAMPINGS", (0.0,))
    weight, tokens = well_conditioned(seed=0)
    statistics = tokens.statistics()
    gram = torch.ones_like(statistics.gram)  # of rank one
    known = replace(statistics, gram=gram, drift=0.1 * gram)
    aim = Qep(alpha="auto").aim(weight, known, known)
    assert aim.corrected
    assert aim.decisions["damping"] == DAMPING_LADDER[0]


def test_what_is_no_sum_of_squares_is_refused():
    weight, tokens = well_conditioned(seed=0)
    statistics = tokens.statistics()
    with pytest.raises(NotPositiveDefiniteError, match="Raise `damping`"):
        Qep(alpha=1.0, damping=0.0).aim(weight, replace(statistics, gram=-statistics.gram), None)


def test_needs_both_streams_and_auto_needs_held_out_tokens():
    weight, tokens = well_conditioned(seed=0)
    statistics = tokens.statistics()
    without = Statistics(tokens=statistics.tokens, gram=statistics.gram)
    for fit in (None, without):
        with pytest.raises(ConfigError, match="'qep' needs statistics of the original and the quantized model"):
            Qep().aim(weight, fit, None)
    for held_out in (None, without):
        with pytest.raises(ConfigError, match="there is no held-out window"):
            Qep(alpha="auto").aim(weight, statistics, held_out)
