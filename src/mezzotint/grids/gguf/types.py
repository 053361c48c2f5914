"""The block types of GGUF: how wide blocks are, what codes stand for, and where every bit lies.

Facts from the reader of the ``gguf`` package (llama.cpp, ggml-quants): a row is a run of blocks of 32 or 256 columns;
a block of 256 (a K type) has a scale of its own, in float16, and small integers that multiply it for every group of 16
or 32 columns.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise
from typing import Literal, NamedTuple, get_args

import torch
from jaxtyping import Int, UInt8
from torch import Tensor

TypeName = Literal["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "IQ4_NL", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"]

# ggml's kvalues_iq4nl: denser in the middle, as the weights are; each times the scale of its block
IQ4_NL_VALUES = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)


class Plane(NamedTuple):
    """Some bits of a list of small integers: ``bits`` of each from bit ``low`` on, ``8 / bits`` integers a byte.

    The integers of a byte are ``run`` apart: the list is cut into pieces of ``8 / bits * run``, and byte ``j`` of a
    piece holds the integers ``j``, ``j + run``, ``j + 2 run``, ..., the first in the lowest bits.
    """

    low: int
    bits: int
    run: int

    def size(self, count: int) -> int:
        """Bytes that ``count`` integers take."""
        return count * self.bits // 8

    def pack(self, whole: Int[Tensor, "blocks count"]) -> UInt8[Tensor, "blocks bytes"]:
        """The bytes; bits of the integers outside the plane are left out."""
        each = 8 // self.bits
        part = ((whole >> self.low) & (2**self.bits - 1)).view(len(whole), -1, each, self.run)
        packed = sum(part[:, :, k] << (self.bits * k) for k in range(each))
        return torch.as_tensor(packed).to(torch.uint8).flatten(1)

    def unpack(self, packed: UInt8[Tensor, "blocks bytes"]) -> Int[Tensor, "blocks count"]:
        """The integers, with these bits in their place and no others."""
        shift = torch.arange(0, 8, self.bits, device=packed.device)[:, None]
        part = (packed.int().view(len(packed), -1, 1, self.run) >> shift) & (2**self.bits - 1)
        return (part << self.low).flatten(1)


class Half(NamedTuple):
    """One float16, of another sign in the file where ``sign`` is -1."""

    sign: int = 1


class SixBitPairs(NamedTuple):
    """Eight scales and eight minima of six bits in twelve bytes (Q4_K, Q5_K).

    Bytes 0-3 hold the first four scales and, in the two high bits, the high bits of the last four; bytes 4-7 the same
    of the minima; bytes 8-11 the low four bits of the last four scales and, above them, of the last four minima.
    """

    def pack(self, scale: Int[Tensor, "blocks 8"], least: Int[Tensor, "blocks 8"]) -> UInt8[Tensor, "blocks 12"]:
        """The bytes."""
        first, last = (scale[:, :4], least[:, :4]), (scale[:, 4:], least[:, 4:])
        high = [a | (b >> 4 << 6) for a, b in zip(first, last, strict=True)]
        return torch.cat((*high, (last[0] & 15) | ((last[1] & 15) << 4)), dim=1).to(torch.uint8)

    def unpack(self, packed: UInt8[Tensor, "blocks 12"]) -> tuple[Int[Tensor, "blocks 8"], Int[Tensor, "blocks 8"]]:
        """Scales and minima."""
        scale, least, low = packed.int().split(4, dim=1)
        return (
            torch.cat((scale & 63, (low & 15) | (scale >> 6 << 4)), dim=1),
            torch.cat((least & 63, (low >> 4) | (least >> 6 << 4)), dim=1),
        )


Field = tuple[str, Plane | Half | SixBitPairs]


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockType:
    """One block type.

    Values are ``super_scale * sub_scale * (code - zero_point) - super_min * sub_min``; what a type does not have is 1
    (``sub``) or 0 (``super_min``). All codes and sub scales here are integers from ``code`` and ``sub`` ranges; the
    file may shift them.

    Attributes:
        block: columns of a block; a width is a multiple of it.
        group: columns that share a sub scale; those of the block where there are none.
        bits: of a code.
        zero_point: code of the value zero, None where each group has a minimum instead.
        values: what codes stand for instead of ``code - zero_point``, times the scale.
        sub: smallest and largest sub scale, None where there are none.
        shift: what the file adds to codes and to sub scales, modulo 256.
        fallback: type of 32 columns that llama.cpp's quantizer takes where 256 do not divide the width.
        fields: what a block consists of, in order.
    """

    name: TypeName
    block: int
    group: int
    bits: int
    zero_point: int | None = None
    values: tuple[int, ...] | None = None
    sub: tuple[int, int] | None = None
    shift: tuple[int, int] = (0, 0)
    fallback: TypeName | None = None
    fields: tuple[Field, ...]

    @property
    def groups(self) -> int:
        """Of a block."""
        return self.block // self.group

    @property
    def has_min(self) -> bool:
        """Whether each group has a minimum."""
        return self.zero_point is None and self.values is None

    @property
    def reach(self) -> tuple[int, int]:
        """How far below and above zero codes reach, in units of the scale, before a minimum is subtracted."""
        if self.values is not None:
            return -self.values[0], self.values[-1]
        below = self.zero_point or 0
        return below, 2**self.bits - 1 - below

    @property
    def parameters(self) -> tuple[str, ...]:
        """Names of what is stored beside codes."""
        subs = () if self.sub is None else ("sub_scale", "sub_min") if self.has_min else ("sub_scale",)
        return ("super_scale", "super_min", *subs) if self.has_min else ("super_scale", *subs)

    @property
    def nbytes(self) -> int:
        """Of a block."""
        return self._ends[-1]

    @property
    def _ends(self) -> list[int]:
        counts = {"code": self.block, "sub_scale": self.groups, "sub_both": 2 * self.groups}
        sizes = []
        for what, how in self.fields:
            if isinstance(how, Plane):
                sizes.append(how.size(counts[what]))
            else:
                sizes.append(12 if isinstance(how, SixBitPairs) else 2)
        return [0, *accumulate(sizes)]

    def pack(self, parts: Mapping[str, Tensor]) -> UInt8[Tensor, "blocks bytes"]:
        """Blocks from their parts.

        Args:
            parts: ``code [blocks, block]`` and what the type has of ``sub_scale`` and ``sub_min`` ``[blocks, groups]``,
                all whole, and of ``super_scale`` and ``super_min`` ``[blocks, 1]``.
        """
        whole = {name: value.int() for name, value in parts.items() if not name.startswith("super")}
        whole["code"] = (whole["code"] + self.shift[0]) & 255
        if "sub_min" in whole:
            whole["sub_both"] = torch.cat((whole["sub_scale"], whole["sub_min"]), dim=1)
        elif "sub_scale" in whole:
            whole["sub_scale"] = (whole["sub_scale"] + self.shift[1]) & 255
        pieces = []
        for what, how in self.fields:
            if isinstance(how, Half):
                pieces.append((how.sign * parts[what]).to(torch.float16).contiguous().view(torch.uint8))
            elif isinstance(how, SixBitPairs):
                pieces.append(how.pack(whole["sub_scale"], whole["sub_min"]))
            else:
                pieces.append(how.pack(whole[what]))
        return torch.cat(pieces, dim=1)

    def unpack(self, blocks: UInt8[Tensor, "blocks bytes"]) -> dict[str, Tensor]:
        """The inverse of `pack`: whole numbers as int32, float16 as float32."""
        found: dict[str, Tensor] = {}
        for (what, how), (start, end) in zip(self.fields, pairwise(self._ends), strict=True):
            piece = blocks[:, start:end].contiguous()
            if isinstance(how, Half):
                found[what] = how.sign * piece.view(torch.float16).float()
            elif isinstance(how, SixBitPairs):
                found["sub_scale"], found["sub_min"] = how.unpack(piece)
            else:
                found[what] = found[what] | how.unpack(piece) if what in found else how.unpack(piece)
        if "sub_both" in found:
            found["sub_scale"], found["sub_min"] = found.pop("sub_both").split(self.groups, dim=1)
        elif "sub_scale" in found:
            found["sub_scale"] = _unshifted(found["sub_scale"], self.shift[1])
        found["code"] = (found["code"] - self.shift[0]) & 255
        return found


def _unshifted(whole: Tensor, shift: int) -> Tensor:
    """Signed integers from those of the file: two's complement where nothing was added."""
    return whole - shift if shift else whole.to(torch.int8).int()


