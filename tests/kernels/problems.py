"""Matrices with the cases that break kernels: ragged groups, one row, zeros, outliers, exact halves."""

from dataclasses import dataclass

import torch
from hypothesis import strategies as st
from torch import Tensor


@dataclass(frozen=True)
class Problem:
    values: Tensor  # [rows, n]
    importance: Tensor  # [n]
    group_size: int
    bits: int

    @property
    def groups(self) -> int:
        return -(-self.values.shape[1] // self.group_size)


@st.composite
def problems(draw, dtype=torch.float32, least_bits=1):
    """A problem of up to 20 x 150; `dtype` may be a list to choose from."""
    rows, n = draw(st.integers(1, 20)), draw(st.integers(1, 150))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    magnitude = 2.0 ** draw(st.integers(-30, 12))
    values = torch.randn(rows, n, generator=generator, dtype=torch.float64) * magnitude
    kind = draw(st.sampled_from(["plain", "zero row", "zeros", "positive", "outlier", "halves"]))
    if kind == "zero row":
        values[0] = 0
    elif kind == "zeros":
        values.zero_()
    elif kind == "positive":
        values.abs_()
    elif kind == "outlier":
        values[-1, -1] = 50 * magnitude
    elif kind == "halves":
        values = torch.round(values / magnitude * 4) / 2 * magnitude
    dtype = draw(st.sampled_from(dtype)) if isinstance(dtype, list) else dtype
    return Problem(
        values=values.to(dtype),
        importance=torch.rand(n, generator=generator) ** 4,
        group_size=draw(st.sampled_from([1, 3, 16, 32, 40, 64, 1000])),
        bits=draw(st.integers(least_bits, 8)),
    )
