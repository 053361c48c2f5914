"""The matrix-free solver against dense least squares."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from mezzotint.core.statistics import Accumulator
from mezzotint.submodules.relax import Search, Slope, derivative, relax
from mezzotint.targets.qep import Qep


@given(seed=st.integers(0, 2**20), damping=st.sampled_from([0.0, 0.01, 0.3]), parts=st.integers(1, 3))
def test_of_a_lone_linear_one_iteration_is_qep_at_full_strength(seed: int, damping: float, parts: int) -> None:
    g = torch.Generator().manual_seed(seed)
    weight = torch.randn(5, 6, generator=g, dtype=torch.float64)
    x = torch.randn(40, 6, generator=g, dtype=torch.float64)
    xh = x + 0.3 * torch.randn(40, 6, generator=g, dtype=torch.float64)
    sums = Accumulator(6, frozenset({"drift"}), dtype=torch.float64)
    sums.add(xh, original=x)
    fit = sums.finish()

    def batches(at: Tensor):
        for a, b in zip(x.chunk(parts), xh.chunk(parts), strict=True):
            off = b @ at.t() - a @ weight.t()
            yield Slope(
                inputs=b,
                tokens=float(len(b)),
                residual=lambda off=off: (float(off.square().sum()), off),
                curvature=lambda change: change,
                linear=True,
            )

    start = weight + torch.randn(weight.shape, generator=g, dtype=torch.float64)
    search = Search(damping=damping, iterations=1)
    found = relax(batches, start, weight, fit, search=search)
    wanted = Qep(alpha=1.0, damping=damping).aim(weight, fit, None).matrix
    # forty tokens of six inputs in float64: condition numbers below 100
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-9)


def test_products_with_a_derivative_are_those_of_differences() -> None:
    g = torch.Generator().manual_seed(0)
    at, change, back = (torch.randn(2, 3, 4, generator=g, dtype=torch.float64) for _ in range(3))

    def function(u: Tensor) -> Tensor:
        return u * u.square().mean(-1, keepdim=True).rsqrt()

    value, push, pull, _ = derivative(function, at)
    torch.testing.assert_close(value, function(at), rtol=0, atol=0)
    numeric = (function(at + 1e-6 * change) - function(at - 1e-6 * change)) / 2e-6
    torch.testing.assert_close(push(change), numeric, rtol=1e-6, atol=1e-8)
    assert float((push(change) * back).sum()) == pytest.approx(float((pull(back) * change).sum()), rel=1e-10)


@pytest.mark.parametrize(
    ("function", "wanted"),
    [
        (lambda u: u.flip(-1) * 3, True),
        (lambda u: u * 2 + 1, True),
        (lambda u: u * u.square().mean(-1, keepdim=True).rsqrt(), False),
        (lambda u: u * (u.square().mean(-1, keepdim=True) + 1e-6).rsqrt(), False),
        (torch.nn.functional.gelu, False),
        (torch.nn.functional.relu, False),
        (torch.tanh, False),
    ],
)
def test_linear_is_seen_from_values(function, wanted: bool) -> None:
    u = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(1))
    assert derivative(function, u).linear is wanted
