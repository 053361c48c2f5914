"""Sums over tokens against direct sums, and what is derived from them."""

from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mezzotint.core.statistics import Accumulator, Statistics, block_ldl_ratio, padded
from mezzotint.grids.uniform import UniformGrid
from mezzotint.testing import strategies
from mezzotint.testing.problems import OPTIONAL_SUMS, ProblemSettings, Tokens, make_problem, make_tokens, tensors_of
from reference import linalg as reference

SUMS = ("gram", "drift", "residual", "mean_abs")
exact = partial(torch.testing.assert_close, rtol=0, atol=0)


def bound(dtype, tokens):
    """Relative to the sum of the magnitudes of the terms, a sum of n products is off by at most n + 2 roundings."""
    return (tokens + 2) * torch.finfo(dtype).eps / 2


def accumulate(tokens, weights=None, batches=1, needs=OPTIONAL_SUMS, factors=None, weight=None):
    """The sums, batch by batch."""
    rows, width, dtype = tokens.difference.shape[1], tokens.quantized.shape[1], tokens.quantized.dtype
    sums = Accumulator(width, needs, rows=rows, weight=weight, dtype=dtype, factors=factors)
    for part in torch.arange(tokens.quantized.shape[0]).tensor_split(batches):
        sums.add(
            tokens.quantized[part],
            original=tokens.original[part],
            residual=tokens.difference[part],
            weights=None if weights is None else weights[part],
        )
    return sums.finish()


def assert_sums(statistics, tokens, weights):
    """Equal to the twin's sums up to the order of summation."""
    arrays = [t.double().numpy() for t in (tokens.quantized, tokens.original, tokens.difference)]
    count = len(weights)
    wanted = reference.sums(*arrays, weights.double().numpy())
    magnitudes = reference.sums(
        *(np.abs(a) for a in arrays[:1]), -np.abs(arrays[1]), np.abs(arrays[2]), weights.numpy()
    )
    assert statistics.tokens == pytest.approx(wanted[0], rel=bound(torch.float64, count))
    limit = bound(statistics.gram.dtype, count)
    for name, value, size in zip(SUMS, wanted[1:], magnitudes[1:], strict=True):
        difference = np.abs(getattr(statistics, name).double().numpy() - value)
        np.testing.assert_array_less(difference, limit * np.abs(size) + 1e-300, err_msg=name)


@given(strategies.problem_settings(), st.integers(1, 4))
def test_batches_add_up_to_the_direct_sums(settings, batches):
    tokens = make_tokens(settings)
    assert_sums(accumulate(tokens, batches=batches), tokens, torch.ones(settings.tokens))


@given(strategies.problem_settings(), st.data())
def test_token_weights(settings, data):
    tokens = make_tokens(settings)
    drawn = st.lists(st.sampled_from([0.0, 0.25, 1.0, 3.0]), min_size=settings.tokens, max_size=settings.tokens)
    weights = torch.tensor(data.draw(drawn))
    assert_sums(accumulate(tokens, weights), tokens, weights)


@pytest.mark.parametrize("batches", [1, 3])
def test_factors_in_bfloat16_round_the_corrections_alone(batches):
    tokens = make_tokens(ProblemSettings(grid=UniformGrid(), rows=24, columns=40, tokens=300, seed=0))
    plain, rounded = accumulate(tokens, batches=batches), accumulate(tokens, batches=batches, factors=torch.bfloat16)
    exact(rounded.gram, plain.gram)
    exact(rounded.mean_abs, plain.mean_abs)
    drift = tokens.original - tokens.quantized
    for name, left in (("drift", drift), ("residual", tokens.difference)):
        # both factors and the product are off by half a unit in the last of 8 places
        size = left.abs().double().T @ tokens.quantized.abs().double()
        off = (getattr(rounded, name) - getattr(plain, name)).abs()
        assert off.max() > 0
        assert (off <= 3.1 * 2**-9 * size).all(), name


def test_a_drift_of_outputs_in_bfloat16_is_off_by_roundings():
    tokens = make_tokens(
        ProblemSettings(grid=UniformGrid(), rows=8, columns=48, tokens=400, seed=3, dtype=torch.float32)
    )
    weight = torch.randn(8, 48, generator=torch.Generator().manual_seed(0))
    found = accumulate(tokens, factors=torch.bfloat16, weight=weight).output_drift
    wanted = weight @ accumulate(tokens).drift
    assert found.dtype == torch.float32
    # three roundings to 8 bits, of signs at random in most sums
    assert float((found - wanted).norm() / wanted.norm()) < 2**-7


