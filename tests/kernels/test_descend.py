"""The block of coordinate descent: every level against torch bit for bit, torch in float64 against numpy loops."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mezzotint import kernels
from mezzotint.errors import ConfigError
from mezzotint.kernels import reference
from reference import kernels as twin

LEVELS = kernels.available_levels()


def same(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


def block(rows, k, bits, seed, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    scale = torch.rand(rows, k, generator=generator, dtype=torch.float64) / 2**bits + 0.2
    zero_point = torch.randint(0, 2**bits, (rows, k), generator=generator).double()
    value = scale * (torch.randint(0, 2**bits, (rows, k), generator=generator) - zero_point)
    x = torch.randn(k, 2 * k, generator=generator, dtype=torch.float64)
    gram = x @ x.T / (2 * k)
    gram[:, ::5] = gram[::5] = 0  # inputs that never fire
    gradient = (value - torch.randn(rows, k, generator=generator, dtype=torch.float64)) @ gram
    return tuple(t.to(dtype) for t in (value, gradient, gram, scale, zero_point))


@pytest.mark.parametrize("level", LEVELS)
@settings(max_examples=50)
@given(
    rows=st.integers(1, 40),
    k=st.integers(1, 40),
    bits=st.integers(1, 8),
    seed=st.integers(0, 2**32),
    threads=st.integers(1, 3),
)
def test_levels_agree_with_torch(level, rows, k, bits, seed, threads):
    value, *rest = block(rows, k, bits, seed)
    expected = value.clone()
    code = kernels.descend_block_(value, *rest, bits=bits, threads=threads, level=level)
    same(code, reference.descend_block_(expected, *rest, bits=bits))
    same(value, expected)


@settings(max_examples=30)
@given(rows=st.integers(1, 6), k=st.integers(1, 20), bits=st.integers(1, 8), seed=st.integers(0, 2**32))
def test_float64_numpy_twin(rows, k, bits, seed):
    problem = block(rows, k, bits, seed, torch.float64)
    expected_code, expected_value = twin.descend(*(t.numpy() for t in problem), bits)
    np.testing.assert_array_equal(kernels.descend_block_(*problem, bits=bits).numpy(), expected_code)
    # the same operations in the same order: equal but for the library's freedom to fuse
    np.testing.assert_allclose(problem[0].numpy(), expected_value, rtol=0, atol=1e-12)


def test_the_gradient_is_not_modified_and_a_view_is():
    value, gradient, *rest = block(20, 8, 4, 1)
    wide, before = torch.zeros(20, 30), gradient.clone()
    wide[:, 5:13] = value
    kernels.descend_block_(wide[:, 5:13], gradient, *rest, bits=4)
    same(gradient, before)
    kernels.descend_block_(value, gradient, *rest, bits=4)
    same(wide[:, 5:13], value)
    assert not wide[:, :5].any()
    assert not wide[:, 13:].any()


def test_half_precision_values_are_refused():
    value, *rest = block(2, 3, 4, 3)
    with pytest.raises(ConfigError, match=r"value is torch\.bfloat16"):
        kernels.descend_block_(value.bfloat16(), *rest, bits=4)
