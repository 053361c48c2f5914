"""Codes as a dense little-endian bit stream per row, and back."""

import torch
from jaxtyping import Int32, UInt8
from torch import Tensor

from mezzotint.errors import ConfigError
from mezzotint.kernels import _native, reference
from mezzotint.kernels._dispatch import check_bits, takes_native, thread_count


def pack_bits(
    code: UInt8[Tensor, "rows n"], bits: int, *, threads: int | None = None, level: str | None = None
) -> Int32[Tensor, "rows words"]:
    """Packs codes densely: code ``i`` of a row takes bits ``[i * bits, (i + 1) * bits)`` of that row's stream.

    The stream is little-endian, in words of 32 bits; a row has ``ceil(n * bits / 32)`` of them and its last bits are
    zero. For 2, 4 and 8 bits this is the classic packing; for all it is what compressed-tensors writes since 0.18.

    Args:
        code: values in ``[0, 2**bits)``.
        bits: 1 to 8.
        threads: how many to use; as many as torch uses if None. The result does not depend on it.
        level: instruction set to use, for tests; one of `available_levels()`.

    Raises:
        ConfigError: bits is out of range, or a code does not fit into them.

    Example:
        >>> pack_bits(torch.tensor([[1, 2, 3]], dtype=torch.uint8), 4)
        tensor([[801]], dtype=torch.int32)
    """
    check_bits(bits)
    if not takes_native(level, code):
        fits, packed = reference.pack_bits(code, bits)
    else:
        packed = torch.empty(code.shape[0], -(-code.shape[1] * bits // 32), dtype=torch.int32)
        fits = _native.pack(code.contiguous(), packed, bits, thread_count(threads), level or "")
    if not fits:
        raise ConfigError(f"a code is {int(code.max())}; {bits} bits hold at most {2**bits - 1}.")
    return packed


def unpack_bits(
    packed: Int32[Tensor, "rows words"], bits: int, n: int, *, threads: int | None = None, level: str | None = None
) -> UInt8[Tensor, "rows {n}"]:
    """The inverse of `pack_bits`: the first ``n`` codes of every row.

    Args:
        packed: ``ceil(n * bits / 32)`` words a row.
        bits: 1 to 8.
        n: codes in a row.
        threads: how many to use; as many as torch uses if None. The result does not depend on it.
        level: instruction set to use, for tests; one of `available_levels()`.

    Raises:
        ConfigError: bits is out of range, or the number of words is not that of ``n`` codes.

    Example:
        >>> unpack_bits(torch.tensor([[801]], dtype=torch.int32), 4, 3)
        tensor([[1, 2, 3]], dtype=torch.uint8)
    """
    check_bits(bits)
    words = -(-n * bits // 32)
    if packed.shape[1] != words:
        raise ConfigError(f"packed has {packed.shape[1]} words a row; {n} codes of {bits} bits take {words}.")
    if not takes_native(level, packed):
        return reference.unpack_bits(packed, bits, n)
    code = torch.empty(packed.shape[0], n, dtype=torch.uint8)
    _native.unpack(packed.contiguous(), code, bits, thread_count(threads), level or "")
    return code
