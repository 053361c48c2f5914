"""Products of a few rows with packed weights, which are decoded between the load and the multiplication.

For batches of one to about eight rows, as in generation; each further row costs little, but from some tens of rows on
decoding the weights once and multiplying dense matrices is faster.

On the CPU the inputs are rounded to 16-bit integers, ``x ~ unit * q`` with ``unit = max|x| / 32639`` of their row, so
that products with codes are sums of integers and all instruction sets give the same bits. The result differs from the
exact product by less than ``max|x| * sum|w| / 64500`` plus float32 rounding. On other devices, and in float64, the
weights are decoded and multiplied as they are.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int16, Int32
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
_LOWEST_BITS, _MOST_TABLE_BITS = 2, 12
_TOP_LEVEL = 32767


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


def table_matmul(
    x: Float[Tensor, "batch n"],
    words: Int32[Tensor, "out words"],
    scale: Float[Tensor, "out groups"],
    table: "LevelTable",
    group_size: int,
    *,
    threads: int | None = None,
    level: str | None = None,
) -> Float[Tensor, "batch out"]:
    """``x @ W.T`` with ``W = scale * table[code]``, in float32 (float64 if the inputs or scales are).

    A code stands for ``table.width`` neighbouring columns. Groups as in `packed_matmul`; codes of more than 8 bits take
    the slow way, as those of groups that are no multiples of 32 columns.

    Args:
        x: finite; a row with anything else gives NaN.
        words: codes of a row as one little-endian stream: code ``i`` takes bits ``[i * bits, (i + 1) * bits)``.
        scale: of each group.
        table: what codes stand for.
        group_size: columns per scale.
        threads: how many to use; as many as torch uses if None. The result does not depend on it.
        level: instruction set to use, for tests; one of `product_levels()`.

    Raises:
        ConfigError: group_size or a shape is wrong.

    Example:
        >>> one, words = torch.ones(1, 1), torch.tensor([[0b0110]], dtype=torch.int32)  # codes 2, 1
        >>> values = torch.tensor([[-1.0], [0.0], [0.25], [1.0]])
        >>> table_matmul(torch.tensor([[4.0, 1.0]]), words, one, LevelTable.of(values), 2)
        tensor([[1.0000]])
    """
    (batch, n), (rows, width) = x.shape, words.shape
    _check_words("words", words)
    if n % table.width:
        raise ConfigError(f"x has {n} columns; a code stands for {table.width} of them together.")
    check_group_shape("scale", scale, rows, group_count(n, group_size))
    needed = -(-n // table.width * table.bits // 32)
    if width != needed:
        raise ConfigError(f"words has {width} words a row; codes of {table.bits} bits for {n} columns take {needed}.")
    if not takes_native(level, x, words, scale, levels=_LEVELS):
        dtype = torch.float64 if torch.float64 in (x.dtype, scale.dtype) else torch.float32
        values = table.decode(words, n).to(dtype)
        wide = scale.to(dtype).repeat_interleave(group_size, dim=1)[:, :n]
        return x.to(dtype) @ (values * wide).t()
    x, words, out = as_float32(x), words.contiguous(), torch.empty(batch, rows)
    scale = as_float32(scale)
    _native.table_matmul(
        x.data_ptr(), words.data_ptr(), scale.data_ptr(), table.levels.data_ptr(), table.step, out.data_ptr(), batch, n,
        rows, group_size, table.width, table.bits, thread_count(threads), level or "",
    )  # fmt: skip
    return out


@dataclass(frozen=True, slots=True, eq=False)
class LevelTable:
    """What codes stand for, as whole multiples of one step, ``levels * step``: 16 bits of the largest value.

    Attributes:
        levels: on the CPU.
        bits: of a code, 2 to 12.
    """

    levels: Int16[Tensor, "entries width"]
    step: float
    bits: int

    @classmethod
    def of(cls, values: Float[Tensor, "entries width"]) -> "LevelTable":
        """The table nearest to these values, a power of two of them, for one or two columns.

        Raises:
            ConfigError: there is another number of them.
        """
        entries, width = values.shape
        bits = entries.bit_length() - 1
        if entries != 2**bits or not _LOWEST_BITS <= bits <= _MOST_TABLE_BITS or width not in (1, 2):
            raise ConfigError(
                f"the table has {entries} entries of {width} values; use 4 to 4096, a power of two, of 1 or 2."
            )
        wide = values.detach().cpu().double()
        step = float(wide.abs().max()) / _TOP_LEVEL or 1.0
        return cls(levels=(wide / step).round().to(torch.int16).contiguous(), step=step, bits=bits)

    @property
    def width(self) -> int:
        """Columns that a code stands for."""
        return self.levels.shape[1]

    def decode(self, words: Int32[Tensor, "out words"], n: int) -> Float[Tensor, "out {n}"]:
        """The values of a matrix's codes, in float64."""
        part = max(p for p in range(1, 9) if self.bits % p == 0)
        pieces = unpack_bits(words, part, n // self.width * self.bits // part).long()
        shifts = torch.arange(0, self.bits, part, device=words.device)
        code = (pieces.unflatten(1, (n // self.width, self.bits // part)) << shifts).sum(2)
        return (self.levels.to(words.device).double() * self.step)[code].flatten(1)


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
