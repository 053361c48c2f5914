"""Refinement never raises the quadratic it descends, and leaves codes, grid and value in step."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from grids.toy_vector import ToyVectorGrid
from mezzotint.core.contracts import Aim
from mezzotint.core.statistics import Accumulator
from mezzotint.errors import ConfigError
from mezzotint.grids.uniform import UniformGrid
from mezzotint.registry import ROUNDINGS
from mezzotint.rounding.refine import Descent, best_rows, descend_codes, refit_parameters
from mezzotint.targets.qep import quadratic_of
from mezzotint.testing import strategies
from mezzotint.testing.problems import make_tokens
from reference import qep as reference
from targets.test_qep import DIFFICULT, difficult_tokens

few_bits = st.builds(
    UniformGrid,
    bits=st.integers(2, 4),
    group_size=st.sampled_from([None, 1, 3, 8]),
    symmetric=st.booleans(),
    scale_dtype=st.sampled_from(["float32", "bfloat16", "float16"]),
)


def problem(kind, symmetric=False, scale_dtype="float32", width=96):
    generator = torch.Generator().manual_seed(3)
    inputs = torch.randn(300, width, generator=generator) @ torch.randn(width, width, generator=generator)
    inputs[:, 5] = 0
    sums = Accumulator(width, frozenset(), dtype=torch.float64)
    sums.add(inputs)
    fit = sums.finish()
    weight = torch.randn(16, width, generator=generator, dtype=torch.float64) + 0.3
    grid = UniformGrid(bits=3, group_size=32, symmetric=symmetric, scale_dtype=scale_dtype)

    def round_on(grid):
        return ROUNDINGS[kind]().round(Aim(matrix=weight), grid, fit)

    return weight, quadratic_of(weight, fit), round_on, grid.fit(weight, fit.importance)


@pytest.mark.parametrize("kind", ["nearest", "gptq"])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("scale_dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("width", [96, 150])  # the last group is ragged, and there is a second block of columns
def test_every_step_lowers_the_quadratic_of_every_row(kind, symmetric, scale_dtype, width):
    weight, quadratic, round_on, grid = problem(kind, symmetric, scale_dtype, width)
    current = round_on(grid)
    start = last = quadratic.value(current.value)
    for step in (descend_codes, refit_parameters, descend_codes, refit_parameters):
        current = step(current, quadratic)
        now = quadratic.value(current.value)
        assert (now <= last + 1e-9 * start).all()
        torch.testing.assert_close(current.value, current.grid.decode(current.code))
        last = now
    assert last.sum() < 0.95 * start.sum()
    refitted = current.grid
    assert torch.equal(refitted.storable(refitted.scale), refitted.scale)
    assert set(refitted.zero_point.unique().tolist()) <= ({4.0} if symmetric else set(range(8)))
    assert not torch.equal(refitted.scale, grid.scale)
    whole = Descent(passes=2).refine(round_on(grid), weight, quadratic, round_on)
    torch.testing.assert_close(whole.value, current.value)


def loss(value, weight, tokens):
    """Of each row, from the tokens themselves: of what the stream has behind the matrix."""
    arrays = (t.double().numpy() for t in (value, weight, tokens.original, tokens.quantized, tokens.difference))
    return torch.from_numpy(reference.loss(*arrays))


def assert_in_step(found):
    assert bool(found.value.isfinite().all())
    assert bool((found.grid.scale > 0).all())
    torch.testing.assert_close(found.value, found.grid.decode(found.code))
    assert torch.equal(found.grid.storable(found.grid.scale), found.grid.scale)


@given(problem=strategies.linear_problems(few_bits, dtypes=(torch.float64,)), kind=st.sampled_from(["nearest", "gptq"]))
def test_no_step_raises_the_loss_of_any_row(problem, kind):
    quadratic = quadratic_of(problem.weight, problem.statistics)
    current = ROUNDINGS[kind]().round(problem.aim, problem.grid, problem.statistics)
    tokens = make_tokens(problem.settings)
    last = loss(current.value, problem.weight, tokens)
    for step in (descend_codes, refit_parameters) * 3:
        current = step(current, quadratic)
        now = loss(current.value, problem.weight, tokens)
        assert (now <= last * (1 + 1e-6)).all()
        assert_in_step(current)
        last = now


@pytest.mark.parametrize("kind", DIFFICULT)
@pytest.mark.parametrize("dtype", strategies.DTYPES)
@pytest.mark.parametrize("settings", [{"group_size": None}, {"group_size": 5, "symmetric": True}])
def test_singular_inputs_raise_the_loss_of_no_row(kind, dtype, settings):
    weight, tokens = difficult_tokens(kind, dtype)
    fit = tokens.statistics()
    grid = UniformGrid(bits=3, scale_dtype="bfloat16", **settings)

    def round_on(grid):
        return ROUNDINGS["gptq"]().round(Aim(matrix=weight), grid, fit)

    rounded = round_on(grid.fit(weight, fit.importance))
    before = loss(rounded.value, weight, tokens)
    for starts in ((), ("nearest", "clipped", "refitted")):
        found = Descent(starts=starts).refine(rounded, weight, quadratic_of(weight, fit), round_on)
        after = loss(found.value, weight, tokens)
        assert (after <= before * (1 + 1e-6)).all()
        assert_in_step(found)
        if kind == "all zero":
            assert torch.equal(found.code, rounded.code)
            assert torch.equal(found.grid.scale, rounded.grid.scale)
        else:
            assert after.sum() < before.sum()


@pytest.mark.parametrize("seed", range(6))
def test_codes_that_cancel_over_equal_inputs_leave_scales_alone(seed):
    """There ``c G c'`` is rounding noise, and a quotient by it anything: scales grew a million times."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(200, 4, generator=generator).repeat_interleave(4, 1)
    sums = Accumulator(16, frozenset())
    sums.add(x)
    weight, fit = torch.randn(64, 16, generator=generator), sums.finish()
    grid = UniformGrid(bits=3, group_size=4, scale_dtype="float32").fit(weight, fit.importance)
    rounded = ROUNDINGS["gptq"]().round(Aim(matrix=weight), grid, fit)
    found = Descent(passes=4).refine(rounded, weight, quadratic_of(weight, fit), lambda _: rounded)

    def lost(value):
        return ((value.double() - weight.double()) @ x.double().t()).square().sum(1)

    assert found.grid.scale.max() < 2 * grid.scale.max()
    assert (lost(found.value) <= lost(rounded.value) * (1 + 1e-5) + 1e-9).all()