_NIBBLES, _WIDE_NIBBLES, _PAIRS = Plane(0, 4, 16), Plane(0, 4, 32), Plane(0, 2, 32)
_SCALE, _MIN = ("super_scale", Half()), ("super_min", Half())
_Q4_0 = BlockType(name="Q4_0", block=32, group=32, bits=4, zero_point=8, fields=(_SCALE, ("code", _NIBBLES)))
_Q5_0 = BlockType(
    name="Q5_0",
    block=32,
    group=32,
    bits=5,
    zero_point=16,
    fields=(_SCALE, ("code", Plane(4, 1, 1)), ("code", _NIBBLES)),
)
_LEAST = ("super_min", Half(-1))  # stored as the smallest value itself
_Q4_K = BlockType(
    name="Q4_K",
    block=256,
    group=32,
    bits=4,
    sub=(1, 63),
    fallback="Q5_0",
    fields=(_SCALE, _MIN, ("sub_both", SixBitPairs()), ("code", _WIDE_NIBBLES)),
)
_ALL = (
    _Q4_0,
    replace(_Q4_0, name="Q4_1", zero_point=None, fields=(_SCALE, _LEAST, *_Q4_0.fields[1:])),
    _Q5_0,
    replace(_Q5_0, name="Q5_1", zero_point=None, fields=(_SCALE, _LEAST, *_Q5_0.fields[1:])),
    BlockType(
        name="Q8_0",
        block=32,
        group=32,
        bits=8,
        zero_point=128,
        shift=(128, 0),
        fields=(_SCALE, ("code", Plane(0, 8, 1))),
    ),
    replace(_Q4_0, name="IQ4_NL", zero_point=None, values=IQ4_NL_VALUES),
    BlockType(
        name="Q2_K",
        block=256,
        group=16,
        bits=2,
        sub=(1, 15),
        fallback="Q4_0",
        fields=(("sub_both", Plane(0, 4, 16)), ("code", _PAIRS), _SCALE, _MIN),
    ),
    BlockType(
        name="Q3_K",
        block=256,
        group=16,
        bits=3,
        zero_point=4,
        sub=(-32, 31),
        shift=(0, 32),
        fallback="Q4_0",
        fields=(
            ("code", Plane(2, 1, 32)),
            ("code", _PAIRS),
            ("sub_scale", Plane(0, 4, 8)),
            ("sub_scale", Plane(4, 2, 4)),
            _SCALE,
        ),
    ),
    _Q4_K,
    replace(
        _Q4_K,
        name="Q5_K",
        bits=5,
        fallback="Q5_1",
        fields=(*_Q4_K.fields[:3], ("code", Plane(4, 1, 32)), ("code", _WIDE_NIBBLES)),
    ),
    BlockType(
        name="Q6_K",
        block=256,
        group=16,
        bits=6,
        zero_point=32,
        sub=(-128, 127),
        fallback="Q8_0",
        fields=(
            ("code", Plane(0, 4, 64)),
            ("code", Plane(4, 2, 32)),
            ("sub_scale", Plane(0, 8, 1)),
            _SCALE,
        ),
    ),
)
BLOCK_TYPES: Mapping[TypeName, BlockType] = {block_type.name: block_type for block_type in _ALL}
assert set(BLOCK_TYPES) == set(get_args(TypeName))
