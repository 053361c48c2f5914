"""Codes of any width, against their bits one by one."""

import pytest
import torch

from mezzotint.grids.packing import pack_codes, unpack_codes


@pytest.mark.parametrize("bits", range(2, 13))
@pytest.mark.parametrize("n", [1, 7, 32, 45])
def test_the_stream_is_little_endian_and_dense(bits: int, n: int):
    dtype = torch.uint8 if bits <= 8 else torch.int16
    code = torch.randint(0, 2**bits, (3, n), generator=torch.Generator().manual_seed(bits)).to(dtype)
    packed = pack_codes(code, bits)
    assert packed.shape == (3, -(-n * bits // 32))
    for row, words in zip(code.tolist(), packed.tolist(), strict=True):
        stream = sum((word & 0xFFFFFFFF) << (32 * i) for i, word in enumerate(words))
        assert stream == sum(value << (bits * i) for i, value in enumerate(row))
    again = unpack_codes(packed, bits, n, dtype)
    assert again.dtype == dtype
    torch.testing.assert_close(again, code, rtol=0, atol=0)
