"""The sequential part of GPTQ: one block of columns."""

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from mezzotint.errors import ConfigError
from mezzotint.kernels import _native, reference
from mezzotint.kernels._dispatch import as_float32, as_squares, check_bits, check_blocks, takes_native, thread_count


def gptq_block_(
    work: Float[Tensor, "rows k"],
    factor: Float[Tensor, "k k"],
    scale: Float[Tensor, "rows k"],
    zero_point: Float[Tensor, "rows k"],
    bits: int,
    *,
    taken: Float[Tensor, "blocks size size"] | None = None,
    threads: int | None = None,
    level: str | None = None,
) -> tuple[UInt8[Tensor, "rows k"], Float[Tensor, "rows k"]]:
    """Rounds the columns of a block one after another, each error handed on to the columns behind it. Modifies `work`.

    For j = 0 ... k - 1 (GPTQ, Alg. 1, inside a block; ``U`` is `factor`):

        q = decode(encode(work[:, j]));  error[:, j] = (work[:, j] - q) / U[j, j]
        work[:, j + 1:] -= error[:, j] * U[j, j + 1:]

    Columns are independent of groups here, since scale and zero point come per column: any order of columns works.

    With `taken` the rows of a block also make up for each other (YAQA, arXiv 2505.22988): row l is rounded from

        work[l, j] - sum over i < l of taken[., i, l] (q[i] - work[i, j])

    and its error is still that of ``work[l, j]``, which later columns make up for.

    Args:
        work: float32 or float64; afterwards each column holds its values at the moment of rounding.
        factor: upper triangular ``U`` with ``inv(H) = U.T @ U``, or a diagonal block of it; what is below the diagonal
            is not read.
        scale: positive, of each element.
        zero_point: whole numbers, of each element.
        bits: 1 to 8.
        taken: ``[., i, l]`` is what row l of a block takes of the error of row i, zero for ``l <= i``; the last block
            may have fewer rows. On the CPU, whatever the device of `work`: rows wait for each other.
        threads: how many to use; as many as torch uses if None. The result does not depend on it.
        level: instruction set to use, for tests; one of `available_levels()`.

    Returns:
        code and error; the rest of the matrix is due ``-= error @ U[block, rest]``.

    Raises:
        ConfigError: bits is out of range, work is of another dtype, or there is another number of blocks.

    Example:
        >>> work = torch.tensor([[0.75, 0.25]])
        >>> gptq_block_(work, torch.tensor([[1.0, 1.0], [0.0, 1.0]]), torch.ones(1, 2), torch.ones(1, 2), 2)[0]
        tensor([[2, 1]], dtype=torch.uint8)
        >>> work
        tensor([[0.7500, 0.5000]])
    """
    check_bits(bits)
    if work.dtype not in (torch.float32, torch.float64):
        raise ConfigError(f"work is {work.dtype}; use torch.float32 or torch.float64.")
    if taken is not None:
        check_blocks(taken, len(work))
        if not work.is_cpu:
            here = work.cpu()
            beside = factor.cpu(), scale.cpu(), zero_point.cpu()
            code, error = gptq_block_(here, *beside, bits, taken=taken.cpu(), threads=threads, level=level)
            work.copy_(here)
            return code.to(work.device), error.to(work.device)
    if not takes_native(level, work, factor, scale, zero_point):
        return reference.gptq_block_(work, factor, scale, zero_point, bits, taken=taken)
    block = as_float32(work)
    code, error = torch.empty(work.shape, dtype=torch.uint8), torch.empty(work.shape)
    arrays = block, as_float32(factor), as_float32(scale), as_float32(zero_point), code, error
    _native.gptq(*arrays, as_squares(taken), bits, thread_count(threads), level or "")
    if block.data_ptr() != work.data_ptr():
        work.copy_(block)
    return code, error