def test_zero_points_are_refitted_where_that_helps():
    _, quadratic, round_on, grid = problem("nearest")
    shifted = grid.with_parameters(grid.scale, (grid.zero_point + 2).clamp(0, 7))
    start = round_on(grid)
    wrong = replace(start, grid=shifted, value=shifted.decode(start.code))  # codes of another zero point
    better = refit_parameters(wrong, quadratic)
    assert (better.grid.zero_point != shifted.zero_point).float().mean() > 0.5
    assert (quadratic.value(better.value) <= quadratic.value(wrong.value)).all()


def test_a_scale_is_the_minimum_along_its_line():
    _, quadratic, round_on, grid = problem("gptq")
    found = refit_parameters(round_on(grid.with_parameters(grid.scale * 0.8, grid.zero_point)), quadratic)
    for factor in (0.99, 1.01):  # of the last group, which nothing moved after
        scale = found.grid.scale.clone()
        scale[:, -1] *= factor
        moved = found.grid.with_parameters(scale, found.grid.zero_point)
        changed = found.grid.zero_point[:, -1] != grid.zero_point[:, -1]  # its zero point moved after its scale
        worse = quadratic.value(moved.decode(found.code)) >= quadratic.value(found.value)
        assert (worse | changed).all()
        assert not changed.all()


@pytest.mark.parametrize("starts", [("nearest",), ("clipped",), ("refitted",), ("nearest", "clipped", "refitted")])
def test_more_starts_are_never_worse_in_any_row(starts):
    weight, quadratic, round_on, grid = problem("gptq")
    alone = Descent().refine(round_on(grid), weight, quadratic, round_on)
    joint = Descent(starts=starts).refine(round_on(grid), weight, quadratic, round_on)
    losses = [quadratic.value(found.value) for found in (alone, joint)]
    assert (losses[1] <= losses[0] + 1e-9).all()
    assert losses[1].sum() < losses[0].sum()
    torch.testing.assert_close(joint.value, joint.grid.decode(joint.code))


def test_the_best_rows_are_taken_with_their_parameters():
    _, quadratic, round_on, grid = problem("nearest")
    wide = round_on(grid.with_parameters(grid.scale * 1.5, grid.zero_point))
    mixed = best_rows([wide, round_on(grid)], quadratic)
    expected = torch.minimum(quadratic.value(wide.value), quadratic.value(round_on(grid).value))
    torch.testing.assert_close(quadratic.value(mixed.value), expected)
    torch.testing.assert_close(mixed.value, mixed.grid.decode(mixed.code))


def test_other_grids_are_refused():
    weight, quadratic, round_on, _ = problem("nearest")
    rounded = round_on(ToyVectorGrid(tile=(1, 2)).fit(weight, None))
    with pytest.raises(ConfigError, match=r"needs a uniform grid, not 'toy'"):
        Descent().refine(rounded, weight, quadratic, round_on)


def test_clipped_starts_are_at_nine_and_eight_tenths_of_the_range():
    weight, quadratic, round_on, grid = problem("gptq")
    tried = []

    def spy(narrow):
        tried.append(float((narrow.scale / grid.scale).mean()))
        return round_on(narrow)

    Descent(starts=("clipped",)).refine(round_on(grid), weight, quadratic, spy)
    assert tried == pytest.approx([0.9, 0.8], rel=1e-6)  # of scales in float32
