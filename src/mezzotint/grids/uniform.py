"""Uniform integer grid: ``value = scale * (code - zero_point)``, one scale a group of columns, a row or a matrix."""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from mezzotint import kernels
from mezzotint.core.contracts import Affine, Bits
from mezzotint.core.curvature import Squares
from mezzotint.errors import ConfigError
from mezzotint.grids import scales
from mezzotint.grids.packing import byte_count, pack_bytes, unpack_bytes, word_count


@dataclass(frozen=True, slots=True, kw_only=True)
class UniformGrid:
    """Settings of the uniform grid.

    Attributes:
        bits: of one code, 2 to 8.
        group_size: input columns per scale; None is one group a row; ``auto`` the largest of 128, 64, 32 that
            divides every quantized matrix's width, else this one's, else None. The last group may be shorter.
        symmetric: zero point fixed at ``2^(bits-1)``; otherwise each group has its own integer zero point.
        range: how a group's scale and zero point are chosen: ``minmax``; ``error``, the smallest error over shrunken
            ranges; ``weighted``, the same weighted by the mean square of each input (diag H).
        range_power: of the errors that ranges are chosen by: 2, 2.5 or 3; the larger, the less is clipped.
        scale_per: one scale (and zero point) a group; one a ``row``, or one for the whole ``matrix``, whatever the
            group size: for weights that a transform has made alike.
        scale_dtype: of the stored scales, rounded to it before codes are chosen; ``auto`` is the checkpoint's.
    """

    kind: ClassVar[str] = "uniform"
    bits: int = 4
    group_size: scales.GroupSize = "auto"
    symmetric: bool = False
    range: Literal["minmax", "error", "weighted"] = "weighted"
    range_power: float = 2.5
    scale_per: scales.ScalePer = "group"
    scale_dtype: scales.ScaleDtype = "auto"

    def __post_init__(self) -> None:
        if not 2 <= self.bits <= 8:
            raise ConfigError(f"grid.bits is {self.bits}; the uniform grid takes 2 to 8. Choose one of these.")
        if self.range_power not in kernels.POWERS:
            raise ConfigError(f"grid.range_power is {self.range_power}; it must be 2, 2.5 or 3.")
        scales.check_group_size(self.group_size)

    @property
    def tile(self) -> tuple[int, int]:
        """Scalar."""
        return (1, 1)

    @property
    def multiple(self) -> tuple[int, int]:
        """Any shape."""
        return (1, 1)

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
        """Unless there is one scale for the whole matrix."""
        return self.scale_per != "matrix"

    def resolve(self, shape: tuple[int, int], dtype: torch.dtype, widths: Collection[int] = ()) -> "UniformGrid":
        """The grid with every ``auto`` decided for a matrix of that shape in a checkpoint of that dtype.

        ``widths`` are those of all matrices that should share a group size: engines load one scheme more readily.
        """
        group_size = scales.resolve_group_size(self.group_size, shape[1], widths, self.scale_per)
        return replace(self, group_size=group_size, scale_dtype=scales.resolve_scale_dtype(self.scale_dtype, dtype))

    def columns_per_group(self, width: int) -> int:
        """Columns of a full group of a matrix of that width."""
        return scales.columns_per_group(self.group_size, width)

    @property
    def storage_dtype(self) -> torch.dtype:
        """Dtype of the stored scales."""
        return scales.storage_dtype(self.scale_dtype)

    def stored_bits(self, shape: tuple[int, int]) -> Bits:
        """Codes; scales, (asymmetric) zero points and what fills up the last word and byte of a row."""
        return Bits.of(shape[0] * shape[1] * self.bits, self.specs(shape))

    def specs(self, shape: tuple[int, int]) -> Mapping[str, tuple[torch.dtype, tuple[int, ...]]]:
        """Codes packed as by `kernels.pack_bits`, scales, and (asymmetric) zero points as by `pack_bytes`."""
        rows, columns = shape
        one = self.scale_per == "matrix"
        height, groups = (1, 1) if one else (rows, -(-columns // self.columns_per_group(columns)))
        found: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {
            "packed": (torch.int32, (rows, word_count(columns, self.bits))),
            "scale": (self.storage_dtype, (height, groups)),
        }
        return (
            found if self.symmetric else {**found, "zero_point": (torch.uint8, (height, byte_count(groups, self.bits)))}
        )

    def restore(
        self, shape: tuple[int, int], stored: Mapping[str, Tensor]
    ) -> tuple[UInt8[Tensor, "out in"], "FittedUniform"]:
        """The inverse of `FittedUniform.store`."""
        scale, zero_point = self.restore_parameters(stored)
        code = kernels.unpack_bits(stored["packed"], self.bits, shape[1])
        return code, FittedUniform(grid=self, shape=shape, scale=scale, zero_point=zero_point)

    def restore_parameters(
        self, stored: Mapping[str, Tensor]
    ) -> tuple[Float[Tensor, "out groups"], Float[Tensor, "out groups"]]:
        """Scales and zero points of every row, in float32."""
        scale = stored["scale"].float()
        if self.symmetric:
            zero_point = torch.full_like(scale, 2.0 ** (self.bits - 1))
        else:
            zero_point = unpack_bytes(stored["zero_point"], self.bits, scale.shape[1]).float()
        if self.scale_per == "matrix":
            rows = len(stored["packed"])
            return scale.expand(rows, 1).contiguous(), zero_point.expand(rows, 1).contiguous()
        return scale, zero_point

    def fit(self, target: Float[Tensor, "out in"], importance: Float[Tensor, " in"] | None) -> "FittedUniform":
        """Scales and zero points for one target, by the setting ``range``.

        Raises:
            ConfigError: the range is weighted and there is no importance.
        """
        importance = scales.importance_for(self.range, importance, "'error' or 'minmax'")
        rows, width = target.shape
        if self.scale_per == "matrix":  # one long row
            weight = None if importance is None else importance.repeat(rows)
            scale, zero_point = (
                part.expand(rows, 1).contiguous() for part in self._range(target.reshape(1, -1), weight)
            )
        else:
            scale, zero_point = self._range(target, importance)
        return FittedUniform(grid=self, shape=(rows, width), scale=scale, zero_point=zero_point)

    def _range(self, target: Float[Tensor, "rows n"], importance: Float[Tensor, " n"] | None) -> tuple[Tensor, Tensor]:
        size = target.shape[1] if self.scale_per == "matrix" else self.columns_per_group(target.shape[1])
        settings = {"symmetric": self.symmetric, "scale_dtype": self.storage_dtype}
        if self.range == "minmax":
            return kernels.min_max_range(target, size, self.bits, **settings)
        return kernels.search_range(target, size, self.bits, importance=importance, power=self.range_power, **settings)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class FittedUniform:
    """Uniform grid with the parameters of one matrix; codes are ``uint8 [out, in]``.

    Attributes:
        scale: ``[out, groups]`` float32, values that the storage dtype represents exactly.
        zero_point: ``[out, groups]`` float32, integers from 0 to ``2^bits - 1``.
    """

    grid: UniformGrid
    shape: tuple[int, int]
    scale: Float[Tensor, "out groups"]
    zero_point: Float[Tensor, "out groups"]

    @property
    def parameters(self) -> Mapping[str, Tensor]:
        """Scale and zero point."""
        return {"scale": self.scale, "zero_point": self.zero_point}

    @property
    def group_size(self) -> int:
        """Columns of a full group."""
        return self.grid.columns_per_group(self.shape[1])

    @property
    def affine(self) -> Affine:
        """``value = scale * code - scale * zero_point``."""
        return Affine(self.scale, -self.scale * self.zero_point, self.group_size)

    def new_code(self) -> UInt8[Tensor, "out in"]:
        """An empty code tensor."""
        return torch.empty(self.shape, dtype=torch.uint8, device=self.scale.device)

    def encode_(
        self, code: UInt8[Tensor, "out in"], values: Float[Tensor, "out k"], columns: Int[Tensor, " k"]
    ) -> Float[Tensor, "out k"]:
        """Write the nearest codes into ``code[:, columns]`` and return what they decode to."""
        scale, zero_point = self._of_columns(columns)
        piece = kernels.affine_encode(values, scale, zero_point, 1, self.grid.bits)
        code.index_copy_(1, columns, piece)
        return kernels.affine_decode(piece, scale, zero_point, 1)

    def encode(self, values: Float[Tensor, "out in"]) -> UInt8[Tensor, "out in"]:
        """The nearest codes of a whole matrix, of any floating dtype."""
        return kernels.affine_encode(values, self.scale, self.zero_point, self.group_size, self.grid.bits)

    def feed_(
        self,
        code: UInt8[Tensor, "out in"],
        work: Float[Tensor, "out k"],
        upper: Float[Tensor, "k k"],
        columns: Int[Tensor, " k"],
        *,
        taken: Float[Tensor, "blocks size size"] | None = None,
    ) -> Float[Tensor, "out k"]:
        """`feed_tiles_` for this grid, in one call of the compiled kernel."""
        scale, zero_point = self._of_columns(columns)
        piece, error = kernels.gptq_block_(work, upper, scale, zero_point, self.grid.bits, taken=taken)
        code.index_copy_(1, columns, piece)
        return error

    def decode(self, code: UInt8[Tensor, "out in"]) -> Float[Tensor, "out in"]:
        """``scale * (code - zero_point)``."""
        return kernels.affine_decode(code, self.scale, self.zero_point, self.group_size)

    def store(self, code: UInt8[Tensor, "out in"], shape: tuple[int, int]) -> Mapping[str, Tensor]:
        """Packed codes, scales, and zero points where the grid has them."""
        scale, zero_point = (
            part[:1] if self.grid.scale_per == "matrix" else part for part in (self.scale, self.zero_point)
        )
        found = {
            "packed": kernels.pack_bits(code.contiguous(), self.grid.bits),
            "scale": scale.to(self.grid.storage_dtype),
        }
        if self.grid.symmetric:
            return found
        return {**found, "zero_point": pack_bytes(zero_point.to(torch.uint8), self.grid.bits)}

    def storable(self, scale: Float[Tensor, "*any"]) -> Float[Tensor, "*any"]:
        """Scales rounded to the dtype they are stored in."""
        return scale.to(self.grid.storage_dtype).to(scale.dtype)

    def with_parameters(
        self, scale: Float[Tensor, "out groups"], zero_point: Float[Tensor, "out groups"]
    ) -> "FittedUniform":
        """The grid with other parameters, which can be stored exactly."""
        return replace(self, scale=scale, zero_point=zero_point)

    def descend_(
        self,
        code: UInt8[Tensor, "out in"],
        value: Float[Tensor, "out k"],
        gradient: Float[Tensor, "out k"],
        gram: Float[Tensor, "k k"],
        columns: Int[Tensor, " k"],
        *,
        curvature: Float[Tensor, "blocks size size"] | None = None,
    ) -> None:
        """Move columns to their best codes in turn, in one call of the compiled kernel."""
        scale, zero_point = self._of_columns(columns)
        piece = kernels.descend_block_(
            value, gradient, gram, scale, zero_point, bits=self.grid.bits, curvature=curvature
        )
        code.index_copy_(1, columns, piece)

    def refit_(
        self, scale: Tensor, zero_point: Tensor, pulls: Tensor, bends: Tensor, flat: Tensor, *, joint: Squares = None
    ) -> Float[Tensor, "2 out"]:
        """Move scales and zero points of one group, in one call of the compiled kernel."""
        grid = self.grid
        stored = {"bits": grid.bits, "symmetric": grid.symmetric, "scale_dtype": grid.storage_dtype}
        return kernels.refit_group_(scale, zero_point, pulls, bends, flat, **stored, joint=joint)

    def take_rows(self, rows: slice) -> "FittedUniform":
        """The grid of some rows."""
        scale = self.scale[rows]
        return replace(self, shape=(scale.shape[0], self.shape[1]), scale=scale, zero_point=self.zero_point[rows])

    def join_rows(self, code: Tensor, join: Callable[[Tensor, int], Tensor]) -> tuple[Tensor, "FittedUniform"]:
        """Codes and grid of the whole matrix."""
        scale = join(self.scale, 0)
        shape = scale.shape[0], self.shape[1]
        return join(code, 0), replace(self, shape=shape, scale=scale, zero_point=join(self.zero_point, 0))

    def scaled(self, factor: float) -> "FittedUniform":
        """The grid of ``factor`` times the values."""
        return replace(self, scale=self.scale * factor)

    def _of_columns(self, columns: Int[Tensor, " k"]) -> tuple[Float[Tensor, "out k"], Float[Tensor, "out k"]]:
        groups = columns // self.group_size
        return self.scale.index_select(1, groups), self.zero_point.index_select(1, groups)
