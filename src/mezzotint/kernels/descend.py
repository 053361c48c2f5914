"""The sequential part of coordinate descent over codes: one block of columns."""

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from mezzotint.errors import ConfigError
from mezzotint.kernels import _native, reference
from mezzotint.kernels._dispatch import as_float32, as_squares, check_bits, check_blocks, takes_native, thread_count


def descend_block_(
    value: Float[Tensor, "rows k"],
    gradient: Float[Tensor, "rows k"],
    gram: Float[Tensor, "k k"],
    scale: Float[Tensor, "rows k"],
    zero_point: Float[Tensor, "rows k"],
    *,
    bits: int,
    curvature: Float[Tensor, "blocks size size"] | None = None,
    threads: int | None = None,
    level: str | None = None,
) -> UInt8[Tensor, "rows k"]:
    """Moves each column of a block to its best code in turn, the others as they are by then. Modifies `value`.

    For j = 0 ... k - 1, with ``G`` the block of the Gram matrix and ``r = V G - C`` the gradient of the quadratic:

        code[:, j] = encode(value[:, j] - r[:, j] / G[j, j])
        step = decode(code[:, j]) - value[:, j];  r[:, j + 1:] += step * G[j, j + 1:];  value[:, j] += step

    A column whose input never fires (``G[j, j] = 0``) keeps its code.

    With `curvature` A the quadratic is ``tr(A V G V') - 2 tr(A C V')`` and couples the rows of a block, which move in
    turn: row i by its gradient over ``A[i, i] G[j, j]``, and the gradients of the others in its block follow.

    Args:
        value: float32 or float64, what the present codes decode to; afterwards what the new ones do.
        gradient: at the present values of the whole matrix; with `curvature` ``A (V G - C)``.
        gram: symmetric.
        scale: positive, of each element.
        zero_point: whole numbers, of each element.
        bits: 1 to 8.
        curvature: symmetric squares with a positive diagonal, one for every block of rows; the last block may have
            fewer rows. On the CPU, whatever the device of `value`: rows wait for each other.
        threads: how many to use; as many as torch uses if None. The result does not depend on it.
        level: instruction set to use, for tests; one of `available_levels()`.

    Returns:
        code.

    Raises:
        ConfigError: bits is out of range, value is of another dtype, or there is another number of blocks.

    Example:
        >>> value = torch.tensor([[1.0, 0.0]])
        >>> gram = torch.tensor([[1.0, 0.5], [0.5, 1.0]])
        >>> descend_block_(value, torch.tensor([[0.25, -0.75]]), gram, torch.ones(1, 2), torch.zeros(1, 2), bits=2)
        tensor([[1, 1]], dtype=torch.uint8)
        >>> value
        tensor([[1., 1.]])
    """
    check_bits(bits)
    if value.dtype not in (torch.float32, torch.float64):
        raise ConfigError(f"value is {value.dtype}; use torch.float32 or torch.float64.")
    if curvature is not None:
        check_blocks(curvature, len(value))
        if not value.is_cpu:
            here = value.cpu()
            beside = gradient.cpu(), gram.cpu(), scale.cpu(), zero_point.cpu()
            code = descend_block_(here, *beside, bits=bits, curvature=curvature.cpu(), threads=threads, level=level)
            value.copy_(here)
            return code.to(value.device)
    if not takes_native(level, value, gradient, gram, scale, zero_point):
        return reference.descend_block_(value, gradient, gram, scale, zero_point, bits=bits, curvature=curvature)
    block = as_float32(value)
    code = torch.empty(value.shape, dtype=torch.uint8)
    arrays = as_float32(gradient), as_float32(gram), as_float32(scale), as_float32(zero_point)
    _native.descend(block, *arrays, code, as_squares(curvature), bits, thread_count(threads), level or "")
    if block.data_ptr() != value.data_ptr():
        value.copy_(block)
    return code
