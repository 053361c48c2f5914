"""Kernels whose rows depend on each other: levels against torch bit for bit, torch in float64 against numpy loops."""

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mezzotint import kernels
from mezzotint.core.curvature import Curvature
from mezzotint.errors import ConfigError
from mezzotint.kernels import reference
from reference import kernels as twin

LEVELS = kernels.available_levels()
SHAPES = st.tuples(st.integers(1, 70), st.integers(1, 24))
SIZES = st.sampled_from([16, 32, 64])


def same(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


@dataclass
class Block:
    """Values that codes decode to, a target, and the curvature of rows and columns."""

    target: Tensor
    value: Tensor
    scale: Tensor
    zero_point: Tensor
    gram: Tensor
    factor: Tensor
    curvature: Curvature
    taken: Tensor

    @property
    def rounding(self):
        return self.target.clone(), self.factor, self.scale, self.zero_point

    @property
    def descent(self):
        gradient = self.curvature.mixed((self.value - self.target) @ self.gram)
        return self.value.clone(), gradient, self.gram, self.scale, self.zero_point


def block(rows, k, size, bits, seed, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    x = draw(k, 2 * k)
    gram = x @ x.T / (2 * k) + 0.1 * torch.eye(k)
    g = draw(-(-rows // size), size, 2 * size)
    square = g @ g.mT / (2 * size)
    count = rows % size
    if count:
        square[-1, count:] = 0
        square[-1, :, count:] = 0
    curvature = Curvature(blocks=square, rows=rows).damped(0.1)
    # in the order of the rows: what the kernel is given is in order already
    root = torch.linalg.inv(torch.linalg.cholesky(torch.linalg.inv(curvature.blocks)).mT)
    taken = (root / root.diagonal(dim1=1, dim2=2)[:, None]).triu(1)
    scale = torch.rand(rows, k, generator=generator, dtype=torch.float64) / 2**bits + 0.2
    zero_point = torch.randint(0, 2**bits, (rows, k), generator=generator).double()
    value = scale * (torch.randint(0, 2**bits, (rows, k), generator=generator) - zero_point)
    factor = torch.linalg.cholesky(torch.linalg.inv(gram), upper=True)
    found = (draw(rows, k), value, scale, zero_point, gram, factor, taken)
    target, value, scale, zero_point, gram, factor, taken = (t.to(dtype) for t in found)
    curvature = Curvature(blocks=curvature.blocks.to(dtype), rows=rows)
    return Block(target, value, scale, zero_point, gram, factor, curvature, taken)


@pytest.mark.parametrize("level", LEVELS)
@settings(max_examples=30)
@given(shape=SHAPES, size=SIZES, bits=st.integers(1, 8), seed=st.integers(0, 2**32), threads=st.integers(1, 3))
def test_levels_agree_with_torch(level, shape, size, bits, seed, threads):
    problem = block(*shape, size, bits, seed)
    (work, *rest), (expected, *_) = problem.rounding, problem.rounding
    found = kernels.gptq_block_(work, *rest, bits, taken=problem.taken, threads=threads, level=level)
    same(found, reference.gptq_block_(expected, *rest, bits, taken=problem.taken))
    same(work, expected)
    (value, *rest), (expected, *_) = problem.descent, problem.descent
    square = problem.curvature.blocks
    code = kernels.descend_block_(value, *rest, bits=bits, curvature=square, threads=threads, level=level)
    same(code, reference.descend_block_(expected, *rest, bits=bits, curvature=square))
    same(value, expected)


@settings(max_examples=30)
@given(rows=st.integers(1, 40), k=st.integers(1, 12), bits=st.integers(1, 8), seed=st.integers(0, 2**32))
def test_float64_numpy_twins(rows, k, bits, seed):
    problem = block(rows, k, 16, bits, seed, torch.float64)
    work, *rest = problem.rounding
    square = problem.curvature.blocks.numpy()
    expected = twin.gptq_joint(*(t.numpy() for t in problem.rounding), bits, square)
    code, error = kernels.gptq_block_(work, *rest, bits, taken=problem.taken)
    # the twin solves systems where the kernel has factors: as far apart as the condition of a damped square allows
    np.testing.assert_array_equal(code.numpy(), expected[0])
    np.testing.assert_allclose(error.numpy(), expected[1], rtol=0, atol=1e-8)
    np.testing.assert_allclose(work.numpy(), expected[2], rtol=0, atol=1e-8)
    value, *rest = problem.descent
    whole = torch.block_diag(*problem.curvature.blocks)[:rows, :rows].numpy()
    expected = twin.descend_joint(*(t.numpy() for t in problem.descent), bits, whole)
    code = kernels.descend_block_(value, *rest, bits=bits, curvature=problem.curvature.blocks)
    np.testing.assert_array_equal(code.numpy(), expected[0])
    np.testing.assert_allclose(value.numpy(), expected[1], rtol=0, atol=1e-10)


@settings(max_examples=20)
@given(shape=SHAPES, bits=st.integers(1, 8), seed=st.integers(0, 2**32))
def test_rows_that_say_nothing_of_each_other_are_independent(shape, bits, seed):
    rows, k = shape
    problem = block(rows, k, 16, bits, seed)
    (work, *rest), (expected, *_) = problem.rounding, problem.rounding
    nothing = torch.zeros_like(problem.taken)
    same(kernels.gptq_block_(work, *rest, bits, taken=nothing), kernels.gptq_block_(expected, *rest, bits))
    same(work, expected)
    ones = torch.eye(16).repeat(len(nothing), 1, 1)
    value, expected = problem.value.clone(), problem.value.clone()
    rest = (problem.value - problem.target) @ problem.gram, problem.gram, problem.scale, problem.zero_point
    alone = kernels.descend_block_(expected, *rest, bits=bits)
    same(kernels.descend_block_(value, *rest, bits=bits, curvature=ones), alone)
    same(value, expected)


@pytest.mark.parametrize("squares", [torch.zeros(1, 16, 16), torch.zeros(3, 16, 16), torch.zeros(2, 24, 24)])
def test_squares_of_other_rows_are_refused(squares):
    problem = block(30, 4, 16, 3, 0)
    with pytest.raises(ConfigError, match=r"blocks of \d+ are not those of 30 rows"):
        kernels.gptq_block_(*problem.rounding, 3, taken=squares)
    with pytest.raises(ConfigError, match=r"blocks of \d+ are not those of 30 rows"):
        kernels.descend_block_(*problem.descent, bits=3, curvature=squares)


@pytest.mark.gpu
def test_tensors_of_a_gpu_come_back_there():
    problem = block(70, 12, 32, 3, 0)
    work, *rest = (t.cuda() for t in problem.rounding)
    code, error = kernels.gptq_block_(work, *rest, 3, taken=problem.taken.cuda())
    here, *rest = problem.rounding
    same((code.cpu(), error.cpu()), kernels.gptq_block_(here, *rest, 3, taken=problem.taken))
    same(work.cpu(), here)
    value, *rest = (t.cuda() for t in problem.descent)
    code = kernels.descend_block_(value, *rest, bits=3, curvature=problem.curvature.blocks.cuda())
    here, *rest = problem.descent
    same(code.cpu(), kernels.descend_block_(here, *rest, bits=3, curvature=problem.curvature.blocks))
    same(value.cpu(), here)
