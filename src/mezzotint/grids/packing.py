"""Codes of any width as a dense bit stream per row: `kernels.pack_bits` beyond 8 bits."""

import torch
from jaxtyping import Int32, Integer, UInt8
from torch import Tensor

from mezzotint import kernels


def pack_codes(code: Integer[Tensor, "rows n"], bits: int) -> Int32[Tensor, "rows words"]:
    """Code ``i`` of a row takes bits ``[i * bits, (i + 1) * bits)`` of that row's little-endian stream.

    Codes of more than 8 bits are packed as equal parts of at most 8, the lowest first, which gives the same stream.

    Args:
        code: values in ``[0, 2**bits)``.
        bits: 1 to 15.

    Example:
        >>> pack_codes(torch.tensor([[1, 2]], dtype=torch.int16), 12)  # 1 + 2 * 2**12
        tensor([[8193]], dtype=torch.int32)
    """
    part = _part(bits)
    if part == bits:
        return kernels.pack_bits(code.to(torch.uint8).contiguous(), bits)
    shifts = torch.arange(0, bits, part, device=code.device, dtype=code.dtype)
    parts = (code.unsqueeze(2) >> shifts) & (2**part - 1)
    return kernels.pack_bits(parts.to(torch.uint8).flatten(1), part)


def unpack_codes(
    packed: Int32[Tensor, "rows words"], bits: int, n: int, dtype: torch.dtype
) -> Integer[Tensor, "rows {n}"]:
    """The inverse of `pack_codes`: the first ``n`` codes of every row.

    Example:
        >>> unpack_codes(torch.tensor([[8193]], dtype=torch.int32), 12, 2, torch.int16)
        tensor([[1, 2]], dtype=torch.int16)
    """
    part = _part(bits)
    parts = kernels.unpack_bits(packed, part, n * bits // part)
    if part == bits:
        return parts.to(dtype)
    shifts = torch.arange(0, bits, part, device=packed.device, dtype=dtype)
    return (parts.unflatten(1, (n, bits // part)).to(dtype) << shifts).sum(2, dtype=dtype)


def pack_bytes(code: UInt8[Tensor, "rows n"], bits: int) -> UInt8[Tensor, "rows bytes"]:
    """Codes of at most 8 bits as in `pack_codes`, each row filled up to a whole byte instead of a word.

    Example:
        >>> pack_bytes(torch.tensor([[1, 2, 3]], dtype=torch.uint8), 3)  # 1 + 2 * 8 + 3 * 64
        tensor([[209,   0]], dtype=torch.uint8)
    """
    words = kernels.pack_bits(code.contiguous(), bits)
    return words.view(torch.uint8)[:, : byte_count(code.shape[1], bits)].contiguous()


def unpack_bytes(packed: UInt8[Tensor, "rows bytes"], bits: int, n: int) -> UInt8[Tensor, "rows {n}"]:
    """The inverse of `pack_bytes`: the first ``n`` codes of every row.

    Example:
        >>> unpack_bytes(torch.tensor([[209, 0]], dtype=torch.uint8), 3, 3)
        tensor([[1, 2, 3]], dtype=torch.uint8)
    """
    words = torch.nn.functional.pad(packed, (0, -packed.shape[1] % 4)).view(torch.int32)
    return kernels.unpack_bits(words, bits, n)


def word_count(n: int, bits: int) -> int:
    """Words of 32 bits that a row of ``n`` codes takes."""
    return -(-n * bits // 32)


def byte_count(n: int, bits: int) -> int:
    """Bytes that a row of ``n`` codes takes."""
    return -(-n * bits // 8)


def _part(bits: int) -> int:
    """The widest equal parts of a code that `kernels.pack_bits` takes."""
    return max(part for part in range(1, 9) if bits % part == 0)
