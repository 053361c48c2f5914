"""What is particular to QuIP's incoherence processing: its matrices, its rescale, and its grid."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mezzotint.core.contracts import Aim
from mezzotint.core.statistics import Statistics
from mezzotint.errors import ConfigError
from mezzotint.grids.lookup import LookupGrid
from mezzotint.testing import strategies
from mezzotint.transforms.incoherence import Quip, factors, orthogonal
from reference import transforms as twin

EXPECTED = (
    [1, 5, 3, 0, 4, 2],
    [[0.828826387992982, -0.5595058700018317], [0.5595058700018317, 0.8288263879929821]],
    [-0.11964908923593365, 0.7488272081753821, 0.651875684269075],
)
# of RandomState(2025): signs of twelve numbers, and the first row of the orthogonal matrix of size 3
SIGNS = [-1.0, 1.0, 1.0, -1.0, -1.0, -1.0, 1.0, -1.0, 1.0, 1.0, -1.0, 1.0]
ODD = [0.671312910265073, -0.11879050684261262, -0.7315926407472352]
both_kinds = pytest.mark.parametrize("matrices", ["kronecker", "hadamard"])
TWINS = {"kronecker": twin.kronecker, "hadamard": twin.odd_hadamard}
problems = strategies.linear_problems(dtypes=(torch.float64,))


def fit(stage, aims, statistics, seed=1):
    return stage.fit(aims, statistics, None, torch.Generator().manual_seed(seed))


@given(problem=problems, rescale=st.booleans(), matrices=st.sampled_from(["kronecker", "hadamard"]))
def test_explicit_matrices(problem, rescale, matrices):
    (basis,) = fit(Quip(rescale=rescale, matrices=matrices), [problem.aim], problem.statistics)
    (rows, width), scale = basis.shape, basis.input_scale.double().numpy()
    sides = [
        TWINS[matrices](orthogonal(n, int(s), matrices), n) for n, s in zip((width, rows), basis.seed, strict=True)
    ]
    left, right = sides[1], np.diag(scale) @ sides[0].T
    w, s = problem.weight.numpy(), problem.statistics
    back, found = np.linalg.inv(right), basis.statistics(s)
    for actual, expected in [
        (basis.weight(problem.weight), left @ w @ right),
        (basis.inverse(problem.weight), left.T @ w @ back),
        (found.gram, back @ s.gram.numpy() @ back.T),
        (found.drift, back @ s.drift.numpy() @ back.T),
        (found.residual, left @ s.residual.numpy() @ back.T),
    ]:
        # scales span four orders of magnitude at most, twice
        np.testing.assert_allclose(actual.numpy(), expected, rtol=0, atol=1e-11 * max(np.abs(expected).max(), 1e-30))


@given(problem=problems)
def test_the_rescale_makes_both_diagonals_equal(problem):
    (basis,) = fit(Quip(), [problem.aim], problem.statistics)
    scale, w = basis.input_scale.double(), problem.weight
    inputs, weights = problem.statistics.gram.diagonal() / scale**2, w.square().sum(0) * scale**2
    alive = (inputs > 1e-6 * inputs.max()) & (weights > 1e-6 * weights.max())
    if int(alive.sum()) > 1:
        ratio = (inputs / weights)[alive]
        # four roundings of scales to eleven bits
        torch.testing.assert_close(ratio, ratio.mean().expand_as(ratio), rtol=4e-3, atol=0)


def test_matrices_with_one_input_share_the_rescale():
    generator = torch.Generator().manual_seed(0)
    first, second = (torch.randn(4, 8, generator=generator) for _ in range(2))
    gram = torch.rand(8, generator=generator).diag()
    both = fit(Quip(), [Aim(matrix=first), Aim(matrix=second)], Statistics(tokens=1.0, gram=gram))
    (together,) = fit(Quip(), [Aim(matrix=torch.cat([first, second]))], Statistics(tokens=1.0, gram=gram))
    assert both[0].seed[0] == both[1].seed[0]
    assert both[0].seed[1] != both[1].seed[1]
    for basis in both:
        torch.testing.assert_close(basis.input_scale, together.input_scale, rtol=0, atol=0)
    with pytest.raises(ConfigError, match=r"widths \[8, 9\]"):
        fit(Quip(), [Aim(matrix=first), Aim(matrix=torch.ones(2, 9))], None)


@both_kinds
@pytest.mark.parametrize("size", [1, 2, 7, 24, 172, 576])
def test_sides_are_orthogonal(size, matrices):
    side = orthogonal(size, 5, matrices)
    eye = torch.eye(size, dtype=torch.float64)
    turned = side.turn(eye)
    torch.testing.assert_close(turned @ turned.t(), eye, rtol=0, atol=1e-13)
    torch.testing.assert_close(side.back(turned), eye, rtol=0, atol=1e-13)
    if matrices == "kronecker":
        assert torch.equal(side.permutation.sort().values, torch.arange(size))


@both_kinds
@pytest.mark.parametrize("size", [172, 576, 11008])
def test_one_weight_becomes_many(size, matrices):
    """No entry of the matrix is much larger than 1 / sqrt(n): what QuIP calls incoherent."""
    side = orthogonal(size, 3, matrices)
    some = torch.eye(size, dtype=torch.float64)[:16]
    # the odd factor has at most 43 x 43 nearly normal numbers; both of a Kronecker product have numbers of up to four
    most = 4 if matrices == "hadamard" else 16
    assert float(side.turn(some).abs().max()) * size**0.5 < most


def test_a_seed_stands_for_the_same_signs_for_good():
    side = orthogonal(12, 2025, "hadamard")
    assert side.sign.tolist() == SIGNS
    np.testing.assert_allclose(side.left[0].numpy(), ODD, rtol=0, atol=1e-12)


def test_a_seed_stands_for_the_same_matrix_for_good():
    side = orthogonal(6, 2025, "kronecker")
    assert side.permutation.tolist() == EXPECTED[0]
    np.testing.assert_allclose(side.left.numpy(), EXPECTED[1], rtol=0, atol=1e-12)
    np.testing.assert_allclose(side.right[0].numpy(), EXPECTED[2], rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("size", "expected"),
    [(11008, (688, 16)), (576, (24, 24)), (1536, (32, 48)), (4096, (64, 64)), (172, (86, 2)), (7, (7, 1)), (1, (1, 1))],
)
def test_factors_take_the_prime_factors_by_turns(size, expected):
    assert factors(size) == expected


@both_kinds
def test_outliers_are_spread(matrices):
    weight = torch.randn(64, 96, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    weight[3, 5] = 100.0
    (basis,) = fit(Quip(rescale=False, matrices=matrices), [Aim(matrix=weight)], None)
    turned = basis.weight(weight)
    torch.testing.assert_close(turned.norm(), weight.norm())
    assert float(turned.abs().max() / turned.square().mean().sqrt()) < 8  # it was 60


def test_its_grid_reaches_to_two_and_two_fifths_of_the_rms():
    weight = torch.randn(6, 40, generator=torch.Generator().manual_seed(0))
    grid = LookupGrid(bits=2, table="even", range="rms", scale_per="matrix").resolve((6, 40), torch.float32)
    fitted = grid.fit(weight, None)
    values = fitted.decode(fitted.encode(weight.sign() * 100)).unique()
    reach = 2.4 * weight.double().square().mean().sqrt()
    torch.testing.assert_close(
        values.double(), reach * torch.tensor([-1.0, 1.0], dtype=torch.float64), rtol=1e-6, atol=0
    )
    levels = fitted.decode(fitted.encode(weight)).unique().double()
    torch.testing.assert_close(levels, reach * torch.tensor([-1, -1 / 3, 1 / 3, 1], dtype=torch.float64))
    assert fitted.store(fitted.encode(weight), (6, 40))["scale"].numel() == 1