def test_wide_sums_are_the_same_in_pieces():
    """Wider than what is multiplied at once."""
    generator = torch.Generator().manual_seed(0)
    x, xh = torch.randn(2, 8, 2500, generator=generator)
    for factors in (None, torch.bfloat16):
        sums = Accumulator(2500, frozenset({"drift"}), factors=factors)
        sums.add(xh, original=x)
        drift, right = ((x - xh).to(factors or xh.dtype), xh.to(factors or xh.dtype))
        tolerance = {"rtol": 1e-5, "atol": 1e-5} if factors is None else {"rtol": 2**-7, "atol": 2**-5}
        torch.testing.assert_close(sums.drift, (drift.T.double() @ right.double()).float(), **tolerance)


@given(strategies.problem_settings())
def test_weight_one_is_no_weight_and_zero_leaves_out(settings):
    tokens = make_tokens(settings)
    weights = torch.ones(settings.tokens)
    plain = accumulate(tokens)
    for (path, a), (_, b) in zip(tensors_of(accumulate(tokens, weights)), tensors_of(plain), strict=True):
        exact(a, b, msg=lambda m, p=path: f"{p}: {m}")
    weights[0] = 0
    kept = [t[1:] for t in (tokens.quantized, tokens.original, tokens.difference)]
    assert_sums(
        accumulate(tokens, weights),
        Tokens(quantized=kept[0], original=kept[1], difference=kept[2]),
        torch.ones(settings.tokens - 1),
    )


def test_a_token_left_out_may_hold_anything():
    """Padding may be infinite or NaN after a fully masked attention row."""
    tokens = make_tokens(ProblemSettings(grid=UniformGrid(), rows=2, columns=3, tokens=4, seed=0))
    weights = torch.tensor([1.0, 0.0, 1.0, 0.0])
    clean = accumulate(tokens, weights)
    tokens.quantized[1], tokens.original[3], tokens.difference[1] = torch.nan, torch.inf, torch.nan
    for name in SUMS:
        exact(getattr(accumulate(tokens, weights), name), getattr(clean, name))


def test_weights_in_bfloat16_are_counted_exactly():
    sums = Accumulator(1, frozenset())
    sums.add(torch.ones(1001, 1), weights=torch.ones(1001, dtype=torch.bfloat16))
    assert sums.finish().tokens == 1001  # bfloat16 has 1000 and 1004


@pytest.mark.parametrize("missing", ["drift", "residual"])
def test_a_batch_without_what_is_needed_is_refused(missing):
    sums = Accumulator(3, frozenset({missing}), rows=2)
    with pytest.raises(ValueError, match=missing):
        sums.add(torch.ones(4, 3))


@pytest.mark.parametrize("needs", [frozenset(), frozenset({"gram"}), frozenset({"mean_abs"}), OPTIONAL_SUMS])
def test_only_what_is_needed_is_kept(needs):
    tokens = make_tokens(ProblemSettings(grid=UniformGrid(), rows=2, columns=3, tokens=4, seed=0))
    statistics = accumulate(tokens, needs=needs)
    assert {name for name in SUMS if getattr(statistics, name) is not None} == needs | {"gram"}


@given(strategies.problem_settings(dtypes=(torch.float64,)))
def test_merge_is_one_pass_and_associative(settings):
    tokens = make_tokens(replace(settings, tokens=settings.tokens + 1))
    parts = []
    for part in torch.arange(settings.tokens + 1).tensor_split(3):
        arrays = (tokens.quantized[part], tokens.original[part], tokens.difference[part])
        parts.append(accumulate(Tokens(quantized=arrays[0], original=arrays[1], difference=arrays[2])))
    a, b, c = parts
    ones = torch.ones(settings.tokens + 1)
    for merged in (a.merge(b).merge(c), a.merge(b.merge(c)), c.merge(a).merge(b)):
        assert_sums(merged, tokens, ones)


