"""Orthonormal Hadamard matrices on blocks of columns."""

import torch
from jaxtyping import Float
from torch import Tensor

from mezzotint.errors import ConfigError
from mezzotint.kernels import _native, reference
from mezzotint.kernels._dispatch import as_native_values, takes_native, thread_count


def hadamard_block(width: int, limit: int = 128) -> int:
    """The largest power of two that divides ``width`` and is at most ``limit``: the block of a matrix of that width.

    Args:
        width: columns, at least 1.
        limit: at least 1.

    Raises:
        ConfigError: either is less than 1.

    Example:
        >>> [hadamard_block(width) for width in (4096, 576, 172, 7)]
        [128, 64, 4, 1]
    """
    if min(width, limit) < 1:
        raise ConfigError(f"width is {width} and limit {limit}; both must be at least 1.")
    return min(width & -width, 1 << (limit.bit_length() - 1))


def hadamard(
    values: Float[Tensor, "rows n"], block: int, *, threads: int | None = None, level: str | None = None
) -> Float[Tensor, "rows n"]:
    """Every run of ``block`` columns times ``H / sqrt(block)``, in float32 (float64 if the values are).

    ``H`` is Sylvester's: ``H_1 = [1]``, ``H_2b = [[H_b, H_b], [H_b, -H_b]]``, symmetric, and ``H / sqrt(block)`` is its
    own inverse. Computed as ``log2(block)`` rounds of sums and differences, of stride 1, 2, 4, ..., and one
    multiplication by the rounded ``1 / sqrt(block)``. 16-bit values are widened one by one.

    Args:
        values: finite.
        block: a power of two that divides the columns; 1 copies.
        threads: how many to use; as many as torch uses if None. The result does not depend on it.
        level: instruction set to use, for tests; one of `available_levels()`.

    Raises:
        ConfigError: block is no power of two, or does not divide the columns.

    Example:
        >>> hadamard(torch.tensor([[1.0, 2.0, 3.0, 4.0]]), 4)
        tensor([[ 5., -1., -2.,  0.]])
    """
    n = values.shape[1]
    if block < 1 or block & (block - 1) or n % block:
        raise ConfigError(f"block is {block}; use a power of two that divides the {n} columns.")
    if not takes_native(level, values):
        return reference.hadamard(values, block)
    out = torch.empty(values.shape)
    _native.hadamard(as_native_values(values), out, block, thread_count(threads), level or "")
    return out
