"""Products of a few rows with packed weights, which are decoded between the load and the multiplication.

For batches of one to about eight rows, as in generation; each further row costs little, but from some tens of rows on
decoding the weights once and multiplying dense matrices is faster.

On the CPU the inputs are rounded to 16-bit integers, ``x ~ unit * q`` with ``unit = max|x| / 32639`` of their row, so
that products with codes are sums of integers and all instruction sets give the same bits. The result differs from the
exact product by less than ``max|x| * sum|w| / 64500`` plus float32 rounding. On other devices, and in float64, the
weights are decoded and multiplied as they are.
"""

import torch
from jaxtyping import Float, Int32
from torch import Tensor

from mezzotint.errors import ConfigError
from mezzotint.kernels import _native
from mezzotint.kernels._dispatch import (
    as_float32,
    check_bits,
    check_group_shape,
    group_count,
    takes_native,
    thread_count,
)
from mezzotint.kernels.affine import affine_decode
from mezzotint.kernels.packing import unpack_bits
from mezzotint.kernels.trellis import from_tiles, trellis_decode

_LEVELS = tuple(_native.product_levels())
_LOWEST_BITS = 2


def product_levels() -> tuple[str, ...]:
    """Instruction sets of the products that this processor can run, slowest first: ``portable``, ``avx2``, ``vnni``.

    Example:
        >>> product_levels()[0]
        'portable'
    """
    return _LEVELS


def trellis_matmul(
    x: Float[Tensor, "batch in"],
    packed: Int32[Tensor, "in_tiles out_tiles words"],
    *,
    states: int,
    threads: int | None = None,
    level: str | None = None,
) -> Float[Tensor, "batch out"]:
    """``x @ W.T`` with the unscaled code values of a trellis, in float32 (float64 if the inputs are).

    A tile of 16x16 weights is a circular string of ``32 * words`` bits, the highest bit of each word first. The state
    of element ``e`` is the ``states`` bits that end at bit ``floor((e + 1) * words / 8)``, and its value

        (sum of the bytes of (state * 0x83DCD12D mod 2^32) - 510) / 147.7

    (QTIP, arXiv 2406.11235, a computed code; fractional rates as in Q-Palette, arXiv 2509.20214). Element
    ``e = 8 t + m`` is the weight of input ``2 (t % 4) + (0, 1, 8, 9)[m % 4]`` and output ``t // 4 + 8 (m // 4)``.

    Args:
        x: finite; a row with anything else gives NaN.
        packed: tiles of 8 to 48 words, an eighth of a bit per weight each.
        states: bits of a state, 12 or 16.
        threads: how many to use; as many as torch uses if None. The result does not depend on it.
        level: instruction set to use, for tests; one of `product_levels()`.

    Raises:
        ConfigError: a shape or the number of states is wrong.

    Example:
        >>> packed = torch.zeros(1, 1, 16, dtype=torch.int32)  # every state is 0, so every value -510 / 147.7
        >>> trellis_matmul(torch.ones(1, 16), packed, states=16)[0, :2]
        tensor([-55.2471, -55.2471])
    """
    (batch, n), (in_tiles, out_tiles, words) = x.shape, packed.shape
    _check_words("packed", packed)
    if not 8 <= words <= 48:
        raise ConfigError(f"packed has {words} words a tile; use 8 to 48.")
    if states not in (12, 16):
        raise ConfigError(f"states is {states}; use 12 or 16.")
    if n != 16 * in_tiles:
        raise ConfigError(f"x has {n} columns; {in_tiles} rows of tiles need {16 * in_tiles}.")
    if not takes_native(level, x, packed, levels=_LEVELS):
        dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
        tiles = trellis_decode(packed.flatten(0, 1), states=states)
        return x.to(dtype) @ from_tiles(tiles.view(in_tiles, out_tiles, 256)).to(dtype).t()
    x, packed, out = as_float32(x), packed.contiguous(), torch.empty(batch, 16 * out_tiles)
    _native.trellis_matmul(
        x.data_ptr(), packed.data_ptr(), out.data_ptr(), batch, in_tiles, out_tiles, words, states,
        thread_count(threads), level or "",
    )  # fmt: skip
    return out


def _check_words(name: str, words: Tensor) -> None:
    if words.dtype != torch.int32:
        raise ConfigError(f"{name} is of {words.dtype}; packed weights are torch.int32.")


def packed_matmul(
    x: Float[Tensor, "batch n"],
    words: Int32[Tensor, "out words"],
    scale: Float[Tensor, "out groups"],
    zero_point: Float[Tensor, "out groups"],
    group_size: int,
    *,
    bits: int,
    threads: int | None = None,
    level: str | None = None,
) -> Float[Tensor, "batch out"]:
    """``x @ W.T`` with ``W = scale * (code - zero_point)``, in float32 (float64 if the inputs or scales are).

    Column ``j`` belongs to group ``j // group_size``; the last group may be shorter. Groups of a multiple of 32
    columns, or one group per row, take the fast way.

    Args:
        x: finite; a row with anything else gives NaN.
        words: codes as `pack_bits` writes them.
        scale: of each group.
        zero_point: of each group, in units of codes.
        group_size: columns per scale.
        bits: 2 to 8.
        threads: how many to use; as many as torch uses if None. The result does not depend on it.
        level: instruction set to use, for tests; one of `product_levels()`.

    Raises:
        ConfigError: bits, group_size or a shape is wrong.

    Example:
        >>> one, words = torch.ones(1, 1), torch.tensor([[801]], dtype=torch.int32)  # codes 1, 2, 3
        >>> packed_matmul(torch.tensor([[1.0, 0.0, 2.0]]), words, one, one, 3, bits=4)
        tensor([[4.]])
    """
    check_bits(bits, _LOWEST_BITS)
    _check_words("words", words)
    (batch, n), (rows, width) = x.shape, words.shape
    groups = group_count(n, group_size)
    check_group_shape("scale", scale, rows, groups)
    check_group_shape("zero_point", zero_point, rows, groups)
    needed = -(-n * bits // 32)
    if width != needed:
        raise ConfigError(f"words has {width} words a row; {n} codes of {bits} bits take {needed}.")
    if not takes_native(level, x, words, scale, zero_point, levels=_LEVELS):
        wide = torch.float64 in (x.dtype, scale.dtype, zero_point.dtype)
        dtype = torch.float64 if wide else torch.float32
        weight = affine_decode(unpack_bits(words, bits, n), scale.to(dtype), zero_point.to(dtype), group_size)
        return x.to(dtype) @ weight.t()
    x, words, out = as_float32(x), words.contiguous(), torch.empty(batch, rows)
    scale, zero_point = as_float32(scale), as_float32(zero_point)
    _native.packed_matmul(
        x.data_ptr(), words.data_ptr(), scale.data_ptr(), zero_point.data_ptr(), out.data_ptr(), batch, n, rows,
        group_size, bits, thread_count(threads), level or "",
    )  # fmt: skip
    return out
