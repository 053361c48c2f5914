"""Scales and zero points of groups: the plain range, and the one with the least error."""

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from mezzotint.errors import ConfigError
from mezzotint.kernels import _native, reference
from mezzotint.kernels._dispatch import (
    as_float32,
    as_native_values,
    check_bits,
    dropped_bits,
    group_count,
    takes_native,
    thread_count,
)

POWERS = (2.0, 2.5, 3.0)


def min_max_range(
    values: Float[Tensor, "rows n"],
    group_size: int,
    bits: int,
    symmetric: bool = False,
    *,
    scale_dtype: torch.dtype = torch.float32,
    threads: int | None = None,
    level: str | None = None,
) -> tuple[Float[Tensor, "rows groups"], Float[Tensor, "rows groups"]]:
    """The smallest range that clips nothing, rounded to the dtype scales are stored in.

    With ``lo = min(w, 0)``, ``hi = max(w, 0)`` and ``top = 2**bits - 1``:

        asymmetric:  scale = (hi - lo) / top,  zero_point = clamp(rint(-lo / scale), 0, top)
        symmetric:   scale = max(-lo / 2**(bits - 1), hi / (2**(bits - 1) - 1)),  zero_point = 2**(bits - 1)

    A scale is at least the smallest normal number of its dtype. A group of zeros gets scale 1 (and, asymmetric, zero
    point 0).

    Args:
        values: finite.
        group_size: columns per scale; the last group may be shorter.
        bits: 1 to 8; symmetric 2 to 8.
        symmetric: whether the zero point is fixed in the middle.
        scale_dtype: float32, float16 or bfloat16: what scales are rounded to.
        threads: how many to use; as many as torch uses if None. The result does not depend on it.
        level: instruction set to use, for tests; one of `available_levels()`.

    Returns:
        scale and zero_point, in float32 (float64 if the values are).

    Raises:
        ConfigError: an argument is out of its range.

    Example:
        >>> min_max_range(torch.tensor([[-1.0, 0.0, 2.0]]), 3, 2)
        (tensor([[1.]]), tensor([[1.]]))
    """
    _check(bits, symmetric, scale_dtype)
    group_count(values.shape[1], group_size)
    if takes_native(level, values):
        settings = _Settings(bits, 0, symmetric, 2.0, scale_dtype, thread_count(threads), level or "")
        return _search_native(values, group_size, None, torch.empty(2, 0), settings)
    lowest, highest = reference.min_max(values, group_size)
    return reference.full_range(lowest.clamp(max=0), highest.clamp(min=0), bits, symmetric, scale_dtype)


def search_range(
    values: Float[Tensor, "rows n"],
    group_size: int,
    bits: int,
    symmetric: bool = False,
    importance: Float[Tensor, " n"] | None = None,
    *,
    power: float = 2.0,
    scale_dtype: torch.dtype = torch.float32,
    steps: int = 80,
    shrink: float = 0.8,
    zero_point_span: int = 1,
    threads: int | None = None,
    level: str | None = None,
) -> tuple[Float[Tensor, "rows groups"], Float[Tensor, "rows groups"]]:
    """The range of each group with the least ``sum importance * |decode(encode(w)) - w|**power`` among candidates.

    With ``lo``, ``hi`` and ``top`` as in `min_max_range`, ``i = 0 ... steps - 1``, ``p = 1 - i * shrink / steps`` and
    ``r`` the rounding to ``scale_dtype``, candidates are, in this order (the first one wins a tie):

        asymmetric:  scale = r(p * (hi - lo) / top),
                     zero_point = clamp(rint(-lo * p / scale) + d, 0, top) for d = 0, -1, 1, -2, 2, ... span
        symmetric:   scale = r(p * m / 2**(bits - 1)), then r(p' * m / (2**(bits - 1) - 1/2)) with m = max|w| and
                     p' half a step below p; zero_point = 2**(bits - 1)

    The first symmetric form puts a negative extreme on code 0; the second, the usual ``2 * m / top``, is taken half a
    step off because at p = 1 the extreme sits exactly between two codes. The error is summed as
    ``scale**power * sum importance * |code - zero_point - w * (1 / scale)|**power`` in sixteen float accumulators and
    one tree.

    Args:
        values: finite.
        group_size: columns per scale; the last group may be shorter.
        bits: 1 to 8; symmetric 2 to 8.
        symmetric: whether the zero point is fixed in the middle.
        importance: weight of each column, not negative (the diagonal of a Hessian); all equal if None.
        power: of the errors: 2, 2.5 or 3; the larger, the less is clipped.
        scale_dtype: float32, float16 or bfloat16: what scales are rounded to.
        steps: number of ranges; 1 leaves the full one.
        shrink: the part of the full range that the ranges go down by, less than 1.
        zero_point_span: how far from the nearest zero point to look, asymmetric only.
        threads: how many to use; as many as torch uses if None. The result does not depend on it.
        level: instruction set to use, for tests; one of `available_levels()`.

    Returns:
        scale and zero_point, in float32 (float64 if the values are).

    Raises:
        ConfigError: an argument is out of its range.

    Example:
        >>> search_range(torch.tensor([[-1.0, 0.0, 2.0]]), 3, 2)
        (tensor([[1.]]), tensor([[1.]]))
    """
    _check(bits, symmetric, scale_dtype)
    if steps < 1 or not 0 <= shrink < 1 or zero_point_span < 0:
        given = f"steps is {steps}, shrink {shrink}, zero_point_span {zero_point_span}"
        raise ConfigError(f"{given}; use at least 1, [0, 1) and at least 0.")
    if power not in POWERS:
        raise ConfigError(f"power is {power}; use 2, 2.5 or 3.")
    n = values.shape[1]
    group_count(n, group_size)
    if importance is not None and importance.shape[0] != n:
        raise ConfigError(f"importance has {importance.shape[0]} values; there are {n} columns.")
    at = torch.arange(steps, dtype=torch.float64)
    fractions = 1 - torch.stack([at, at + 0.5]) * (shrink / steps)  # [2, steps]: p and, half a step below, p'
    if not takes_native(level, values, importance):
        search = reference.RangeSearch(
            bits=bits, symmetric=symmetric, scale_dtype=scale_dtype, span=zero_point_span, power=power
        )
        return search.run(values, group_size, importance, fractions)
    settings = _Settings(bits, zero_point_span, symmetric, power, scale_dtype, thread_count(threads), level or "")
    return _search_native(values, group_size, importance, fractions, settings)


class _Settings(NamedTuple):
    bits: int
    span: int
    symmetric: bool
    power: float
    scale_dtype: torch.dtype
    threads: int
    level: str


def _search_native(
    values: Tensor, group_size: int, importance: Tensor | None, fractions: Tensor, settings: _Settings
) -> tuple[Float[Tensor, "rows groups"], Float[Tensor, "rows groups"]]:
    shape = values.shape[0], group_count(values.shape[1], group_size)
    scale, zero_point = torch.empty(shape), torch.empty(shape)
    weight = None if importance is None else as_float32(importance)
    bits, span, symmetric, power, scale_dtype, threads, level = settings
    arrays = as_native_values(values), weight, as_float32(fractions), scale, zero_point
    _native.search(*arrays, group_size, bits, span, symmetric, power, dropped_bits(scale_dtype), threads, level)
    return scale, zero_point


def _check(bits: int, symmetric: bool, scale_dtype: torch.dtype) -> None:
    check_bits(bits, 2 if symmetric else 1)
    dropped_bits(scale_dtype)
