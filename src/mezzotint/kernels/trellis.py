"""Trellis-coded tiles of 256 weights at any multiple of 1/8 bit, and their place in a matrix."""

import torch
from jaxtyping import Float, Int32, Int64
from torch import Tensor

from mezzotint.errors import ConfigError
from mezzotint.kernels import _native, reference_trellis
from mezzotint.kernels._dispatch import as_float32, takes_native, thread_count

_TILE = reference_trellis.TILE
_SIDE = 16
_STATES = (12, 16)
_RATES = (8, 48)


def trellis_encode(
    values: Float[Tensor, "tiles n"],
    rate: int,
    *,
    states: int,
    window: int = 32,
    threads: int | None = None,
    level: str | None = None,
) -> Int32[Tensor, "tiles {rate}"]:
    """Codes of tiles of weights with nearly the least squared error: a tail-biting bitshift trellis (QTIP, 2406.11235).

    Element ``i`` of a tile adds ``k_i = floor((i + 1) * rate / 8) - floor(i * rate / 8)`` bits to a circular string of
    ``32 * rate`` bits, and stands for `trellis_values` of its state, the last ``states`` bits up to and with its own.
    The string is stored from the highest bit of the first word on.

    A Viterbi search minimises the squared error to ``round(2 * 147.7 * value) / 2``, in whole numbers, so that every
    build and device chooses the same codes; among predecessors that are equally good it takes the lower one. First
    the bits at the seam are chosen by a search over ``2 * window`` elements round it with free ends; then a search
    over the tile is pinned to them at both ends. What that costs against more than one try at the seam falls with the
    window: about 1 % of the error at 32.

    Args:
        values: 256 a tile, finite, of unit variance. Beyond 13.8 they count as that; the code reaches 3.45.
        rate: bits per eight weights, 8 to 48.
        states: bits of the state, 12 or 16. Time grows as ``2**states``.
        window: 1 to 128.
        threads: how many to use; as many as torch uses if None. The result does not depend on it.
        level: instruction set to use, for tests; one of `available_levels()`.

    Raises:
        ConfigError: rate, states, window or the size of a tile is wrong.

    Example:
        >>> packed = trellis_encode(torch.zeros(1, 256), 16, states=12)
        >>> packed.shape, float(trellis_decode(packed, states=12).abs().max()) < 0.5
        (torch.Size([1, 16]), True)
    """
    _check(rate, states)
    if values.shape[1] != _TILE:
        raise ConfigError(f"a tile has {values.shape[1]} values; it needs {_TILE}.")
    if not 1 <= window <= _TILE // 2:
        raise ConfigError(f"window is {window}; use 1 to {_TILE // 2}.")
    if not takes_native(level, values):
        return reference_trellis.encode(values, rate, states, window)
    packed = torch.empty(values.shape[0], rate, dtype=torch.int32)
    _native.trellis_encode(as_float32(values), packed, states, window, thread_count(threads), level or "")
    return packed


def trellis_decode(
    packed: Int32[Tensor, "tiles rate"],
    *,
    states: int,
    threads: int | None = None,
    level: str | None = None,
    dtype: torch.dtype = torch.float32,
) -> Float[Tensor, "tiles 256"]:
    """What the codes of `trellis_encode` stand for.

    Args:
        packed: any words; their number per tile is the rate, 8 to 48.
        states: bits of the state, 12 or 16.
        threads: how many to use; as many as torch uses if None. The result does not depend on it.
        level: instruction set to use, for tests; one of `available_levels()`.
        dtype: of the result: float32, or bfloat16, the same rounded to the nearest.

    Raises:
        ConfigError: states, dtype or the number of words is wrong.

    Example:
        >>> trellis_decode(torch.zeros(1, 8, dtype=torch.int32), states=12)[0, 0] == trellis_values(12)[0]
        tensor(True)
    """
    _check(packed.shape[1], states)
    if dtype not in (torch.float32, torch.bfloat16):
        raise ConfigError(f"dtype is {dtype}; use torch.float32 or torch.bfloat16.")
    if not takes_native(level, packed):
        return reference_trellis.decode(packed, states, dtype)
    decoded = torch.empty(packed.shape[0], _TILE, dtype=dtype)
    _native.trellis_decode(packed.contiguous(), decoded, states, thread_count(threads), level or "")
    return decoded


