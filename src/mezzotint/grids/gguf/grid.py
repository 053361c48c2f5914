"""The block types of GGUF as grids: blocks of 32 or 256 columns whose scales are part of the grid."""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import ClassVar, Literal

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from mezzotint import kernels
from mezzotint.core.contracts import Affine, Bits
from mezzotint.errors import ConfigError
from mezzotint.grids import scales
from mezzotint.grids.feedback import feed_tiles_
from mezzotint.grids.gguf.fit import BlockSearch, nearest_entry, table_values
from mezzotint.grids.gguf.types import BLOCK_TYPES, BlockType, TypeName

_CHUNK = 2**17  # weights whose intermediate results stay in the cache


@dataclass(frozen=True, slots=True, kw_only=True)
class GgufGrid:
    """Settings of a GGUF block type.

    Attributes:
        type: name of the type, as llama.cpp has it.
        range: how scales (and minima) are chosen: ``error``, the least squared error that the search finds, the
            rounding of scales included; ``weighted``, the same weighted by the mean square of each input (diag H).
        fallback: a matrix whose width is no multiple of 256 takes the type of 32-wide blocks that llama.cpp's
            quantizer takes for it (Q2_K and Q3_K: Q4_0, Q4_K: Q5_0, Q5_K: Q5_1, Q6_K: Q8_0); false refuses it.
    """

    kind: ClassVar[str] = "gguf"
    type: TypeName = "Q4_K"
    range: Literal["error", "weighted"] = "weighted"
    fallback: bool = True

    @property
    def block_type(self) -> BlockType:
        """What the name stands for."""
        return BLOCK_TYPES[self.type]

    @property
    def bits(self) -> float:
        """Of one code."""
        return float(self.block_type.bits)

    @property
    def tile(self) -> tuple[int, int]:
        """Scalar."""
        return (1, 1)

    @property
    def multiple(self) -> tuple[int, int]:
        """Whole blocks."""
        return (1, self.block_type.block)

    @property
    def pads(self) -> bool:
        """Nothing is padded."""
        return False

    @property
    def needs(self) -> frozenset[str]:
        """``gram`` for the weighted range."""
        return frozenset({"gram"}) if self.range == "weighted" else frozenset()

    @property
    def rowwise(self) -> bool:
        """Blocks lie in a row."""
        return True

    def resolve(self, shape: tuple[int, int], dtype: torch.dtype, widths: Collection[int] = ()) -> "GgufGrid":
        """The grid for a matrix of that shape: another type where blocks do not fit and ``fallback`` is on.

        Raises:
            ConfigError: no type fits, or none may be taken instead.
        """
        t, width = self.block_type, shape[1]
        if width % t.block == 0:
            return self
        if self.fallback and t.fallback is not None and width % BLOCK_TYPES[t.fallback].block == 0:
            return replace(self, type=t.fallback)
        remedy = "Keep it, or set grid.fallback=true." if width % 32 == 0 else "Keep it."
        raise ConfigError(
            f"grid.type {self.type} has blocks of {t.block} columns; a matrix of {width} columns does not divide. "
            f"{remedy}"
        )

    def stored_bits(self, shape: tuple[int, int]) -> Bits:
        """Codes; scales and minima are side data."""
        weights, t = shape[0] * shape[1], self.block_type
        total = weights // t.block * t.nbytes * 8
        return Bits(code=weights * t.bits, side=total - weights * t.bits)

    def specs(self, shape: tuple[int, int]) -> Mapping[str, tuple[torch.dtype, tuple[int, ...]]]:
        """The blocks of each row, byte for byte as GGUF files hold them."""
        t = self.block_type
        return {"blocks": (torch.uint8, (shape[0], shape[1] // t.block * t.nbytes))}

    def restore(
        self, shape: tuple[int, int], stored: Mapping[str, Tensor]
    ) -> tuple[UInt8[Tensor, "out in"], "FittedGguf"]:
        """The inverse of `FittedGguf.store`."""
        rows = shape[0]
        parts = self.block_type.unpack(stored["blocks"].reshape(-1, self.block_type.nbytes))
        code = parts.pop("code").to(torch.uint8).view(shape)
        parameters = {name: value.float().view(rows, -1) for name, value in parts.items()}
        return code, FittedGguf(grid=self, shape=shape, **parameters)

    def fit(self, target: Float[Tensor, "out in"], importance: Float[Tensor, " in"] | None) -> "FittedGguf":
        """Scales and minima for one target.

        Raises:
            ConfigError: the range is weighted and there is no importance.
        """
        importance = scales.importance_for(self.range, importance, "'error'")
        wide = target.detach() if target.dtype == torch.float64 else target.detach().float()
        rows, width = wide.shape
        t = self.block_type
        shape = (-1, width // t.block, t.groups, t.group)
        weight = torch.ones_like(wide[0])
        if importance is not None:
            given = importance.to(wide)
            # dead inputs count a little, so that every group has a best scale
            weight = given + 1e-6 * given.mean() if bool(given.any()) else weight
        step = max(1, _CHUNK // width)
        pieces = [
            BlockSearch(block_type=t, x=wide[start : start + step].reshape(shape), w=weight.view(shape)).parameters()
            for start in range(0, rows, step)
        ]
        joined = {name: torch.cat([getattr(piece, name) for piece in pieces]).flatten(1) for name in t.parameters}
        return FittedGguf(grid=self, shape=(rows, width), **joined)


@dataclass(frozen=True, kw_only=True, eq=False)
class FittedGguf:
    """A GGUF type with the parameters of one matrix; codes are ``uint8 [out, in]``.

    Products of scale and code are exact in float32 for every type, so that values are those of any other reader that
    multiplies and subtracts in float32, bit for bit.

    Attributes:
        super_scale: ``[out, blocks]``, float16 numbers; zero only for blocks of zeros where no code stands for zero.
        sub_scale: ``[out, groups]``, whole numbers; of K types.
        super_min: ``[out, blocks]``, float16 numbers; of types with a minimum.
        sub_min: ``[out, groups]``, whole numbers; of K types with a minimum.
    """

    grid: GgufGrid
    shape: tuple[int, int]
    super_scale: Float[Tensor, "out blocks"]
    sub_scale: Float[Tensor, "out groups"] | None = None
    super_min: Float[Tensor, "out blocks"] | None = None
    sub_min: Float[Tensor, "out groups"] | None = None

    @property
    def parameters(self) -> Mapping[str, Tensor]:
        """Those that the type has."""
        return {name: getattr(self, name) for name in self.grid.block_type.parameters}

    @property
    def group_size(self) -> int:
        """Columns of a group."""
        return self.grid.block_type.group

    @cached_property
    def scale(self) -> Float[Tensor, "out groups"]:
        """Of each group."""
        return self._spread(self.super_scale, self.sub_scale)

    @cached_property
    def least(self) -> Float[Tensor, "out groups"] | None:
        """What is subtracted in each group, or None."""
        return None if self.super_min is None else self._spread(self.super_min, self.sub_min)

    @cached_property
    def zero_point(self) -> Float[Tensor, "out groups"]:
        """Of types without a minimum and a table."""
        return torch.full_like(self.scale, float(self.grid.block_type.zero_point or 0))

    @property
    def affine(self) -> Affine | None:
        """``value = scale * code + offset``; None for a type with a table."""
        if self.grid.block_type.values is not None:
            return None
        offset = -self.scale * self.zero_point if self.least is None else -self.least
        return Affine(self.scale, offset, self.group_size)

    def new_code(self) -> UInt8[Tensor, "out in"]:
        """An empty code tensor."""
        return torch.empty(self.shape, dtype=torch.uint8, device=self.super_scale.device)

    def encode_(
        self, code: UInt8[Tensor, "out in"], values: Float[Tensor, "out k"], columns: Int[Tensor, " k"]
    ) -> Float[Tensor, "out k"]:
        """Write the nearest codes into ``code[:, columns]`` and return what they decode to."""
        scale, shift = self._of_columns(columns)
        piece = self._nearest(values, scale, shift, 1)
        code.index_copy_(1, columns, piece)
        return self._values(piece, scale, shift, 1)

    def encode(self, values: Float[Tensor, "out in"]) -> UInt8[Tensor, "out in"]:
        """The nearest codes of a whole matrix, of any floating dtype."""
        return self._nearest(values, self.scale, self._shift, self.group_size)

    def feed_(
        self,
        code: UInt8[Tensor, "out in"],
        work: Float[Tensor, "out k"],
        upper: Float[Tensor, "k k"],
        columns: Int[Tensor, " k"],
    ) -> Float[Tensor, "out k"]:
        """`feed_tiles_` for this grid; in one call of the compiled kernel where there is a zero point."""
        t = self.grid.block_type
        if t.zero_point is None:
            return feed_tiles_(self, code, work, upper, columns)
        scale, zero_point = self._of_columns(columns)
        assert zero_point is not None
        piece, error = kernels.gptq_block_(work, upper, scale, zero_point, t.bits)
        code.index_copy_(1, columns, piece)
        return error

    def decode(self, code: UInt8[Tensor, "out in"]) -> Float[Tensor, "out in"]:
        """The values that the codes stand for."""
        return self._values(code, self.scale, self._shift, self.group_size)

    def store(self, code: UInt8[Tensor, "out in"], shape: tuple[int, int]) -> Mapping[str, Tensor]:
        """The blocks of each row."""
        t = self.grid.block_type
        blocks = code.numel() // t.block
        parts = {"code": code, **self.parameters}
        return {"blocks": t.pack({name: p.reshape(blocks, -1) for name, p in parts.items()}).view(shape[0], -1)}

    def take_rows(self, rows: slice) -> "FittedGguf":
        """The grid of some rows."""
        taken = {name: value[rows] for name, value in self.parameters.items()}
        return replace(self, shape=(taken["super_scale"].shape[0], self.shape[1]), **taken)

    def join_rows(self, code: Tensor, join: Callable[[Tensor, int], Tensor]) -> tuple[Tensor, "FittedGguf"]:
        """Codes and grid of the whole matrix."""
        code = join(code, 0)
        joined = {name: join(value, 0) for name, value in self.parameters.items()}
        return code, replace(self, shape=(code.shape[0], self.shape[1]), **joined)

    def scaled(self, factor: float) -> "FittedGguf":
        """The grid of ``factor`` times the values."""
        least = None if self.super_min is None else self.super_min * factor
        return replace(self, super_scale=self.super_scale * factor, super_min=least)

    def _spread(self, super_: Tensor, sub: Tensor | None) -> Float[Tensor, "out groups"]:
        if sub is None:
            return super_
        return super_.repeat_interleave(self.grid.block_type.groups, dim=1) * sub

    @cached_property
    def _shift(self) -> Tensor | None:
        """What goes with the scale of each group: zero points, or minima; None beside a table."""
        return self.least if self.grid.block_type.zero_point is None else self.zero_point

    def _of_columns(self, columns: Tensor) -> tuple[Tensor, Tensor | None]:
        groups, shift = columns // self.grid.block_type.group, self._shift
        return self.scale.index_select(1, groups), None if shift is None else shift.index_select(1, groups)

    def _nearest(self, values: Tensor, scale: Tensor, shift: Tensor | None, size: int) -> UInt8[Tensor, "out k"]:
        """Codes; ``size`` columns share each scale and shift."""
        t = self.grid.block_type
        if t.zero_point is not None:
            assert shift is not None
            return kernels.affine_encode(values, scale, shift, size, t.bits)
        wide = values.detach().to(torch.promote_types(values.dtype, scale.dtype))
        if t.values is not None:  # blocks of zeros: all the same code
            divisor = scale.masked_fill(scale == 0, torch.inf).repeat_interleave(size, dim=1)
            return nearest_entry(t, wide / divisor).to(torch.uint8)
        assert shift is not None
        wide = (wide + shift.repeat_interleave(size, dim=1)) / scale.repeat_interleave(size, dim=1)
        return wide.round_().clamp_(0, 2**t.bits - 1).to(torch.uint8)

    def _values(self, code: Tensor, scale: Tensor, shift: Tensor | None, size: int) -> Float[Tensor, "out k"]:
        t = self.grid.block_type
        if t.zero_point is not None:
            assert shift is not None
            return kernels.affine_decode(code, scale, shift, size)
        wide = scale.repeat_interleave(size, dim=1)
        if t.values is not None:
            return wide * table_values(t, scale)[code.int()]
        assert shift is not None
        return wide * code - shift.repeat_interleave(size, dim=1)
