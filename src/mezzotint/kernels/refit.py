"""The sequential part of refitting scales and zero points: one group of columns."""

import torch
from jaxtyping import Float
from torch import Tensor

from mezzotint.core.curvature import Squares
from mezzotint.kernels import _native, reference
from mezzotint.kernels._dispatch import as_float32, check_bits, check_blocks, dropped_bits, takes_native, thread_count


def refit_group_(
    scale: Float[Tensor, " rows"],
    zero_point: Float[Tensor, " rows"],
    pulls: Float[Tensor, "2 rows"],
    bends: Float[Tensor, "2 rows"],
    flat: Float[Tensor, ""],
    *,
    bits: int,
    symmetric: bool,
    scale_dtype: torch.dtype,
    joint: Squares = None,
    threads: int | None = None,
    level: str | None = None,
) -> Float[Tensor, "2 rows"]:
    """Moves each row's scale of a group of columns to the best for its codes, then its zero point. Modifies both.

    With ``c`` the codes of a row less its zero point, ``G`` the group's block of the Gram matrix and ``r`` the gradient
    of the quadratic, scale and zero point become

        s <- stored(s - r c' / c G c'),   z <- z + round(r' 1' / 1 G 1' / s)

    where the quadratic falls, ``r'`` the gradient after the first step. The zero point of a symmetric grid stays. A
    scale that would halve or double stays too: where inputs are equal and codes cancel, ``c G c'`` is rounding noise,
    and a quotient by it means nothing.

    With `joint` the quadratic ``tr(A V G V') - 2 tr(A C V')`` couples the rows of a block, which move in turn: bends
    count ``A[i, i]`` times, and the pulls of the rows behind follow every step.

    Args:
        scale: float32 or float64, positive.
        zero_point: whole numbers.
        pulls: ``r c'`` and ``r 1'``; with `joint` of the gradient ``A (V G - C)``.
        bends: ``c G c'`` and ``c G 1'`` of each row.
        flat: ``1 G 1'``.
        bits: 1 to 8.
        symmetric: zero points are in the middle.
        scale_dtype: float32, float16 or bfloat16: what scales are rounded to.
        joint: ``A[i, l] (c_i G c_l')`` and ``A``, for every block of rows; the last one may have fewer. On the CPU,
            whatever the device: rows wait for each other.
        threads: how many to use; as many as torch uses if None. The result does not depend on it.
        level: instruction set to use, for tests; one of `available_levels()`.

    Returns:
        what values gain per code less zero point, and beside.

    Raises:
        ConfigError: a setting is out of range, or there is another number of blocks.

    Example:
        >>> scale, zero_point = torch.tensor([1.0]), torch.tensor([2.0])
        >>> pulls, bends, flat = torch.tensor([[-4.0], [0.0]]), torch.tensor([[8.0], [0.0]]), torch.tensor(2.0)
        >>> refit_group_(scale, zero_point, pulls, bends, flat, bits=2, symmetric=False, scale_dtype=torch.float32)
        tensor([[0.5000],
                [0.0000]])
        >>> scale
        tensor([1.5000])
    """
    check_bits(bits)
    dropped = dropped_bits(scale_dtype)
    grid = {"bits": bits, "symmetric": symmetric, "scale_dtype": scale_dtype}
    if joint is None:
        return reference.refit_group_(scale, zero_point, pulls, bends, flat, **grid)
    for squares in joint:
        check_blocks(squares, len(scale))
    if not scale.is_cpu:
        here = scale.cpu(), zero_point.cpu()
        beside, squares = (pulls.cpu(), bends.cpu(), flat.cpu()), (joint[0].cpu(), joint[1].cpu())
        steps = refit_group_(*here, *beside, joint=squares, threads=threads, level=level, **grid)
        scale.copy_(here[0])
        zero_point.copy_(here[1])
        return steps.to(scale.device)
    if not takes_native(level, scale, zero_point, pulls, bends, *joint):
        return reference.refit_group_(scale, zero_point, pulls, bends, flat, joint=joint, **grid)
    own = as_float32(scale), as_float32(zero_point)
    steps = torch.empty(2, len(scale))
    arrays = as_float32(pulls).clone(), as_float32(bends)
    squares = as_float32(joint[0]).flatten(0, 1), as_float32(joint[1]).flatten(0, 1)
    settings = bits, symmetric, dropped, thread_count(threads), level or ""
    _native.refit(*own, *arrays, float(flat), *squares, steps, *settings)
    scale.copy_(own[0])
    zero_point.copy_(own[1])
    return steps
