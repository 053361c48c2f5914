"""Packing: every level against the torch reference, a numpy twin and the packer that vLLM reads."""

import numpy as np
import pytest
import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32, unpack_from_int32
from hypothesis import given
from hypothesis import strategies as st

from mezzotint import kernels
from mezzotint.errors import ConfigError
from mezzotint.kernels import reference
from reference import kernels as twin

LEVELS = kernels.available_levels()


@st.composite
def codes(draw):
    bits = draw(st.integers(1, 8))
    rows, n = draw(st.integers(0, 5)), draw(st.integers(0, 150))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    return torch.randint(0, 2**bits, (rows, n), generator=generator, dtype=torch.uint8), bits


@pytest.mark.parametrize("level", LEVELS)
@given(problem=codes(), threads=st.integers(1, 3))
def test_levels_agree_and_invert(level, problem, threads):
    code, bits = problem
    packed = kernels.pack_bits(code, bits, threads=threads, level=level)
    fits, expected = reference.pack_bits(code, bits)
    assert fits
    torch.testing.assert_close(packed, expected, rtol=0, atol=0)
    n = code.shape[1]
    torch.testing.assert_close(kernels.unpack_bits(packed, bits, n, threads=threads, level=level), code, rtol=0, atol=0)
    torch.testing.assert_close(reference.unpack_bits(packed, bits, n), code, rtol=0, atol=0)


@given(problem=codes())
def test_numpy_twin(problem):
    code, bits = problem
    packed = twin.pack(code.numpy(), bits)
    np.testing.assert_array_equal(kernels.pack_bits(code, bits).numpy(), packed)
    np.testing.assert_array_equal(twin.unpack(packed, bits, code.shape[1]), code.numpy())


@given(problem=codes())
def test_same_words_as_compressed_tensors(problem):
    code, bits = problem
    if code.numel() == 0:
        return
    signed = (code.to(torch.int16) - 2 ** (bits - 1)).to(torch.int8)  # it takes signed values and adds half the range
    packed = kernels.pack_bits(code, bits)
    torch.testing.assert_close(packed, pack_to_int32(signed, bits), rtol=0, atol=0)
    torch.testing.assert_close(unpack_from_int32(packed, bits, signed.shape), signed, rtol=0, atol=0)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_classic_packing(bits):
    code = (torch.arange(64).reshape(2, 32) * 5 % 2**bits).to(torch.uint8)
    per_word = 32 // bits
    shifts = torch.arange(per_word) * bits
    words = (code.reshape(2, -1, per_word).to(torch.int64) << shifts).sum(2)
    classic = torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)
    torch.testing.assert_close(kernels.pack_bits(code, bits), classic, rtol=0, atol=0)


@pytest.mark.parametrize("level", [None, *LEVELS])
@pytest.mark.parametrize("at", [0, 9, 17])
def test_a_code_that_does_not_fit_is_refused(level, at):
    code = torch.zeros(1, 18, dtype=torch.uint8)
    code[0, at] = 8
    with pytest.raises(ConfigError, match="a code is 8; 3 bits hold at most 7"):
        kernels.pack_bits(code, 3, level=level)


def test_strided_and_long_input():
    """A view is packed as what it shows, and many rows go through several threads."""
    code = torch.randint(0, 8, (96, 4001), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    view = code.t()[:4000]
    one = kernels.pack_bits(view, 3, threads=1)
    torch.testing.assert_close(kernels.pack_bits(view, 3, threads=3), one, rtol=0, atol=0)
    torch.testing.assert_close(kernels.unpack_bits(one, 3, 96, threads=3), view.contiguous(), rtol=0, atol=0)


@pytest.mark.parametrize("bits", [0, 9])
def test_bits_out_of_range(bits):
    with pytest.raises(ConfigError, match="use 1 to 8"):
        kernels.pack_bits(torch.zeros(1, 4, dtype=torch.uint8), bits)


def test_wrong_number_of_words():
    with pytest.raises(ConfigError, match="100 codes of 3 bits take 10"):
        kernels.unpack_bits(torch.zeros(1, 9, dtype=torch.int32), 3, 100)


def test_unknown_level_and_bad_thread_count():
    code = torch.zeros(1, 4, dtype=torch.uint8)
    with pytest.raises(ConfigError, match="level 'sse9' is not one of portable"):
        kernels.pack_bits(code, 4, level="sse9")
    with pytest.raises(ConfigError, match="threads is 0"):
        kernels.pack_bits(code, 4, threads=0)
