"""Products with packed weights: every level against a numpy twin bit for bit, and both against the exact product."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mezzotint import kernels
from mezzotint.errors import ConfigError
from reference import products as twin

LEVELS = kernels.product_levels()
RATES = range(8, 49)


def same(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True)


def tiles(in_tiles, out_tiles, rate, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-(2**31), 2**31, (in_tiles, out_tiles, rate), generator=generator).to(torch.int32)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def input_error(x, weight):
    """Of rounding inputs: 0.506 units of max|x| / 32639 for each, half a unit and three float32 roundings."""
    return x.abs().amax(1, keepdim=True) * weight.abs().sum(1) / 64500


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("states", [12, 16])
def test_every_rate(level, states):
    for rate in RATES:
        packed, x = tiles(2, 2, rate, seed=rate), normal(2, 32, seed=rate)
        expected = twin.trellis_matmul(x.numpy(), twin.trellis_codes(packed.numpy(), states))
        same(kernels.trellis_matmul(x, packed, states=states, level=level), torch.from_numpy(expected))


@pytest.mark.parametrize("level", LEVELS)
@given(
    shape=st.tuples(st.integers(0, 9), st.integers(1, 20), st.integers(1, 3)),
    rate=st.sampled_from(RATES),
    states=st.sampled_from([12, 16]),
    magnitude=st.integers(-140, 120),
    threads=st.integers(1, 3),
)
def test_trellis_twin(level, shape, rate, states, magnitude, threads):
    batch, in_tiles, out_tiles = shape
    packed, x = tiles(in_tiles, out_tiles, rate, seed=rate), normal(batch, 16 * in_tiles) * 2.0**magnitude
    expected = twin.trellis_matmul(x.numpy(), twin.trellis_codes(packed.numpy(), states))
    actual = kernels.trellis_matmul(x, packed, states=states, threads=threads, level=level)
    same(actual, torch.from_numpy(expected))


@pytest.mark.parametrize("states", [12, 16])
@pytest.mark.parametrize("rate", [8, 26, 47])
def test_trellis_is_close_to_the_exact_product(states, rate):
    packed, x = tiles(12, 3, rate), normal(4, 192)
    x[1] *= 1e-30
    x[2, 7] = 1e4  # everything else is left with five bits
    # the decoder's values are float32
    weight = torch.from_numpy(twin.trellis_codes(packed.numpy(), states)).float().mul(1 / 147.7).double()
    exact = kernels.trellis_matmul(x.double(), packed, states=states)
    torch.testing.assert_close(exact, x.double() @ weight.t(), rtol=1e-12, atol=1e-12)
    error = (kernels.trellis_matmul(x, packed, states=states) - exact).abs()
    assert (error <= input_error(x.double(), weight) + 2.0**-24 * exact.abs()).all()
    assert (error[0] <= 1e-4 * (x[0].double().abs() @ weight.abs().t())).all()


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("batch", [1, 2, 3, 8])
def test_trellis_many_tiles(level, batch):
    """More strips than one pass takes, more tiles than one block; several threads where the work is worth them."""
    packed, x = tiles(35, 201, 18), normal(batch, 560)
    expected = kernels.trellis_matmul(x, packed, states=16, threads=1, level="portable")
    same(kernels.trellis_matmul(x, packed, states=16, threads=3, level=level), expected)
    same(kernels.trellis_matmul(x[:1], packed, states=16, level=level), expected[:1])
    exact = kernels.trellis_matmul(x.double(), packed, states=16)
    torch.testing.assert_close(expected.double(), exact, rtol=0, atol=1e-3 * float(exact.abs().max()))


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("sign", [1, -1])
def test_trellis_sums_do_not_overflow(level, sign):
    """Codes and inputs at their limits: state 0 is the lowest code, -510, and every input the largest one."""
    packed, x = torch.zeros(1000, 1, 8, dtype=torch.int32), sign * torch.ones(1, 16000)
    expected = np.float32(-sign * 510 * 16000 * np.float64(32639) * (np.float64(1) / 32639 / 147.7))
    same(kernels.trellis_matmul(x, packed, states=16, level=level), torch.full((1, 16), float(expected)))


@pytest.mark.parametrize("level", [None, *LEVELS])
def test_rows_that_are_special(level):
    """Zeros, the largest and smallest numbers, and what is not finite; rows do not touch each other."""
    x = normal(7, 64)
    x[1] = 0
    x[2] = 0
    x[2, 5] = 1e37
    x[3] *= 1e-41
    x[4, 9] = torch.nan
    x[5, 9] = torch.inf
    packed, code = tiles(4, 1, 16), torch.arange(192).reshape(3, 64).to(torch.uint8) % 16
    scale, zero_point = torch.full((3, 2), 1e-3), torch.full((3, 2), 7.0)
    words = kernels.pack_bits(code, 4)
    trellis = kernels.trellis_matmul(x, packed, states=12, level=level)
    integers = kernels.packed_matmul(x, words, scale, zero_point, 32, bits=4, level=level)
    same(trellis, torch.from_numpy(twin.trellis_matmul(x.numpy(), twin.trellis_codes(packed.numpy(), 12))))
    same(integers, torch.from_numpy(twin.packed_matmul(*(t.numpy() for t in (x, code, scale, zero_point)), 32)))
    for product in (trellis, integers):
        assert (product[1] == 0).all()
        assert product[[4, 5]].isnan().all()
        assert product[[0, 2, 3, 6]].isfinite().all()
        assert (product[3] != 0).any()
    torch.testing.assert_close(integers[2], scale[:, 0] * (code[:, 5] - 7.0) * 1e37, rtol=1e-6, atol=0)


@st.composite
def integer_problems(draw):
    bits, n = draw(st.integers(2, 8)), draw(st.one_of(st.integers(1, 200), st.integers(500, 5000)))
    group_size = draw(st.sampled_from([32, 64, 96, 128, 256, 1000, 10000, 7, 1, 200]))
    rows, groups = draw(st.integers(0, 5)), -(-n // group_size)
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    code = torch.randint(0, 2**bits, (rows, n), generator=generator).to(torch.uint8)
    scale = torch.rand(rows, groups, generator=generator) + 0.1
    zero_point = torch.randint(0, 2**bits, (rows, groups), generator=generator).float()
    x = torch.randn(draw(st.integers(0, 9)), n, generator=generator)
    return x, code, scale, zero_point, group_size, bits


@pytest.mark.parametrize("level", LEVELS)
@given(problem=integer_problems(), threads=st.integers(1, 3))
def test_packed_twin(level, problem, threads):
    x, code, scale, zero_point, group_size, bits = problem
    words = kernels.pack_bits(code, bits)
    actual = kernels.packed_matmul(x, words, scale, zero_point, group_size, bits=bits, threads=threads, level=level)
    same(actual, torch.from_numpy(twin.packed_matmul(*(t.numpy() for t in (x, code, scale, zero_point)), group_size)))
    exact = kernels.packed_matmul(x.double(), words, scale, zero_point, group_size, bits=bits)
    weight = kernels.affine_decode(code, scale.double(), zero_point, group_size)
    torch.testing.assert_close(exact, x.double() @ weight.t(), rtol=0, atol=1e-12 * float(weight.abs().sum() + 1))
    # A term is the difference of two of at most |scale| * (2^bits - 1) * |x|: less than eight roundings of that size,
    # and one for each addition to its accumulator, of which there are sixteen.
    largest = kernels.affine_decode(torch.full_like(code, 2**bits - 1), scale.double(), 0 * zero_point, group_size)
    additions = len(twin.pieces(x.shape[1], group_size)) / 16 + 4
    rounding = (8 + additions) * 2.0**-24 * (x.double().abs() @ largest.t())
    assert ((actual - x.double() @ weight.t()).abs() <= input_error(x.double(), weight) + rounding).all()


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("group_size", [32, 64, 128, 512, 2048, 100])
def test_every_width_of_codes(level, group_size):
    """Whole blocks and a ragged end, in every width; the last rows end where their memory ends."""
    for bits in range(2, 9):
        code = torch.randint(0, 2**bits, (9, 2470), generator=torch.Generator().manual_seed(bits)).to(torch.uint8)
        scale, zero_point = normal(9, -(-2470 // group_size)).abs(), torch.ones(9, -(-2470 // group_size))
        x, words = normal(3, 2470), kernels.pack_bits(code, bits)
        expected = twin.packed_matmul(*(t.numpy() for t in (x, code, scale, zero_point)), group_size)
        actual = kernels.packed_matmul(x, words, scale, zero_point, group_size, bits=bits, level=level)
        same(actual, torch.from_numpy(expected))


@pytest.mark.parametrize("level", LEVELS)
def test_packed_sums_do_not_overflow(level):
    n = 40000
    words, ones = torch.full((2, n // 4), -1, dtype=torch.int32), torch.ones(2, 1)
    for sign in (1, -1):
        product = kernels.packed_matmul(torch.full((1, n), sign * 2.0), words, ones, 0 * ones, n, bits=8, level=level)
        torch.testing.assert_close(product, torch.full((1, 2), sign * 2.0 * 255 * n), rtol=1e-6, atol=0)


@pytest.mark.parametrize("level", LEVELS)
def test_packed_many_rows_on_several_threads(level):
    code = torch.randint(0, 16, (1200, 700), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    scale, zero_point, x = normal(1200, 11).abs(), torch.full((1200, 11), 8.0), normal(5, 700)
    words = kernels.pack_bits(code, 4)
    one = kernels.packed_matmul(x, words, scale, zero_point, 64, bits=4, threads=1, level="portable")
    same(kernels.packed_matmul(x, words, scale, zero_point, 64, bits=4, threads=3, level=level), one)


def test_views_halves_and_gradients():
    """Arguments may be views, 16-bit or need gradients, and are left alone."""
    packed, x = tiles(4, 6, 16), normal(64, 3)
    plain = kernels.trellis_matmul(x.t().contiguous(), packed[:, ::2].contiguous(), states=16)
    same(kernels.trellis_matmul(x.t().requires_grad_(), packed[:, ::2], states=16), plain)
    same(x, normal(64, 3))
    half = x.t().bfloat16()
    same(kernels.trellis_matmul(half, packed, states=16), kernels.trellis_matmul(half.float(), packed, states=16))
    code = torch.arange(128).reshape(64, 2).to(torch.uint8) % 8
    words, scale = kernels.pack_bits(code.t().contiguous(), 3), normal(2, 2).abs()
    wide = words.repeat_interleave(2, dim=1)[:, ::2]
    product = kernels.packed_matmul(x.t(), wide, scale.requires_grad_(), scale, 32, bits=3)
    same(product, kernels.packed_matmul(x.t().contiguous(), words, scale.detach(), scale.detach(), 32, bits=3))


def test_empty_matrices():
    empty = torch.zeros(3, 0)
    same(kernels.trellis_matmul(empty, tiles(0, 2, 16), states=16), torch.zeros(3, 32))
    assert kernels.trellis_matmul(torch.zeros(3, 16), tiles(1, 0, 16), states=16).shape == (3, 0)
    same(kernels.packed_matmul(empty, empty.int()[:2], empty[:2], empty[:2], 32, bits=4), torch.zeros(3, 2))


@pytest.mark.parametrize(
    ("x", "packed", "states", "message"),
    [
        (torch.zeros(1, 48), tiles(2, 1, 16), 16, "x has 48 columns; 2 rows of tiles need 32"),
        (torch.zeros(1, 32), tiles(2, 1, 7), 16, "packed has 7 words a tile; use 8 to 48"),
        (torch.zeros(1, 32), tiles(2, 1, 49), 16, "packed has 49 words a tile; use 8 to 48"),
        (torch.zeros(1, 32), tiles(2, 1, 16), 14, "states is 14; use 12 or 16"),
    ],
)
def test_wrong_tiles_are_refused(x, packed, states, message):
    with pytest.raises(ConfigError, match=message):
        kernels.trellis_matmul(x, packed, states=states)


def test_wrong_integers_are_refused():
    x, words, ones = torch.zeros(1, 40), torch.zeros(2, 5, dtype=torch.int32), torch.ones(2, 2)
    with pytest.raises(ConfigError, match="words has 5 words a row; 40 codes of 5 bits take 7"):
        kernels.packed_matmul(x, words, ones, ones, 32, bits=5)
    with pytest.raises(ConfigError, match="bits is 1; use 2 to 8"):
        kernels.packed_matmul(x, words, ones, ones, 32, bits=1)
    with pytest.raises(ConfigError, match=r"scale has shape \(2, 2\); these groups need \(2, 3\)"):
        kernels.packed_matmul(x, words, ones, ones, 16, bits=4)
    with pytest.raises(ConfigError, match="group_size is 0"):
        kernels.packed_matmul(x, words, ones, ones, 0, bits=4)
    with pytest.raises(ConfigError, match="threads is 0"):
        kernels.packed_matmul(x, words, ones, ones, 32, bits=4, threads=0)
    with pytest.raises(ConfigError, match=f"level 'avx512' is not one of {', '.join(LEVELS)}"):
        kernels.packed_matmul(x, words, ones, ones, 32, bits=4, level="avx512")
    with pytest.raises(ConfigError, match="not float64"):
        kernels.packed_matmul(x.double(), words, ones, ones, 32, bits=4, level="portable")
