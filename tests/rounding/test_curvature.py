"""Roundings and refinement whose rows share a quadratic."""

from dataclasses import replace

import pytest
import torch

from grids.toy_vector import ToyVectorGrid
from mezzotint.core.contracts import Aim
from mezzotint.core.curvature import Curvature
from mezzotint.core.statistics import Accumulator
from mezzotint.errors import ConfigError
from mezzotint.grids.uniform import UniformGrid
from mezzotint.rounding.gptq import Gptq
from mezzotint.rounding.refine import Descent, best_rows, descend_codes, refit_parameters
from mezzotint.targets.qep import quadratic_of
from mezzotint.testing import strategies
from targets.test_qep import DIFFICULT, difficult_tokens

ROWS, WIDTH, SIZE = 40, 150, 16  # a short block of rows, a ragged group and a second block of columns


def problem(dtype=torch.float64, scale_per="group"):
    generator = torch.Generator().manual_seed(5)
    inputs = torch.randn(300, WIDTH, generator=generator) @ torch.randn(WIDTH, WIDTH, generator=generator)
    inputs[:, 5] = 0
    sums = Accumulator(WIDTH, frozenset(), dtype=dtype)
    sums.add(inputs)
    weight = torch.randn(ROWS, WIDTH, generator=generator, dtype=torch.float64).to(dtype) + 0.3
    g = torch.randn(200, 48, generator=generator, dtype=torch.float64) * torch.rand(48, generator=generator)
    g[:, ROWS:] = 0
    g[:, :ROWS] += 0.5 * g[:, :1] - 0.4 * g[:, 20:21]
    g = g.unflatten(1, (3, SIZE)).transpose(0, 1)
    curvature = Curvature(blocks=(g.mT @ g).to(dtype), rows=ROWS).damped(0.05)
    fit = sums.finish()
    size = 32 if scale_per == "group" else None
    grid = UniformGrid(bits=3, group_size=size, scale_dtype="bfloat16", scale_per=scale_per).fit(weight, fit.importance)
    return weight, fit, grid, curvature


def loss(value, weight, fit, curvature):
    """``tr(A E H E')``, from the definition."""
    error = value - weight
    square = torch.block_diag(*curvature.blocks)[:ROWS, :ROWS]
    return float((square * (error @ fit.gram @ error.T)).sum())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("order", ["natural", "diagonal"])
def test_rows_that_say_nothing_of_each_other_give_gptq(dtype, order):
    weight, fit, grid, curvature = problem(dtype)
    alone = replace(curvature, blocks=torch.diag_embed(curvature.blocks.diagonal(dim1=1, dim2=2)))
    stage = Gptq(order=order)
    expected = stage.round(Aim(matrix=weight), grid, fit)
    found = stage.round(Aim(matrix=weight, curvature=alone), grid, fit)
    assert torch.equal(found.code, expected.code)
    torch.testing.assert_close(found.before, expected.before)  # products of matrices in another order of rows


@pytest.mark.parametrize("scale_per", ["group", "row", "matrix"])
def test_the_loss_that_rows_share_falls(scale_per):
    weight, fit, grid, curvature = problem(scale_per=scale_per)
    alone = Gptq().round(Aim(matrix=weight), grid, fit)
    joint = Gptq().round(Aim(matrix=weight, curvature=curvature), grid, fit)
    assert loss(joint.value, weight, fit, curvature) < 0.9 * loss(alone.value, weight, fit, curvature)
    torch.testing.assert_close(joint.value, joint.grid.decode(joint.code))
    again = grid.new_code()
    grid.encode_(again, joint.before, torch.arange(WIDTH))
    assert torch.equal(again, joint.code)  # plain rounding of what was there at the moment of rounding


def test_a_share_of_whole_blocks_is_rounded_as_in_the_whole():
    weight, fit, grid, curvature = problem()
    whole = Gptq().round(Aim(matrix=weight, curvature=curvature), grid, fit)
    for rows in (slice(0, 16), slice(16, None)):
        aim = Aim(matrix=weight[rows], curvature=curvature.take_rows(rows))
        part = Gptq().round(aim, grid.take_rows(rows), fit)
        assert torch.equal(part.code, whole.code[rows])


def test_other_grids_are_refused():
    weight, fit, _, curvature = problem()
    grid = ToyVectorGrid(tile=(1, 2)).fit(weight, None)
    with pytest.raises(ConfigError, match=r"curvature needs a uniform grid, not 'toy'"):
        Gptq().round(Aim(matrix=weight, curvature=curvature), grid, fit)


@pytest.mark.parametrize("start", ["joint", "alone"])
def test_every_step_of_refinement_lowers_the_loss_of_every_block(start):
    weight, fit, grid, curvature = problem()
    quadratic = quadratic_of(weight, fit, curvature=curvature)
    current = Gptq().round(Aim(matrix=weight, curvature=curvature if start == "joint" else None), grid, fit)
    first = last = curvature.shared(quadratic.value(current.value))
    assert float(quadratic.value(current.value).sum()) == pytest.approx(loss(current.value, weight, fit, curvature))
    for step in (descend_codes, refit_parameters, descend_codes, refit_parameters):
        current = step(current, quadratic)
        now = curvature.shared(quadratic.value(current.value))
        assert (now <= last + 1e-9 * first).all()
        assert now.sum() < last.sum()
        torch.testing.assert_close(current.value, current.grid.decode(current.code))
        last = now
    refitted = current.grid
    assert isinstance(refitted, type(grid))
    assert torch.equal(refitted.storable(refitted.scale), refitted.scale)
    assert set(refitted.zero_point.unique().tolist()) <= set(range(8))
    assert not torch.equal(refitted.scale, grid.scale)
    whole = Descent(passes=2).refine(
        Gptq().round(Aim(matrix=weight, curvature=curvature if start == "joint" else None), grid, fit),
        weight,
        quadratic,
        lambda grid: Gptq().round(Aim(matrix=weight, curvature=curvature), grid, fit),
    )
    torch.testing.assert_close(whole.value, current.value)


