"""The block Hadamard transform: every level against torch bit for bit, torch in float64 against the matrix itself."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mezzotint import kernels
from mezzotint.errors import ConfigError
from mezzotint.kernels import reference
from reference import kernels as twin

LEVELS = kernels.available_levels()
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
BLOCKS = [2**k for k in range(11)]


def same(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


def normal(rows, n, seed, dtype):
    return torch.randn(rows, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("block", BLOCKS)
@given(
    rows=st.integers(0, 5),
    blocks=st.integers(0, 9),
    seed=st.integers(0, 2**32),
    dtype=st.sampled_from(DTYPES),
    threads=st.integers(1, 3),
)
def test_levels_agree_with_torch(level, block, rows, blocks, seed, dtype, threads):
    values = normal(rows, blocks * block, seed, dtype)
    found = kernels.hadamard(values, block, threads=threads, level=level)
    same(found, reference.hadamard(values, block))
    assert found.dtype == torch.float32


@pytest.mark.parametrize("block", BLOCKS)
def test_float64_numpy_twin(block):
    values = normal(3, 2 * block, block, torch.float64)
    found = kernels.hadamard(values, block)
    assert found.dtype == torch.float64
    # log2(block) + 1 roundings of at most 2^-53 each, of sums of a size of up to sqrt(block)
    np.testing.assert_allclose(found.numpy(), twin.hadamard(values.numpy(), block), rtol=0, atol=1e-13)


@pytest.mark.parametrize("block", BLOCKS)
def test_is_its_own_inverse_and_keeps_lengths(block):
    values = normal(4, 3 * block, 1, torch.float64)
    once = kernels.hadamard(values, block)
    torch.testing.assert_close(kernels.hadamard(once, block), values, rtol=0, atol=1e-13)
    torch.testing.assert_close(once.square().sum(1), values.square().sum(1), rtol=1e-13, atol=0)


@pytest.mark.parametrize("level", LEVELS)
def test_rows_do_not_depend_on_threads_and_neighbours(level):
    values = normal(700, 384, 0, torch.float32)
    whole = kernels.hadamard(values, 128, threads=3, level=level)
    same(kernels.hadamard(values, 128, threads=1, level=level), whole)
    same(kernels.hadamard(values[5:6], 128, level=level), whole[5:6])


def test_a_block_of_one_copies_and_views_are_left_alone():
    values = normal(6, 5, 0, torch.float32).t().requires_grad_()
    before = values.detach().clone()
    copied = kernels.hadamard(values, 1)
    same(copied, before)
    same(kernels.hadamard(values, 2), kernels.hadamard(before, 2))
    copied.zero_()
    same(values.detach(), before)


@pytest.mark.parametrize(
    ("width", "limit", "block"), [(11008, 128, 128), (576, 128, 64), (172, 128, 4), (9, 128, 1), (256, 100, 64)]
)
def test_block_of_a_width(width, limit, block):
    assert kernels.hadamard_block(width, limit) == block


def test_wrong_blocks_are_refused():
    values = torch.zeros(2, 12)
    for block in (0, -4, 3, 8, 24):
        with pytest.raises(ConfigError, match=rf"block is {block}; use a power of two that divides the 12 columns"):
            kernels.hadamard(values, block)
    with pytest.raises(ConfigError, match="not float64"):
        kernels.hadamard(values.double(), 4, level="portable")
    for width, limit in ((0, 128), (8, 0)):
        with pytest.raises(ConfigError, match=f"width is {width} and limit {limit}"):
            kernels.hadamard_block(width, limit)