def trellis_values(states: int) -> Float[Tensor, " values"]:
    """What each state stands for: ``(b - 510) / 147.7``, ``b`` the sum of the bytes of ``0x83DCD12D * state``.

    The product is taken modulo ``2**32``. Close to a standard normal variable, like the computed code "1MAD" of QTIP;
    the multiplier is the one that ExLlamaV3 calls ``mul1``.

    Args:
        states: bits of the state, 12 or 16; the result has ``2**states`` values.

    Raises:
        ConfigError: states is another number.

    Example:
        >>> float(trellis_values(16).std()) > 0.99
        True
    """
    _check(_RATES[0], states)
    whole = reference_trellis.state_values(states, torch.device("cpu"))
    return whole.to(torch.float32) * torch.tensor(1 / reference_trellis.UNIT)


def tile_order() -> Int64[Tensor, "256"]:
    """Which place of a 16 x 16 tile each element has, as ``input * 16 + output``.

    Elements ``8 t ... 8 t + 7`` are those that lane ``t`` of a warp holds of two operands of the tensor cores'
    m16n8k16, so that a lane's weights follow one another in the codes.

    Example:
        >>> tile_order()[:8].tolist()
        [0, 16, 128, 144, 8, 24, 136, 152]
    """
    lane, m = torch.arange(_TILE) // 8, torch.arange(_TILE) % 8
    row = lane % 4 * 2 + torch.tensor([0, 1, 8, 9])[m % 4]
    return row * _SIDE + lane // 4 + m // 4 * 8


def to_tiles(matrix: Float[Tensor, "out in"]) -> Float[Tensor, "in_tiles out_tiles 256"]:
    """A weight matrix as tiles of 16 inputs by 16 outputs, each in `tile_order`.

    Raises:
        ConfigError: a side is no multiple of 16.

    Example:
        >>> to_tiles(torch.arange(32.0 * 16).reshape(32, 16))[0, 1, :4].tolist()
        [256.0, 257.0, 264.0, 265.0]
    """
    rows, columns = matrix.shape
    if rows % _SIDE or columns % _SIDE:
        raise ConfigError(f"matrix is {rows} x {columns}; both sides have to be multiples of {_SIDE}.")
    tiles = matrix.reshape(rows // _SIDE, _SIDE, columns // _SIDE, _SIDE).permute(
        2, 0, 3, 1
    )  # [in, out, input, output]
    return tiles.flatten(2)[:, :, tile_order().to(matrix.device)]


def from_tiles(tiles: Float[Tensor, "in_tiles out_tiles 256"]) -> Float[Tensor, "out in"]:
    """The inverse of `to_tiles`.

    Example:
        >>> matrix = torch.arange(32.0 * 48).reshape(32, 48)
        >>> torch.equal(from_tiles(to_tiles(matrix)), matrix)
        True
    """
    columns, rows = tiles.shape[:2]
    placed = tiles[:, :, tile_order().argsort().to(tiles.device)].reshape(columns, rows, _SIDE, _SIDE)
    return placed.permute(1, 3, 0, 2).reshape(rows * _SIDE, columns * _SIDE)


def _check(rate: int, states: int) -> None:
    if states not in _STATES:
        raise ConfigError(f"states is {states}; use {' or '.join(map(str, _STATES))}.")
    if not _RATES[0] <= rate <= _RATES[1]:
        raise ConfigError(f"rate is {rate}; use {_RATES[0]} to {_RATES[1]} bits per eight weights.")
