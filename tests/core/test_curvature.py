"""The curvature in outputs: its algebra, and that feedback between rows is what is best for those that are left."""

import numpy as np
import pytest
import torch

from mezzotint.core.curvature import Curvature, Fisher
from mezzotint.errors import ConfigError

SHAPES = ["random", "zero", "rank one", "dead rows"]


def measured(rows, size, seed=0, shape="random"):
    generator = torch.Generator().manual_seed(seed)
    count = -(-rows // size)
    g = torch.zeros(200, count * size, dtype=torch.float64)
    g[:, :rows] = torch.randn(200, rows, generator=generator, dtype=torch.float64)
    g[:, :rows] *= torch.rand(rows, generator=generator).double()
    g[:, :rows] += g[:, :1]
    if shape == "rank one":
        g[1:] = 0
    elif shape != "random":
        g[:, :: 1 if shape == "zero" else 3] = 0
    g = g.unflatten(1, (count, size)).transpose(0, 1)
    return Curvature(blocks=g.mT @ g, rows=rows)


def dense(curvature):
    return torch.block_diag(*curvature.blocks)[: curvature.rows, : curvature.rows]


@pytest.mark.parametrize("rows", [16, 33, 64, 100])
def test_products_and_sums_are_those_of_the_whole_square(rows):
    found = measured(rows, 32)
    values = torch.randn(rows, 5, dtype=torch.float64)
    torch.testing.assert_close(found.mixed(values), dense(found) @ values)
    loss = torch.rand(rows, dtype=torch.float64)
    shared = found.shared(loss)
    for start in range(0, rows, 32):
        part = loss[start : start + 32]
        torch.testing.assert_close(shared[start : start + 32], part.sum().expand(len(part)))


def test_damping_is_relative_to_the_mean_of_the_rows_that_are_there():
    found = measured(40, 32)
    damped = found.damped(0.5)
    whole = dense(found)
    torch.testing.assert_close(dense(damped), whole / whole.diagonal().mean() + 0.5 * torch.eye(40))
    torch.linalg.cholesky(damped.blocks)
    nothing = Curvature(blocks=torch.zeros(2, 32, 32), rows=40).damped(0.1)
    torch.testing.assert_close(nothing.blocks, torch.eye(32).repeat(2, 1, 1))


def test_rows_of_whole_blocks_can_be_taken():
    found = measured(100, 32)
    part = found.take_rows(slice(32, None))
    assert part.rows == 68
    torch.testing.assert_close(dense(part), dense(found)[32:, 32:])
    assert found.take_rows(slice(None)).rows == 100
    assert found.take_rows(slice(0, 64)).blocks.shape == (2, 32, 32)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rows", [32, 50])
def test_each_row_takes_what_is_best_while_those_behind_it_are_free(rows, shape):
    """With errors of the rows before it fixed, the best of the others solves the normal equations of the rest."""
    found = measured(rows, 32, shape=shape).damped(0.03)
    order, taken = found.feedback()
    assert sorted(order.tolist()) == list(range(rows))
    assert torch.equal(order // 32, torch.arange(rows) // 32)
    square = dense(found)[order][:, order].numpy()
    errors = np.random.default_rng(0).standard_normal(rows)
    for row in range(rows):
        first = row // 32 * 32
        end = min(first + 32, rows)
        fixed, free = slice(first, row), slice(row, end)
        best = -np.linalg.solve(square[free, free], square[free, fixed] @ errors[fixed])[0]
        given = taken[row // 32, : row - first, row - first].numpy() @ errors[fixed]
        assert best == pytest.approx(-given, rel=1e-9, abs=1e-12)
    assert not taken.tril().any()


def test_rows_that_matter_most_come_first():
    found = measured(50, 32).damped(0.03)
    diagonal = dense(found).diagonal()[found.feedback()[0]]
    for start in (0, 32):
        part = diagonal[start : start + 32]
        assert (part[:-1] >= part[1:]).all()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"block_size": 48}, "block_size is 48; it must be 16, 32, 64 or 128"),
        ({"damping": 0.0}, "damping is 0.0; it must be above 0"),
        ({"tokens": 0}, "tokens is 0; it must be at least 1"),
    ],
)
def test_settings_out_of_range_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        Fisher(**settings)
