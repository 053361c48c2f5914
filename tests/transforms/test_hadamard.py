"""What is particular to the Hadamard transform: its matrices, its scales, and what they do to the objective."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mezzotint.core.contracts import Aim
from mezzotint.errors import ConfigError
from mezzotint.targets.qep import quadratic_of
from mezzotint.testing import strategies
from mezzotint.transforms.hadamard import Hadamard
from reference import transforms as twin

problems = strategies.linear_problems(dtypes=(torch.float64,))
settings = strategies.transforms("hadamard")


def fit(stage, matrix, seed=1):
    return stage.fit([Aim(matrix=matrix)], None, None, torch.Generator().manual_seed(seed))[0]


def same(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


def sides(basis):
    return twin.hadamard_sides(
        basis.shape,
        basis.input_sign.numpy(),
        basis.output_scale.double().numpy(),
        basis.settings.block,
        rotate_outputs=basis.settings.sides == "both",
    )


@given(problem=problems, stage=settings)
def test_explicit_matrices(problem, stage):
    basis = fit(stage, problem.weight)
    left, right = sides(basis)
    w, s = problem.weight.numpy(), problem.statistics
    found = basis.statistics(s)
    for actual, expected in [
        (basis.weight(problem.weight), left @ w @ right),
        (basis.inverse(problem.weight), np.linalg.inv(left) @ w @ np.linalg.inv(right)),
        (found.gram, right.T @ s.gram.numpy() @ right),
        (found.drift, right.T @ s.drift.numpy() @ right),
        (found.residual, left @ s.residual.numpy() @ right),
    ]:
        # sums of at most 40 products, twice
        np.testing.assert_allclose(actual.numpy(), expected, rtol=0, atol=1e-12 * max(np.abs(expected).max(), 1e-30))


@given(problem=problems)
def test_scales_are_the_rms_of_rows_in_half_precision(problem):
    both, one = (fit(Hadamard(sides=side), problem.weight).output_scale for side in ("both", "input"))
    rms = np.sqrt(np.mean(problem.weight.numpy() ** 2, axis=1))
    same(one, torch.from_numpy(np.where(rms > 0, rms, 1.0)).half())
    same(both.abs(), one)


def test_signs_are_random_and_scales_positive_without_output_rotation():
    basis = fit(Hadamard(), torch.ones(2000, 2000))
    negative = twin.signs(basis.input_sign.numpy(), 2000) < 0
    # 2000 fair coins: five standard deviations of sqrt(2000) / 2
    assert abs(int(negative.sum()) - 1000) < 112
    assert abs(int((basis.output_scale < 0).sum()) - 1000) < 112
    assert bool((fit(Hadamard(sides="input"), torch.ones(100, 8)).output_scale > 0).all())


def test_scales_stay_in_the_range_of_half_precision():
    rows = torch.tensor([1e-12, 1e-40, 0.0, 1.0, 1e9, 1e30])
    basis = fit(Hadamard(sides="input"), rows[:, None].expand(-1, 8).contiguous())
    same(basis.output_scale.float(), torch.tensor([2.0**-14, 2.0**-14, 1.0, 1.0, 65504.0, 65504.0]))


@given(problem=problems, stage=settings)
def test_the_objective_counts_errors_relative_to_the_scale_of_their_row(problem, stage):
    w, s = problem.weight, problem.statistics
    basis = fit(stage, w)
    v = problem.grid.decode(problem.grid.encode(w))
    weighted = quadratic_of(w, s).value(v) / basis.output_scale.double().square()
    rotated = quadratic_of(basis.weight(w), basis.statistics(s)).value(basis.weight(v))
    # terms of up to 1e3 times the total cancel, each exact to some 1e-15 of itself
    size = float((weighted.abs() + (v @ s.gram * v).sum(1) / basis.output_scale.double().square()).sum())
    torch.testing.assert_close(rotated.sum(), weighted.sum(), rtol=1e-9, atol=1e-12 * size)
    if stage.sides == "input":
        torch.testing.assert_close(rotated, weighted, rtol=1e-9, atol=1e-12 * size)


@given(problem=problems, stage=settings)
def test_the_loss_of_normalised_rows_is_invariant(problem, stage):
    """tr(E H E') of rows with rms 1, of any error E."""
    rms = problem.weight.square().mean(1, keepdim=True).sqrt()
    w = torch.where(rms > 0, problem.weight / rms, 1.0)
    basis, h = fit(stage, w), problem.statistics.gram
    error = torch.randn(w.shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    rotated, h_rotated = basis.weight(error), basis.statistics(problem.statistics).gram
    loss = (error @ h * error).sum()
    torch.testing.assert_close((rotated @ h_rotated * rotated).sum(), loss, rtol=1e-12, atol=1e-12)


@given(problem=problems, stage=settings, k=st.integers(-4, 8))
def test_a_power_of_two_goes_into_the_scales(problem, stage, k):
    w = problem.weight.sign() * problem.weight.abs().clamp(min=2.0**-8)  # far from the smallest normal half
    a, b = fit(stage, w), fit(stage, w * 2.0**k)
    live = w.any(1)
    same(b.output_scale[live], a.output_scale[live] * 2.0**k)
    same(b.weight(w * 2.0**k), a.weight(w))


def test_an_outlier_is_spread_over_its_block():
    w = 0.1 * torch.randn(128, 256, generator=torch.Generator().manual_seed(2))
    w[3, 7] = 100.0
    basis = fit(Hadamard(), w)
    assert float((w / basis.output_scale.float().abs()[:, None]).abs().max()) > 15
    # what 32 768 normal values of rms 1 may reach: beyond 6 lies one in 5e8
    assert float(basis.weight(w).abs().max()) < 6


@pytest.mark.parametrize(
    ("shape", "stage", "blocks"),
    [
        ((1536, 576), Hadamard(), (128, 64)),
        ((49152, 576), Hadamard(block=32), (32, 32)),
        ((9, 172), Hadamard(), (1, 4)),
        ((128, 4096), Hadamard(block=4096, sides="input"), (1, 4096)),
    ],
)
def test_blocks_are_the_largest_that_divide(shape, stage, blocks):
    basis = fit(stage, torch.ones(shape))
    assert basis.blocks == blocks
    assert {key: (t.dtype, len(t)) for key, t in basis.stored.items()} == {
        "input_sign": (torch.uint8, -(-shape[1] // 8)),
        "output_scale": (torch.float16, shape[0]),
    }


def test_what_does_not_fit_is_refused():
    ones = [Aim(matrix=torch.ones(2, width)) for width in (8, 16)]
    with pytest.raises(ConfigError, match=r"widths \[8, 16\]"):
        Hadamard().fit(ones, None, None, torch.Generator())
    stored = fit(Hadamard(), torch.ones(4, 16)).stored
    with pytest.raises(ConfigError, match="needs 4 scales and 3 bytes of signs; these are 4 and 2"):
        Hadamard().restore((4, 17), stored)