@given(strategies.linear_problems(dtypes=(torch.float64,)), st.integers(1, 3), st.data())
def test_the_drift_of_outputs_is_that_of_inputs_through_the_weight(problem, batches, data):
    tokens, weight = make_tokens(problem.settings), problem.weight
    weights = torch.tensor(
        data.draw(
            st.lists(
                st.sampled_from([0.0, 0.5, 1.0, 2.0]), min_size=len(tokens.quantized), max_size=len(tokens.quantized)
            )
        )
    )
    plain = accumulate(tokens, weights, batches)
    found = accumulate(tokens, weights, batches, weight=weight)
    assert found.drift is None
    assert found.has_drift
    wanted = weight @ plain.drift
    size = float(weight.abs().sum(1).max() * tokens.quantized.abs().max() ** 2 * len(weights)) + 1e-300
    close = partial(torch.testing.assert_close, rtol=0, atol=1e-13 * size)
    close(found.drift_of(weight), wanted)
    close(plain.drift_of(weight), wanted)
    for name in ("gram", "residual", "mean_abs"):
        exact(getattr(found, name), getattr(plain, name))
    close(found.merge(found).scaled(0.5).drift_of(weight), wanted)
    rows = slice(0, max(1, len(weight) // 2))
    close(found.take_rows(rows).drift_of(weight[rows]), wanted[rows])
    wide, more = padded(weight, found, (len(weight) + 3, weight.shape[1] + 2))
    close(more.drift_of(wide)[: len(weight), : weight.shape[1]], wanted)
    assert more.output_drift.shape == wide.shape


def test_statistics_of_all_rows_keep_their_factors():
    problem = make_problem(ProblemSettings(grid=UniformGrid(), rows=4, columns=6, tokens=30, seed=0))
    assert problem.statistics.take_rows(slice(None)) is problem.statistics
    assert problem.statistics.take_rows(slice(0, 4)) is problem.statistics
    exact(problem.statistics.take_rows(slice(1, 3)).residual, problem.statistics.residual[1:3])
    without = replace(problem.statistics, residual=None)
    assert without.take_rows(slice(1, 3)) is without


def test_merge_of_different_sums_is_refused():
    tokens = make_tokens(ProblemSettings(grid=UniformGrid(), rows=2, columns=3, tokens=4, seed=0))
    with pytest.raises(ValueError, match="'drift' is in one of them only"):
        accumulate(tokens).merge(accumulate(tokens, needs=OPTIONAL_SUMS - {"drift"}))


def test_isotropic():
    statistics = Statistics.isotropic(5, torch.zeros(1, dtype=torch.float64))
    exact(statistics.gram, torch.eye(5, dtype=torch.float64))
    exact(statistics.importance, torch.ones(5, dtype=torch.float64))
    assert statistics.tokens == 1
    assert statistics.drift is statistics.residual is statistics.mean_abs is None


@given(strategies.linear_problems(dtypes=(torch.float64,)), st.sampled_from([0.25, 1.0, 3.0]))
def test_importance_is_the_mean_square(problem, weight):
    tokens = make_tokens(problem.settings)
    weights = torch.full((problem.settings.tokens,), weight / problem.settings.tokens)  # sums to less than one, too
    found = accumulate(tokens, weights).importance
    torch.testing.assert_close(found, tokens.quantized.square().mean(0), rtol=1e-6, atol=0)  # weights are float32


def test_importance_of_no_tokens_is_zero():
    assert not Accumulator(3, frozenset()).finish().importance.any()


@given(strategies.linear_problems(), st.integers(-8, 8))
def test_scaled_multiplies_every_sum(problem, k):
    scaled = problem.statistics.scaled(4.0**k)
    assert scaled.tokens == problem.statistics.tokens
    for name in SUMS:
        exact(getattr(scaled, name), getattr(problem.statistics, name) * 4.0**k)


@given(strategies.linear_problems(dtypes=(torch.float64,)), st.sampled_from([1, 2, 4]))
def test_order_is_that_of_the_twin(problem, tile):
    gram = problem.statistics.gram
    width = len(gram) // tile * tile
    statistics = replace(problem.statistics, gram=gram[:width, :width], mean_abs=None, drift=None, residual=None)
    assert statistics.order("natural", tile) is None
    if width:
        assert statistics.order("diagonal", tile).tolist() == reference.visiting_order(
            statistics.gram.numpy(), "diagonal", tile
        )


def test_factor_is_cached_and_never_carried_to_other_sums():
    problem = make_problem(ProblemSettings(grid=UniformGrid(), rows=2, columns=6, tokens=30, seed=0))
    statistics = problem.statistics
    first = statistics.factor(0.01, "diagonal")
    assert statistics.factor(0.01, "diagonal") is first
    others = [
        statistics.factor(0.02, "diagonal"),
        statistics.factor(0.01, "natural"),
        statistics.factor(0.01, "diagonal", 2),
    ]
    assert all(other is not first for other in others)
    doubled = replace(statistics, gram=statistics.gram * 4)
    for changed in (doubled, statistics.scaled(4.0), statistics.merge(statistics).scaled(2.0)):
        exact(changed.factor(0.01, "diagonal").upper, first.upper / 2)


@given(strategies.linear_problems(dtypes=(torch.float64,)), st.sampled_from([0.01, 1.0]))
def test_solve_is_the_damped_ridge_and_cached(problem, damping):
    statistics, right = problem.statistics, problem.weight
    wanted = right.numpy() @ np.linalg.inv(reference.damped(statistics.gram.numpy(), damping))
    # condition number up to 40 / damping, over 40 columns: 4000 * 40 * 2.2e-16 = 4e-11, relative to the largest
    np.testing.assert_allclose(
        statistics.solve(right, damping).numpy(), wanted, rtol=1e-9, atol=1e-10 * np.abs(wanted).max()
    )
    exact(statistics.solve(right, damping), statistics.solve(right, damping))


@pytest.mark.parametrize("width", [255, 256, 257, 600])
def test_wide_grams_are_summed_in_panels_and_symmetric(width):
    generator = torch.Generator().manual_seed(1)
    sums = Accumulator(width, frozenset(), dtype=torch.float64)
    expected = torch.zeros(width, width, dtype=torch.float64)
    for tokens in (3, 40):
        inputs = torch.randn(tokens, width, generator=generator, dtype=torch.float64)
        weights = torch.rand(tokens, generator=generator, dtype=torch.float64)
        sums.add(inputs, weights=weights)
        expected += (inputs * weights[:, None]).T @ inputs
        gram = sums.finish().gram
        torch.testing.assert_close(gram, expected, rtol=1e-12, atol=1e-12)
        exact(gram, gram.t().contiguous())


@given(
    strategies.linear_problems(dtypes=(torch.float64,)),
    st.sampled_from([0.001, 0.01, 1.0]),
    st.sampled_from([(1, "natural"), (1, "diagonal"), (4, "natural"), (16, "natural")]),
)
def test_block_ldl_ratio_is_that_of_the_explicit_factors(problem, damping, how):
    (tile, order), gram = how, problem.statistics.gram.numpy()
    seen = gram.diagonal() != 0
    hessian = reference.damped(gram, damping)
    columns = reference.visiting_order(gram, "diagonal") if order == "diagonal" else np.arange(len(gram))
    seen, hessian = seen[columns], hessian[np.ix_(columns, columns)]
    lower, middle = reference.block_ldl(hessian, tile)
    # the twin's own identity; condition number up to 40 / damping
    np.testing.assert_allclose(lower @ middle @ lower.T, hessian, rtol=0, atol=1e-10 * np.abs(hessian).max())
    wanted = middle.diagonal()[seen].sum() / hessian.diagonal()[seen].sum() if seen.any() else 1.0
    found = block_ldl_ratio(problem.statistics, tile, damping, order)
    assert found == pytest.approx(wanted, rel=1e-9)
    assert 0 < found <= 1 + 1e-12


def test_block_ldl_ratio_knows_what_feedback_can_do():
    independent = Statistics(tokens=1.0, gram=torch.diag(torch.tensor([1.0, 4.0, 0.0, 9.0])))
    assert block_ldl_ratio(independent, 1, 0.01) == pytest.approx(1.0)
    alike = Statistics(tokens=1.0, gram=torch.tensor([[1.0, 0.6], [0.6, 1.0]], dtype=torch.float64))
    # the first column is left with what the second does not explain, 1 - 0.6^2; a tile of both explains nothing
    assert block_ldl_ratio(alike, 1, 0.0) == pytest.approx((0.64 + 1) / 2)
    assert block_ldl_ratio(alike, 2, 0.0) == pytest.approx(1.0)
    assert block_ldl_ratio(Statistics(tokens=0.0, gram=torch.zeros(3, 3)), 1, 0.01) == 1.0


def test_forgotten_ridges_are_made_again():
    x = torch.randn(40, 8, generator=torch.Generator().manual_seed(0))
    statistics = Statistics(tokens=40.0, gram=x.T @ x)
    ridge, factor = statistics.ridge(0.1), statistics.factor(0.1)
    statistics.forget_ridges()
    assert statistics.factor(0.1) is factor
    again = statistics.ridge(0.1)
    assert again is not ridge
    torch.testing.assert_close(again.upper, ridge.upper, rtol=0, atol=0)
