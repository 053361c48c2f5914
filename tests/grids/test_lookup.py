"""What is particular to the lookup grid: its tables, how a value is found in them, and how scales are chosen."""

from dataclasses import replace
from itertools import islice, pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mezzotint.errors import ConfigError
from mezzotint.grids.lookup import LookupGrid, gaussian_levels, lookup_table, nf4_levels
from mezzotint.testing import strategies
from reference import grids as reference

CPU = torch.device("cpu")
# Mean squared error of the best table for normal numbers, by bits.
ERROR = {1: ".3634", 2: ".1175", 3: ".03455", 4: ".00950", 5: ".00250", 6: ".000644", 7: ".000163", 8: ".0000412"}
NF4 = (
    "-1.0 -0.6961928009986877 -0.5250730514526367 -0.39491748809814453 -0.28444138169288635 -0.18477343022823334 "
    "-0.09105003625154495 0.0 0.07958029955625534 0.16093020141124725 0.24611230194568634 0.33791524171829224 "
    "0.44070982933044434 0.5626170039176941 0.7229568362236023 1.0"
)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def relative_error(grid, weight, importance=None):
    fitted = grid.fit(weight, importance)
    return float((fitted.decode(fitted.encode(weight)) - weight).square().sum() / weight.square().sum())


def problems(ranges):
    grids = strategies.grids("lookup").filter(lambda grid: grid.range in ranges and grid.bits <= 5)
    return strategies.linear_problems(grids.map(lambda grid: replace(grid, scale_dtype="float32")), (torch.float64,))


@pytest.mark.parametrize("bits", ERROR)
def test_error_of_the_tables_for_normal_numbers(bits):
    found = reference.normal_error(gaussian_levels(2**bits).tolist())
    printed = ERROR[bits]
    # half a unit of the last printed digit
    assert found == pytest.approx(float(printed), abs=0.5 * 10.0 ** -(len(printed) - 1))


@pytest.mark.parametrize("levels", [2, 4, 8, 16])
def test_tables_are_the_fixed_point_of_the_plain_iteration(levels):
    expected = reference.lloyd_max(levels, rounds=1500)
    np.testing.assert_allclose(gaussian_levels(levels).numpy(), expected, rtol=0, atol=1e-11)


