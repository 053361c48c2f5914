"""The block of GPTQ: every level against torch bit for bit, torch in float64 against numpy loops."""

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
    work = torch.randn(rows, k, generator=generator, dtype=torch.float64)
    x = torch.randn(k, 2 * k, generator=generator, dtype=torch.float64)
    factor = torch.linalg.cholesky(torch.linalg.inv(x @ x.T / (2 * k) + 0.1 * torch.eye(k)), upper=True)
    scale = torch.rand(rows, k, generator=generator, dtype=torch.float64) / 2**bits + 0.2
    zero_point = torch.randint(0, 2**bits, (rows, k), generator=generator)
    return tuple(t.to(dtype) for t in (work, factor, scale, zero_point))


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
    work, *rest = block(rows, k, bits, seed)
    expected_work = work.clone()
    code, error = kernels.gptq_block_(work, *rest, bits, threads=threads, level=level)
    same((code, error), reference.gptq_block_(expected_work, *rest, bits))
    same(work, expected_work)


@settings(max_examples=30)
@given(rows=st.integers(1, 6), k=st.integers(1, 20), bits=st.integers(1, 8), seed=st.integers(0, 2**32))
def test_float64_numpy_twin(rows, k, bits, seed):
    problem = block(rows, k, bits, seed, torch.float64)
    expected_code, expected_error, expected_work = twin.gptq(*(t.numpy() for t in problem), bits)
    code, error = kernels.gptq_block_(*problem, bits)
    np.testing.assert_array_equal(code.numpy(), expected_code)
    # The same operations in the same order: equal but for the library's freedom to fuse, a few units in the last place.
    np.testing.assert_allclose(error.numpy(), expected_error, rtol=0, atol=1e-12)
    np.testing.assert_allclose(problem[0].numpy(), expected_work, rtol=0, atol=1e-12)


def test_rows_are_independent_of_threads_and_neighbours():
    work, factor, scale, zero_point = block(203, 64, 3, 0)
    whole = work.clone()
    code, error = kernels.gptq_block_(whole, factor, scale, zero_point, 3, threads=3)
    for rows in (slice(0, 1), slice(5, 70), slice(70, 203)):
        part = work[rows].clone()
        same(kernels.gptq_block_(part, factor, scale[rows], zero_point[rows], 3, threads=1), (code[rows], error[rows]))
        same(part, whole[rows])


def test_a_view_is_modified_in_place():
    work, factor, scale, zero_point = block(20, 8, 4, 1)
    wide = torch.zeros(20, 30)
    wide[:, 5:13] = work
    kernels.gptq_block_(wide[:, 5:13], factor, scale, zero_point, 4)
    kernels.gptq_block_(work, factor, scale, zero_point, 4)
    same(wide[:, 5:13], work)
    assert not wide[:, :5].any()
    assert not wide[:, 13:].any()


def test_identity_factor_is_rounding_to_nearest():
    work, _, scale, zero_point = block(7, 9, 4, 2)
    before = work.clone()
    code, error = kernels.gptq_block_(work, torch.eye(9), scale, zero_point, 4)
    same(work, before)
    flat = work.reshape(-1, 1), scale.reshape(-1, 1), zero_point.reshape(-1, 1)
    same(code.reshape(-1, 1), kernels.affine_encode(*flat, 1, 4))
    same(error, work - scale * (code - zero_point))


def test_half_precision_work_is_refused():
    work, *rest = block(2, 3, 4, 3)
    with pytest.raises(ConfigError, match=r"work is torch\.bfloat16"):
        kernels.gptq_block_(work.bfloat16(), *rest, 4)
