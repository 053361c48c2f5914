"""Refitting one group of columns: every level against torch bit for bit, float64 against loops in numpy."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mezzotint import kernels
from mezzotint.errors import ConfigError
from mezzotint.kernels import reference

LEVELS = kernels.available_levels()
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def same(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


def group(rows: int, k: int, bits: int, size: int, seed: int, *, symmetric: bool = False) -> dict[str, Tensor]:
    """A group of k columns with codes that are not the best, in float64; whole blocks of rows share a quadratic."""
    generator = torch.Generator().manual_seed(seed)
    blocks = -(-rows // size)
    code = torch.randint(0, 2**bits, (rows, k), generator=generator).double()
    zero_point = torch.randint(0, 2**bits, (rows,), generator=generator).double()
    if symmetric:
        zero_point = torch.full((rows,), 2.0 ** (bits - 1), dtype=torch.float64)
    scale = (torch.rand(rows, generator=generator) + 0.5).bfloat16().double()
    x, y = (torch.randn(*s, generator=generator, dtype=torch.float64) for s in ((k, 2 * k), (blocks, size, 2 * size)))
    gram, curvature = x @ x.T / (2 * k), y @ y.mT / (2 * size)
    value = scale[:, None] * (code - zero_point[:, None])
    return {
        "code": code,
        "scale": scale,
        "zero_point": zero_point,
        "gram": gram,
        "curvature": curvature,
        "difference": value - torch.randn(rows, k, generator=generator, dtype=torch.float64) * 2**bits,
    }


def arguments(g: dict[str, Tensor], *, joint: bool, dtype: torch.dtype) -> tuple[list[Tensor], Any]:
    """What `refit_group_` is called with."""
    shape = g["code"] - g["zero_point"][:, None]
    turned = shape @ g["gram"]
    gradient, curvature, between = g["difference"] @ g["gram"], g["curvature"], None
    blocks, size, _ = curvature.shape
    if joint:

        def split(t: Tensor) -> Tensor:
            return torch.cat([t, t.new_zeros(blocks * size - len(t), t.shape[1])]).view(blocks, size, -1)

        gradient = (curvature @ split(gradient)).flatten(0, 1)[: len(shape)]
        between = curvature * (split(turned) @ split(shape).mT)
    pulls = torch.stack([(gradient * shape).sum(1), gradient.sum(1)])
    bends = torch.stack([(turned * shape).sum(1), turned.sum(1)])
    given = [g["scale"], g["zero_point"], pulls, bends, g["gram"].sum()]
    squares = None if between is None else (between.to(dtype), curvature.to(dtype))
    return [t.to(dtype).clone() for t in given], squares


@pytest.mark.parametrize("level", LEVELS)
@settings(max_examples=50, deadline=None)
@given(
    rows=st.integers(1, 70),
    bits=st.integers(1, 8),
    size=st.sampled_from([16, 32]),
    symmetric=st.booleans(),
    scale_dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 2**32),
    threads=st.integers(1, 3),
)
def test_levels_agree_with_torch(level, rows, bits, size, symmetric, scale_dtype, seed, threads):
    g = group(rows, 8, bits, size, seed, symmetric=symmetric)
    given_, joint = arguments(g, joint=True, dtype=torch.float32)
    grid = {"bits": bits, "symmetric": symmetric, "scale_dtype": scale_dtype, "joint": joint}
    expected = [t.clone() for t in given_]
    steps = kernels.refit_group_(*given_, **grid, threads=threads, level=level)
    same(steps, reference.refit_group_(*expected, **grid))
    for found, wanted in zip(given_, expected, strict=True):  # pulls and bends are as they were
        same(found, wanted)


def twin(g: dict[str, Tensor], bits: int, *, joint: bool, symmetric: bool) -> tuple[np.ndarray, np.ndarray]:
    """Scales and zero points, row after row, each by the whole quadratic as it is then."""
    code, scale, zero_point, gram = (g[n].numpy().copy() for n in ("code", "scale", "zero_point", "gram"))
    difference = g["difference"].numpy().copy()
    rows, size = len(code), g["curvature"].shape[1]
    between = np.zeros((rows, rows))
    for r in range(rows):
        for c in range(rows):
            if joint and r // size == c // size:
                between[r, c] = g["curvature"][r // size, r % size, c % size]
            elif r == c:
                between[r, c] = 1.0

    def loss() -> float:
        return float(np.sum(between * (difference @ gram @ difference.T)))

    for r in range(rows):
        for what in ("scale", "zero_point"):
            shape = code[r] - zero_point[r]
            direction = shape if what == "scale" else np.ones_like(shape)
            slope = between[r] @ difference @ gram @ direction
            bend = between[r, r] * (direction @ gram @ direction)
            before = loss(), scale[r], zero_point[r], difference[r].copy()
            if what == "scale":
                new = scale[r] - slope / bend
                if not scale[r] / 2 < new < 2 * scale[r]:
                    continue
                difference[r] += (new - scale[r]) * shape
                scale[r] = new
            elif not symmetric:
                new = np.clip(np.rint(zero_point[r] + slope / bend / scale[r]), 0, 2**bits - 1)
                difference[r] += scale[r] * (zero_point[r] - new)
                zero_point[r] = new
            if loss() >= before[0]:
                scale[r], zero_point[r], difference[r] = before[1:]
    return scale, zero_point


@pytest.mark.parametrize("joint", [False, True])
@pytest.mark.parametrize("symmetric", [False, True])
@settings(max_examples=15, deadline=None)
@given(rows=st.integers(1, 20), bits=st.integers(2, 5), seed=st.integers(0, 2**32))
def test_float64_numpy_twin(joint, symmetric, rows, bits, seed):
    g = group(rows, 6, bits, 16, seed, symmetric=symmetric)
    given_, squares = arguments(g, joint=joint, dtype=torch.float64)
    # scales are rounded to float32, the widest they are stored in
    kernels.refit_group_(*given_, bits=bits, symmetric=symmetric, scale_dtype=torch.float32, joint=squares)
    scale, zero_point = twin(g, bits, joint=joint, symmetric=symmetric)
    np.testing.assert_allclose(given_[0].numpy(), scale, rtol=1e-5)
    np.testing.assert_array_equal(given_[1].numpy(), zero_point)


def test_steps_are_what_values_gain():
    g = group(20, 6, 3, 16, 1)
    given_, squares = arguments(g, joint=True, dtype=torch.float32)
    shape = g["code"] - g["zero_point"][:, None]
    stretch, shift = kernels.refit_group_(
        *given_, bits=3, symmetric=False, scale_dtype=torch.bfloat16, joint=squares
    ).double()
    scale, zero_point = given_[0].double(), given_[1].double()
    assert torch.equal(scale.bfloat16().double(), scale)
    now = scale[:, None] * (g["code"] - zero_point[:, None])
    before = g["scale"][:, None] * shape
    torch.testing.assert_close(before + stretch[:, None] * shape + shift[:, None], now, rtol=1e-6, atol=1e-6)
    assert shift.any()


def test_a_group_that_never_fires_keeps_its_parameters():
    scale, zero_point = torch.full((3,), 0.5), torch.tensor([0.0, 1.0, 2.0])
    steps = kernels.refit_group_(
        scale, zero_point, torch.zeros(2, 3), torch.zeros(2, 3), torch.tensor(0.0), bits=2, symmetric=False,
        scale_dtype=torch.float16,
    )  # fmt: skip
    assert not steps.any()
    same(scale, torch.full((3,), 0.5))
    same(zero_point, torch.tensor([0.0, 1.0, 2.0]))


@pytest.mark.parametrize("joint", [False, True])
def test_rounding_errors_never_make_a_scale_infinite(joint):
    """A bend that is zero or below by rounding, under a slope that is not zero."""
    for bend in (0.0, -1e-12):
        scale, zero_point = torch.full((3,), 0.5), torch.ones(3)
        pulls, bends = torch.full((2, 3), -1e-9), torch.full((2, 3), bend)
        squares = (torch.zeros(1, 16, 16), torch.eye(16)[None]) if joint else None
        kernels.refit_group_(
            scale, zero_point, pulls, bends, torch.tensor(0.0), bits=2, symmetric=True, scale_dtype=torch.float32,
            joint=squares,
        )  # fmt: skip
        same(scale, torch.full((3,), 0.5))


def test_views_are_changed_in_place():
    g = group(10, 6, 3, 16, 2)
    given_, squares = arguments(g, joint=True, dtype=torch.float32)
    wide = torch.zeros(10, 3), torch.zeros(10, 3)
    wide[0][:, 1], wide[1][:, 1] = given_[0], given_[1]
    grid = {"bits": 3, "symmetric": False, "scale_dtype": torch.float32, "joint": squares}
    kernels.refit_group_(wide[0][:, 1], wide[1][:, 1], *given_[2:], **grid)
    kernels.refit_group_(*given_, **grid)
    same(wide[0][:, 1], given_[0])
    same(wide[1][:, 1], given_[1])
    assert not wide[0][:, [0, 2]].any()


def test_what_cannot_be_is_refused():
    g = group(20, 6, 3, 16, 3)
    given_, squares = arguments(g, joint=True, dtype=torch.float32)
    grid = {"bits": 3, "symmetric": False, "scale_dtype": torch.float32}
    with pytest.raises(ConfigError, match="bits is 9"):
        kernels.refit_group_(*given_, **{**grid, "bits": 9})
    with pytest.raises(ConfigError, match=r"scale_dtype is torch\.float64"):
        kernels.refit_group_(*given_, **{**grid, "scale_dtype": torch.float64})
    with pytest.raises(ConfigError, match="1 blocks of 16 are not those of 20 rows"):
        kernels.refit_group_(*given_, **grid, joint=(squares[0][:1], squares[1][:1]))
