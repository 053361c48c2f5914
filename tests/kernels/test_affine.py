"""Encode, decode and extremes: every level against the torch reference bit for bit, and both against float64 numpy."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kernels.problems import problems
from mezzotint import kernels
from mezzotint.errors import ConfigError
from mezzotint.kernels import reference
from reference import kernels as twin

LEVELS = kernels.available_levels()
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def same(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


@pytest.mark.parametrize("level", LEVELS)
@given(problem=problems(dtype=DTYPES), threads=st.integers(1, 3))
def test_levels_agree_with_torch(level, problem, threads):
    options = {"threads": threads, "level": level}
    values, size = problem.values, problem.group_size
    same(kernels.min_max(values, size, **options), reference.min_max(values, size))
    scale, zero_point = kernels.min_max_range(values, size, problem.bits)
    scale = scale * 0.7  # some values are clipped
    code = kernels.affine_encode(values, scale, zero_point, size, problem.bits, **options)
    same(code, reference.affine_encode(values, scale, zero_point, size, problem.bits))
    decoded = kernels.affine_decode(code, scale, zero_point, size, **options)
    same(decoded, reference.affine_decode(code, scale, zero_point, size))


@given(problem=problems(dtype=torch.float64))
def test_float64_numpy_twin(problem):
    values, size = problem.values, problem.group_size
    scale, zero_point = kernels.min_max_range(values, size, problem.bits)
    code = kernels.affine_encode(values, scale, zero_point, size, problem.bits)
    decoded = kernels.affine_decode(code, scale, zero_point, size)
    assert decoded.dtype == torch.float64
    for g, columns in enumerate(twin.groups(values.shape[1], size)):
        s, z = scale[:, g, None].numpy(), zero_point[:, g, None].numpy()
        expected = twin.encode(values[:, columns].numpy(), s, z, problem.bits)
        np.testing.assert_array_equal(code[:, columns].numpy(), expected)
        np.testing.assert_array_equal(decoded[:, columns].numpy(), twin.decode(expected, s, z))


@pytest.mark.parametrize("level", LEVELS)
def test_halves_go_to_even_and_extremes_are_clipped(level):
    values = torch.tensor([[-1e30, -2.5, -1.5, -0.5, 0.5, 1.5, 2.5, 1e30]])
    ones = torch.ones(1, 1)
    assert kernels.affine_encode(values, ones, 4 * ones, 8, 3, level=level).tolist() == [[0, 2, 2, 4, 4, 6, 6, 7]]


@pytest.mark.parametrize("level", LEVELS)
def test_every_half_precision_number_is_widened_exactly(level):
    """All bit patterns of finite bfloat16 and float16 numbers, subnormal ones too, as groups of one."""
    for dtype in (torch.bfloat16, torch.float16):
        every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
        every = every[every.isfinite()][None]
        lowest, highest = kernels.min_max(every, 1, level=level)
        same(lowest, every.float())
        same(highest, every.float())


def test_many_rows_on_several_threads():
    values = torch.randn(700, 333, generator=torch.Generator().manual_seed(0)).bfloat16()
    scale, zero_point = kernels.min_max_range(values, 64, 4, threads=1)
    same(kernels.min_max_range(values, 64, 4, threads=3), (scale, zero_point))
    code = kernels.affine_encode(values, scale, zero_point, 64, 4, threads=1)
    same(kernels.affine_encode(values, scale, zero_point, 64, 4, threads=3), code)
    decoded = kernels.affine_decode(code, scale, zero_point, 64, threads=3)
    same(decoded, kernels.affine_decode(code, scale, zero_point, 64, threads=1))
    # Half a step, the rounding of the zero point that shifts both ends by half a step, and float32 arithmetic.
    step = scale.repeat_interleave(64, dim=1)[:, :333]
    assert ((decoded - values.float()).abs() <= 1.001 * step).all()


def test_arguments_are_left_alone_and_may_be_views_that_need_gradients():
    values = torch.randn(64, 8, generator=torch.Generator().manual_seed(0)).t().requires_grad_()
    before = values.detach().clone()
    scale, zero_point = kernels.min_max_range(values, 32, 4)
    code = kernels.affine_encode(values, scale, zero_point, 32, 4)
    same(values.detach(), before)
    same(code, kernels.affine_encode(before.contiguous(), scale, zero_point, 32, 4))


def test_empty_matrices():
    for shape in ((0, 8), (3, 0)):
        scale, zero_point = kernels.min_max_range(torch.zeros(shape), 4, 4)
        assert kernels.affine_encode(torch.zeros(shape), scale, zero_point, 4, 4).shape == shape


def test_wrong_shapes_are_refused():
    values, ones = torch.zeros(2, 10), torch.ones(2, 2)
    with pytest.raises(ConfigError, match=r"scale has shape \(2, 2\); these groups need \(2, 3\)"):
        kernels.affine_encode(values, ones, ones, 4, 4)
    with pytest.raises(ConfigError, match="group_size is 0"):
        kernels.min_max(values, 0)
    with pytest.raises(ConfigError, match="not float64"):
        kernels.min_max(values.double(), 4, level="portable")
