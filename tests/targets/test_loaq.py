"""LoaQ against least squares over tokens, and what is its own."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mezzotint.core.statistics import Accumulator
from mezzotint.errors import ConfigError
from mezzotint.sweep.statistics import Compared, normed
from mezzotint.targets.loaq import Loaq
from mezzotint.targets.qep import Qep, quadratic_of
from mezzotint.testing import strategies
from mezzotint.testing.problems import make_tokens, make_weight
from reference import qep as reference
from targets.test_qep import CLOSE, DIFFICULT, arrays, corrected, difficult_tokens, well_conditioned

strengths = st.sampled_from([0.0, 0.3, 1.0])
dampings = st.sampled_from([0.001, 0.01, 1.0])


@given(settings=strategies.problem_settings(dtypes=(torch.float64,)), alpha=strengths, beta=strengths, damping=dampings)
def test_is_least_squares_to_both_corrections(settings, alpha, beta, damping):
    weight, tokens = make_weight(settings), make_tokens(settings)
    x, xh = arrays(tokens)
    ridge, difference = reference.ridge_of(xh, damping), tokens.difference.numpy()
    wanted = reference.loaq(weight.numpy(), x, xh, difference, alpha=alpha, beta=beta, ridge=ridge)
    aim = corrected(Loaq(alpha=alpha, beta=beta, damping=damping), weight, tokens)
    np.testing.assert_allclose(aim.matrix.numpy(), wanted, **CLOSE)
    assert aim.corrected == (alpha > 0 or beta > 0)


@given(seed=st.integers(0, 2**20))
def test_at_full_strength_it_minimises_the_error_of_the_stream(seed):
    weight, tokens = well_conditioned(seed)
    x, xh = arrays(tokens)
    difference, w = tokens.difference.numpy(), weight.numpy()
    aim = corrected(Loaq(alpha=1.0, beta=1.0, damping=0.0), weight, tokens)
    value = aim.matrix.numpy()
    # V of min ||(rh + V xh) - (r + W x)||^2
    np.testing.assert_allclose(value, reference.least_squares(xh, x @ w.T + difference), **CLOSE)
    least = reference.loss(value, w, x, xh, difference)
    rng = np.random.default_rng(seed)
    for other in (w, corrected(Qep(alpha=1.0, damping=0.0), weight, tokens).matrix.numpy()):
        assert reference.loss(other, w, x, xh, difference).sum() > least.sum()
    for size in (1e-3, 1e-1):
        assert (reference.loss(value + size * rng.standard_normal(w.shape), w, x, xh, difference) > least).all()
    # and the quadratic that decisions go by is that loss: no gradient there
    quadratic = quadratic_of(weight, tokens.statistics())
    gradient = value @ quadratic.gram.numpy() - quadratic.cross.numpy()
    np.testing.assert_allclose(gradient, 0, atol=1e-9 * np.abs(quadratic.cross.numpy()).max())


@pytest.mark.parametrize("own", [True, False])
def test_through_the_norm_it_minimises_what_the_next_layer_sees(own):
    """With scales of tokens held fixed the target is the minimiser; with them free it still loses least."""
    g = torch.Generator().manual_seed(0)
    tokens, inputs, outputs = 400, 10, 6
    w = torch.randn(outputs, inputs, generator=g, dtype=torch.float64)
    loud = torch.rand(tokens, 1, generator=g, dtype=torch.float64).mul(3).exp()  # tokens differ in size
    x, r = (loud * torch.randn(tokens, n, generator=g, dtype=torch.float64) for n in (inputs, outputs))
    xh, rh = (t + 0.3 * loud * torch.randn(t.shape, generator=g, dtype=torch.float64) for t in (x, r))
    rh = rh - 0.2 * xh @ torch.randn(inputs, outputs, generator=g, dtype=torch.float64)  # of which inputs tell
    seen = normed(Compared(quantized=xh, original=x, stream=rh, original_stream=r), w, None, own=own)
    scaled, plain = sums_of(xh=seen.quantized, x=seen.original, lost=seen.residual), sums_of(xh=xh, x=x, lost=r - rh)
    aims = {
        "norm": Loaq(alpha=1.0, beta=1.0, damping=0.0).aim(w, scaled, None).matrix,
        "plain": Loaq(alpha=1.0, beta=1.0, damping=0.0).aim(w, plain, None).matrix,
        "qep": Qep(alpha=1.0, damping=0.0).aim(w, plain, None).matrix,
        "none": w,
    }

    def size(stream):
        return stream.square().mean(1, keepdim=True).sqrt()

    out, held = r + x @ w.t(), size((rh + xh @ w.t()) if own else (r + x @ w.t()))
    slope = ((rh + xh @ aims["norm"].t()) / held - out / size(out)).t() @ (xh / held)
    torch.testing.assert_close(slope, torch.zeros_like(slope), rtol=0, atol=1e-9)
    free = {k: float(((y := rh + xh @ v.t()) / size(y) - out / size(out)).square().sum()) for k, v in aims.items()}
    assert free["norm"] < free["plain"] < min(free["qep"], free["none"])


def sums_of(*, xh, x, lost):
    needs = frozenset({"gram", "drift", "residual"})
    sums = Accumulator(x.shape[1], needs, rows=lost.shape[1], dtype=torch.float64)
    sums.add(xh, original=x, residual=lost)
    return sums.finish()


@given(problem=strategies.linear_problems(), alpha=strengths, damping=dampings)
def test_without_a_residual_stream_it_is_qep(problem, alpha, damping):
    statistics = replace(problem.statistics, residual=None)
    aim = Loaq(alpha=alpha, beta=1.0, damping=damping).aim(problem.weight, statistics, None)
    wanted = Qep(alpha=alpha, damping=damping).aim(problem.weight, statistics, None)
    # alpha is multiplied before the solve here, and behind it there; in float32 with condition numbers up to 1e5
    rtol = 1e-2 if problem.weight.dtype == torch.float32 else 1e-9
    size = float((wanted.matrix - problem.weight).abs().max()) + float(problem.weight.abs().max()) * 1e-5
    torch.testing.assert_close(aim.matrix, wanted.matrix, rtol=0, atol=rtol * size)


@given(problem=strategies.linear_problems(), damping=dampings)
def test_nothing_to_correct_gives_the_weight(problem, damping):
    s = problem.statistics
    still = replace(s, drift=torch.zeros_like(s.drift), residual=torch.zeros_like(s.residual))
    for stage, fit in (
        (Loaq(alpha=1.0, beta=1.0, damping=damping), still),
        (Loaq(alpha=0.0, beta=0.0, damping=damping), s),
    ):
        torch.testing.assert_close(stage.aim(problem.weight, fit, None).matrix, problem.weight, rtol=0, atol=0)


@pytest.mark.parametrize("kind", DIFFICULT)
@pytest.mark.parametrize("dtype", strategies.DTYPES)
@pytest.mark.parametrize("damping", [0.01, 1.0])
def test_singular_inputs_give_finite_aims_that_lose_nothing(kind, dtype, damping):
    weight, tokens = difficult_tokens(kind, dtype)
    aim = corrected(Loaq(alpha=1.0, beta=1.0, damping=damping), weight, tokens).matrix
    assert bool(aim.isfinite().all())
    x, xh, difference = (t.double().numpy() for t in (tokens.original, tokens.quantized, tokens.difference))
    loss, before = (
        reference.loss(v.double().numpy(), weight.double().numpy(), x, xh, difference).sum() for v in (aim, weight)
    )
    assert loss <= before * (1 + 1e-5) + 1e-9


def test_needs_both_streams():
    weight, tokens = well_conditioned(seed=0)
    for fit in (None, replace(tokens.statistics(), drift=None)):
        with pytest.raises(ConfigError, match="'loaq' needs statistics of the original and the quantized model"):
            Loaq().aim(weight, fit, None)