def degenerate(kind, rows, dtype):
    """Curvature of one short block, from gradients that leave directions or whole rows unseen."""
    g = torch.randn(SIZE, 1 if kind == "rank one" else 40, generator=torch.Generator().manual_seed(1))
    g *= kind != "zero"
    g[rows:] = 0
    if kind == "dead rows":
        g[1:3] = 0
    return Curvature(blocks=(g @ g.T)[None].to(dtype), rows=rows).damped(0.1)


@pytest.mark.parametrize("shape", ["random", "zero", "rank one", "dead rows"])
@pytest.mark.parametrize("kind", DIFFICULT)
@pytest.mark.parametrize("dtype", strategies.DTYPES)
def test_singular_curvature_of_singular_inputs_never_raises_the_loss(shape, kind, dtype):
    """Inputs that are constant, zero, equal or few, and gradients likewise: by the tokens themselves."""
    weight, tokens = difficult_tokens(kind, dtype)
    fit, curvature = tokens.statistics(), degenerate(shape, len(weight), dtype)
    square = curvature.blocks[0, : len(weight), : len(weight)].double()
    grid = UniformGrid(bits=3, group_size=5, scale_dtype="bfloat16").fit(weight, fit.importance)

    def loss(value):
        x, xh, r = (t.double() for t in (tokens.original, tokens.quantized, tokens.difference))
        error = x @ weight.double().T + r - xh @ value.double().T
        return float((error @ square * error).sum())

    current = Gptq().round(Aim(matrix=weight, curvature=curvature), grid, fit)
    assert bool(current.before.isfinite().all())
    if shape == "zero":
        assert torch.equal(current.code, Gptq().round(Aim(matrix=weight), grid, fit).code)
    quadratic = quadratic_of(weight, fit, curvature=curvature)
    first = last = loss(current.value)
    for step in (descend_codes, refit_parameters) * 2:
        current = step(current, quadratic)
        now = loss(current.value)
        assert now <= last * (1 + 1e-6)
        assert bool(current.value.isfinite().all())
        assert bool((current.grid.scale > 0).all())
        torch.testing.assert_close(current.value, current.grid.decode(current.code))
        last = now
    assert (last < first) == (kind != "all zero")


@pytest.mark.parametrize("step", [descend_codes, refit_parameters])
def test_alike_rows_are_refined_as_rows_of_their_own(step):
    weight, fit, grid, _ = problem()
    ones = Curvature(blocks=torch.eye(SIZE, dtype=torch.float64).repeat(3, 1, 1), rows=ROWS)
    rounded = Gptq().round(Aim(matrix=weight), grid, fit)
    expected = step(rounded, quadratic_of(weight, fit))
    found = step(rounded, quadratic_of(weight, fit, curvature=ones))
    assert torch.equal(found.code, expected.code)
    torch.testing.assert_close(found.value, expected.value)


def test_zero_points_are_refitted_where_that_helps():
    weight, fit, grid, curvature = problem()
    quadratic = quadratic_of(weight, fit, curvature=curvature)
    start = Gptq().round(Aim(matrix=weight, curvature=curvature), grid, fit)
    shifted = grid.with_parameters(grid.scale, (grid.zero_point + 2).clamp(0, 7))
    wrong = replace(start, grid=shifted, value=shifted.decode(start.code))
    better = refit_parameters(wrong, quadratic)
    assert isinstance(better.grid, type(grid))
    assert (better.grid.zero_point != shifted.zero_point).double().mean() > 0.5
    losses = [curvature.shared(quadratic.value(found.value)) for found in (better, wrong)]
    assert (losses[0] < losses[1]).all()


def test_a_scale_moves_to_where_the_others_of_its_block_want_it():
    """One group, codes fixed: no scale of the last row in turn can be better."""
    weight, fit, _, curvature = problem()
    grid = UniformGrid(bits=4, group_size=None, scale_dtype="float32").fit(weight, fit.importance)
    quadratic = quadratic_of(weight, fit, curvature=curvature)
    wide = grid.with_parameters(grid.scale * 1.2, grid.zero_point)
    start = Gptq().round(Aim(matrix=weight), wide, fit)
    found = refit_parameters(start, quadratic)
    same = found.grid.zero_point[-1] == grid.zero_point[-1]  # a zero point moves after its scale
    for factor in (0.99, 1.01):
        scale = found.grid.scale.clone()
        scale[-1] *= factor
        moved = found.grid.with_parameters(scale, found.grid.zero_point)
        assert quadratic.value(moved.decode(found.code)).sum() >= quadratic.value(found.value).sum() or not same


def test_the_best_blocks_are_taken():
    weight, fit, grid, curvature = problem()
    quadratic = quadratic_of(weight, fit, curvature=curvature)
    candidates = []
    for factor in (1.0, 0.93):
        narrow = grid.with_parameters(grid.storable(grid.scale * factor), grid.zero_point)
        candidates.append(Gptq().round(Aim(matrix=weight, curvature=curvature), narrow, fit))
    losses = [curvature.shared(quadratic.value(one.value)) for one in candidates]
    mixed = best_rows(candidates, quadratic)
    torch.testing.assert_close(curvature.shared(quadratic.value(mixed.value)), torch.minimum(*losses))
    assert len(torch.unique((losses[0] < losses[1])[::SIZE])) == 2  # either wins somewhere
