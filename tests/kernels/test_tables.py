"""Products with indices into a table: every level against a numpy twin bit for bit, and both against the exact one."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mezzotint import kernels
from mezzotint.errors import ConfigError
from mezzotint.grids.packing import pack_codes
from mezzotint.kernels import LevelTable
from reference import products as twin

LEVELS = kernels.product_levels()
WIDTHS = [(1, bits) for bits in range(2, 9)] + [(2, bits) for bits in range(3, 13)]


def same(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True)


def table_of(width, bits, generator):
    return torch.randn(2**bits, width, generator=generator)


def codes(rows, n, bits, generator):
    return torch.randint(0, 2**bits, (rows, n), generator=generator).to(torch.int16)


@st.composite
def problems(draw):
    width, bits = draw(st.sampled_from(WIDTHS))
    n = width * draw(st.one_of(st.integers(1, 200), st.integers(500, 2500)))
    group_size = width * draw(st.sampled_from([16, 32, 48, 64, 128, 500, 5000, 7, 1]))
    rows, groups = draw(st.integers(0, 5)), -(-n // group_size)
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    code, scale = codes(rows, n // width, bits, generator), torch.rand(rows, groups, generator=generator) + 0.1
    x = torch.randn(draw(st.integers(0, 9)), n, generator=generator)
    return x, code, scale, group_size, LevelTable.of(table_of(width, bits, generator))


@pytest.mark.parametrize("level", LEVELS)
@given(problem=problems(), threads=st.integers(1, 3))
def test_twin(level, problem, threads):
    x, code, scale, group_size, table = problem
    words = pack_codes(code, table.bits)
    actual = kernels.table_matmul(x, words, scale, table, group_size, threads=threads, level=level)
    levels = table.levels.numpy()
    expected = twin.table_matmul(x.numpy(), code.numpy(), levels, table.step, scale.numpy(), group_size)
    same(actual, torch.from_numpy(expected))
    exact = kernels.table_matmul(x.double(), words, scale, table, group_size)
    groups = torch.arange(x.shape[1]) // group_size
    weight = scale.double()[:, groups] * (table.levels.double() * table.step)[code.long()].flatten(1)
    torch.testing.assert_close(exact, x.double() @ weight.t(), rtol=0, atol=1e-12 * float(weight.abs().sum() + 1))
    # inputs by half a unit and three roundings of 32639; then four roundings of each term, and one for each addition
    additions = 8 + len(twin.pieces(x.shape[1], group_size)) / 16
    size = x.double().abs() @ weight.abs().t()
    inputs = x.double().abs().amax(1, keepdim=True) * weight.abs().sum(1) / 64500 if x.numel() else 0.0
    assert ((actual - x.double() @ weight.t()).abs() <= inputs + additions * 2.0**-24 * size).all()


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("group_size", [32, 64, 128, 512, 4096, 100])
def test_every_width_of_codes(level, group_size):
    """Whole blocks and a ragged end, in every width; the last rows end where their memory ends."""
    generator = torch.Generator().manual_seed(5)
    for width, bits in WIDTHS:
        table, code = LevelTable.of(table_of(width, bits, generator)), codes(7, 2470 // width, bits, generator)
        scale, x = torch.rand(7, -(-2470 // group_size), generator=generator), torch.randn(3, 2470, generator=generator)
        expected = twin.table_matmul(
            x.numpy(), code.numpy(), table.levels.numpy(), table.step, scale.numpy(), group_size
        )
        actual = kernels.table_matmul(x, pack_codes(code, bits), scale, table, group_size, level=level)
        same(actual, torch.from_numpy(expected))


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("sign", [1, -1])
def test_sums_do_not_overflow(level, sign):
    n = 40000
    for width, bits in ((1, 8), (2, 6), (2, 12)):
        table = LevelTable.of(torch.full((2**bits, width), 2.0 * sign))
        words = torch.zeros(2, n // width * bits // 32, dtype=torch.int32)
        product = kernels.table_matmul(torch.full((1, n), 3.0), words, torch.ones(2, 1), table, n, level=level)
        torch.testing.assert_close(product, torch.full((1, 2), sign * 6.0 * n), rtol=1e-6, atol=0)


@pytest.mark.parametrize("level", [None, *LEVELS])
def test_inputs_that_are_special(level):
    generator = torch.Generator().manual_seed(0)
    table, code = LevelTable.of(table_of(1, 4, generator)), codes(3, 64, 4, generator)
    x = torch.randn(4, 64, generator=generator)
    x[0], x[1, 3], x[2, 5] = 0.0, torch.nan, torch.inf
    product = kernels.table_matmul(x, pack_codes(code, 4), torch.ones(3, 1), table, 64, level=level)
    same(product[0], torch.zeros(3))
    assert product[[1, 2]].isnan().all()
    assert product[3].isfinite().all()


def test_levels_are_the_nearest():
    values = torch.linspace(-1.7, 2.3, 16)[:, None]
    table = LevelTable.of(values)
    assert (table.bits, table.width) == (4, 1)
    assert float((table.levels * table.step - values.double()).abs().max()) <= table.step / 2 + 1e-12
    assert table.step == pytest.approx(2.3 / 32767)
    assert LevelTable.of(torch.zeros(4, 2)).levels.count_nonzero() == 0


def test_wrong_tables_are_refused():
    table, x = LevelTable.of(torch.ones(8, 2)), torch.zeros(1, 40)
    words, ones = torch.zeros(2, 2, dtype=torch.int32), torch.ones(2, 2)
    assert kernels.table_matmul(x, words, ones, table, 32).shape == (1, 2)
    with pytest.raises(ConfigError, match="x has 39 columns; a code stands for 2 of them together"):
        kernels.table_matmul(x[:, 1:], words, ones, table, 32)
    with pytest.raises(ConfigError, match="words has 3 words a row; codes of 3 bits for 40 columns take 2"):
        kernels.table_matmul(x, torch.zeros(2, 3, dtype=torch.int32), ones, table, 32)
    with pytest.raises(ConfigError, match=r"scale has shape \(2, 2\); these groups need \(2, 3\)"):
        kernels.table_matmul(x, words, ones, table, 16)
    for wrong in (torch.ones(12, 1), torch.ones(2, 1), torch.ones(8192, 1), torch.ones(8, 3)):
        with pytest.raises(ConfigError, match=rf"the table has {len(wrong)} entries of {wrong.shape[1]} values"):
            LevelTable.of(wrong)
