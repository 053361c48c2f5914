"""Affine codes of groups of columns, ``value = scale * (code - zero_point)``, and the extremes of groups."""

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from mezzotint.kernels import _native, reference
from mezzotint.kernels._dispatch import (
    as_float32,
    as_native_values,
    check_bits,
    check_group_shape,
    group_count,
    takes_native,
    thread_count,
)


def affine_encode(
    values: Float[Tensor, "rows n"],
    scale: Float[Tensor, "rows groups"],
    zero_point: Float[Tensor, "rows groups"],
    group_size: int,
    bits: int,
    *,
    threads: int | None = None,
    level: str | None = None,
) -> UInt8[Tensor, "rows n"]:
    """Nearest codes: ``clamp(rint(value / scale) + zero_point, 0, 2**bits - 1)``.

    A true division, and halves go to the even neighbour. Column ``j`` belongs to group ``j // group_size``; the last
    group may be shorter. 16-bit values are widened one by one, so that no float32 copy is made.

    Args:
        values: finite.
        scale: positive.
        zero_point: whole numbers.
        group_size: columns per scale.
        bits: 1 to 8.
        threads: how many to use; as many as torch uses if None. The result does not depend on it.
        level: instruction set to use, for tests; one of `available_levels()`.

    Raises:
        ConfigError: bits, group_size or a shape is wrong.

    Example:
        >>> affine_encode(torch.tensor([[-0.5, 0.25, 9.0]]), torch.tensor([[0.5]]), torch.tensor([[1.0]]), 3, 2)
        tensor([[0, 1, 3]], dtype=torch.uint8)
    """
    check_bits(bits)
    rows, n = values.shape
    groups = group_count(n, group_size)
    check_group_shape("scale", scale, rows, groups)
    check_group_shape("zero_point", zero_point, rows, groups)
    if not takes_native(level, values, scale, zero_point):
        return reference.affine_encode(values, scale, zero_point, group_size, bits)
    code = torch.empty(rows, n, dtype=torch.uint8)
    arrays = as_native_values(values), as_float32(scale), as_float32(zero_point), code
    _native.encode(*arrays, group_size, bits, thread_count(threads), level or "")
    return code


def affine_decode(
    code: UInt8[Tensor, "rows n"],
    scale: Float[Tensor, "rows groups"],
    zero_point: Float[Tensor, "rows groups"],
    group_size: int,
    *,
    threads: int | None = None,
    level: str | None = None,
) -> Float[Tensor, "rows n"]:
    """What codes stand for: ``scale * (code - zero_point)``, in float32 (float64 if the scales are).

    Args:
        code: any bytes.
        scale: of each group.
        zero_point: of each group, in units of codes.
        group_size: columns per scale.
        threads: how many to use; as many as torch uses if None. The result does not depend on it.
        level: instruction set to use, for tests; one of `available_levels()`.

    Raises:
        ConfigError: group_size or a shape is wrong.

    Example:
        >>> affine_decode(torch.tensor([[0, 1, 3]], dtype=torch.uint8), torch.tensor([[0.5]]), torch.tensor([[1.0]]), 3)
        tensor([[-0.5000,  0.0000,  1.0000]])
    """
    rows, n = code.shape
    groups = group_count(n, group_size)
    check_group_shape("scale", scale, rows, groups)
    check_group_shape("zero_point", zero_point, rows, groups)
    if not takes_native(level, code, scale, zero_point):
        return reference.affine_decode(code, scale, zero_point, group_size)
    decoded = torch.empty(rows, n)
    arrays = code.contiguous(), as_float32(scale), as_float32(zero_point), decoded
    _native.decode(*arrays, group_size, thread_count(threads), level or "")
    return decoded


def min_max(
    values: Float[Tensor, "rows n"], group_size: int, *, threads: int | None = None, level: str | None = None
) -> tuple[Float[Tensor, "rows groups"], Float[Tensor, "rows groups"]]:
    """Smallest and largest value of each group, in float32 (float64 if the values are).

    Args:
        values: finite.
        group_size: columns per group; the last group may be shorter.
        threads: how many to use; as many as torch uses if None. The result does not depend on it.
        level: instruction set to use, for tests; one of `available_levels()`.

    Raises:
        ConfigError: group_size is not positive.

    Example:
        >>> min_max(torch.tensor([[1.0, -2.0, 3.0]]), 2)
        (tensor([[-2.,  3.]]), tensor([[1., 3.]]))
    """
    rows, n = values.shape
    groups = group_count(n, group_size)
    if not takes_native(level, values):
        return reference.min_max(values, group_size)
    lowest, highest = torch.empty(rows, groups), torch.empty(rows, groups)
    _native.min_max(as_native_values(values), lowest, highest, group_size, thread_count(threads), level or "")
    return lowest, highest