@pytest.mark.parametrize("levels", [64, 256])
def test_every_value_is_the_mean_of_its_cell(levels):
    values = gaussian_levels(levels)
    assert bool((values.diff() > 0).all())
    torch.testing.assert_close(values, -values.flip(0), rtol=0, atol=0)
    ends = [-np.inf, *((values[1:] + values[:-1]) / 2).tolist(), np.inf]
    half = [reference.normal_mean(a, b) for a, b in pairwise(ends)][: levels // 2]
    # differences of densities and of probabilities in cells of a hundredth: 14 digits of 16 are lost in the tails
    np.testing.assert_allclose(values[: levels // 2].numpy(), half, rtol=0, atol=1e-9)


def test_nf4_is_the_published_list():
    levels, deviation = nf4_levels()
    # the list is that of a float32 computation: a unit or two in the last place
    np.testing.assert_allclose(levels.numpy(), np.array(NF4.split(), dtype=float), rtol=0, atol=1.2e-7)
    assert deviation == pytest.approx(1 / 1.8481307, rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("table", "bits"), [*(("gaussian", bits) for bits in range(2, 9)), ("nf4", 4)])
def test_nearest_is_the_binary_search(table, bits, dtype):
    found = lookup_table(table, bits, dtype, CPU)
    between = found.halfway[:-1]
    near = [torch.nextafter(between, torch.full_like(between, end)) for end in (-torch.inf, torch.inf)]
    edges = torch.tensor([0.0, -0.0, 1e30, -1e30, torch.inf, -torch.inf], dtype=dtype)
    x = torch.cat((2 * normal(20000).to(dtype), between, *near, edges))
    expected = torch.searchsorted(between, x)
    torch.testing.assert_close(found.nearest(x).long(), expected, rtol=0, atol=0)
    torch.testing.assert_close(found.values(found.nearest(x)), found.entries[expected], rtol=0, atol=0)


def groups(problem):
    """Weights that share a scale, their importance, and the scale; two rows' worth where there are many."""
    fitted, weight, importance = problem.grid, problem.weight.numpy(), problem.statistics.importance.numpy()
    if fitted.grid.scale_per == "matrix":
        assert bool((fitted.scale == fitted.scale[0, 0]).all())
        yield weight.ravel(), np.tile(importance, len(weight)), float(fitted.scale[0, 0])
        return
    for row, start in np.ndindex(min(len(weight), 2), fitted.scale.shape[1]):
        columns = slice(start * fitted.group_size, (start + 1) * fitted.group_size)
        yield weight[row, columns], importance[columns], float(fitted.scale[row, start])


@given(problems(["rms", "absmax", "error", "weighted"]), st.data())
def test_codes_are_the_nearest_of_all(problem, data):
    weight, fitted = problem.weight[:2], problem.grid
    entries = fitted.grid.codebook(torch.float64, CPU).entries[:, None].numpy()
    code = fitted.encode(problem.weight)
    for row, column in np.ndindex(*weight.shape):
        scale = float(fitted.scale[row, column // fitted.group_size])
        if scale > 0:
            assert int(code[row, column]) == reference.nearest_entry([float(weight[row, column]) / scale], entries)


@pytest.mark.parametrize("bits", range(2, 9))
def test_error_of_normal_weights(bits):
    weight = normal(64, 4096)
    grid = LookupGrid(bits=bits, group_size=None, range="rms", scale_dtype="float16")
    # 2^18 numbers: the mean of their squared errors has a standard error of .5 % at 8 bits and less below
    assert relative_error(grid, weight) == pytest.approx(float(ERROR[bits]), rel=0.03)
    # a scale of its own fits a row of 4096 a little better than its rms does, the more the finer the table
    assert 0.9 * float(ERROR[bits]) < relative_error(replace(grid, range="error"), weight) < 1.01 * float(ERROR[bits])


@given(problems(["rms", "absmax"]))
def test_plain_ranges(problem):
    fitted, codebook = problem.grid, problem.grid.grid.codebook(torch.float64, CPU)
    for group, _, scale in groups(problem):
        if fitted.grid.range == "absmax":
            expected = np.abs(group).max() / codebook.largest
        else:
            expected = np.sqrt((group**2).mean()) / codebook.deviation
        # rounded to float32, and twice on the way there
        assert scale == pytest.approx(expected, rel=2e-7, abs=0)


@given(problems(["error", "weighted"]))
def test_the_search_comes_close_to_the_best_of_many_scales(problem):
    fitted = problem.grid
    entries = fitted.grid.codebook(torch.float64, CPU)
    for group, weights, found_scale in islice(groups(problem), 4):
        if fitted.grid.range == "error":
            weights = np.ones_like(group)
        if not group.any() or not (weights * group**2).any():
            continue
        plain = np.sqrt((group**2).mean()) / entries.deviation
        wide = max(1.5 * plain, np.abs(group).max() / entries.largest)
        found, start_error, *others = (
            reference.codebook_error(group, weights, scale, entries.entries[:, None].numpy())
            for scale in (found_scale, plain, *np.linspace(0.5 * plain, wide, 60))
        )
        assert found <= start_error * (1 + 1e-5) + 1e-12
        # steps of a fifteenth are followed by finer ones around the best only: a narrow valley elsewhere may be missed,
        # and the fewer numbers a group has, the narrower valleys are
        total = float((weights * group**2).sum())
        assert found <= min(others) + 0.03 * total


@pytest.mark.parametrize("bits", [2, 4, 6])
def test_the_search_ends_in_fine_steps(bits):
    weight = normal(6, 512) ** 3  # long tails: the best scale is far from the rms
    fitted = LookupGrid(bits=bits, group_size=None, range="error", scale_dtype="float32").fit(weight, None)

    def errors(grid):
        return (grid.decode(grid.encode(weight)) - weight).square().sum(1)

    sweep = [errors(fitted.with_scale(fitted.scale * factor)) for factor in np.linspace(0.9, 1.1, 201)]
    assert bool((errors(fitted) <= 1.01 * torch.stack(sweep).amin(0)).all())


def test_groups_of_zeros_decode_to_zeros():
    weight = normal(4, 96)
    weight[1], weight[2, 32:64] = 0, 0
    for table in ("gaussian", "nf4"):
        fitted = LookupGrid(table=table, group_size=32, range="error", scale_dtype="float16").fit(weight, None)
        value = fitted.decode(fitted.encode(weight))
        assert not value[weight == 0].any()
        assert not fitted.scale[1].any()
        assert not fitted.decode(fitted.encode(weight + 1))[weight == 0].any()  # whatever feedback asks for there


def test_nf4_stands_for_zero():
    weight = normal(3, 64)
    weight[:, ::3] = 0
    fitted = LookupGrid(table="nf4", group_size=16, range="error", scale_dtype="float16").fit(weight, None)
    assert not fitted.decode(fitted.encode(weight))[:, ::3].any()


def test_weights_of_inputs_matter():
    weight, importance = normal(8, 256), torch.ones(256, dtype=torch.float64)
    weight[:, :8] *= 4
    importance[:8] = 1000
    grid = LookupGrid(bits=3, group_size=None, range="weighted", scale_dtype="float32")
    fits = [replace(grid, range=r).fit(weight, importance) for r in ("weighted", "error")]
    errors = [((f.decode(f.encode(weight)) - weight).square() * importance).sum(1) for f in fits]
    assert bool((errors[0] < errors[1]).all())


def test_scales_that_are_asked_for_are_kept():
    fitted = LookupGrid(group_size=8, scale_dtype="float16").fit(normal(2, 16), torch.ones(16, dtype=torch.float64))
    scale = fitted.storable(fitted.scale * 1.1)
    torch.testing.assert_close(scale.half().double(), scale, rtol=0, atol=0)
    torch.testing.assert_close(fitted.with_scale(scale).scale, scale, rtol=0, atol=0)


def test_what_does_not_fit_is_refused():
    with pytest.raises(ConfigError, match="bits is 3; the table 'nf4' has 4"):
        LookupGrid(bits=3, table="nf4")
    grid = LookupGrid(group_size=None, scale_dtype="float32")
    assert grid.needs == {"gram"}
    assert replace(grid, range="absmax").needs == frozenset()
    with pytest.raises(ConfigError, match="'weighted' but there are no statistics"):
        grid.fit(torch.ones(1, 4), None)
    with pytest.raises(ConfigError, match=r"group_size is still 'auto'; call resolve"):
        LookupGrid().stored_bits((4, 4))


def test_size_of_a_known_matrix():
    grid = LookupGrid(bits=3, group_size=128, scale_dtype="bfloat16")
    assert tuple(grid.stored_bits((4096, 4096))) == (3 * 2**24, 4096 * 32 * 16)
