"""Grids of a fixed codebook: ``value = scale * codebook[code]`` with one scale per group of columns of a row."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from typing import ClassVar, Literal, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int, Integer
from torch import Tensor

from mezzotint.core.contracts import Bits
from mezzotint.errors import ConfigError
from mezzotint.grids import scales
from mezzotint.grids.feedback import feed_tiles_
from mezzotint.grids.packing import pack_codes, unpack_codes, word_count

Range = Literal["rms", "absmax", "error", "weighted"]

_STEPS = 12
_CHUNK = 2**16  # weights whose intermediate results stay in the cache


@runtime_checkable
class Codebook(Protocol):
    """Fixed values, in one dtype on one device; a code stands for ``width`` neighbouring columns.

    Attributes:
        deviation: standard deviation of the normal numbers that it is made for.
        largest: the largest absolute value in it.
        code_dtype: of codes.
    """

    width: int
    deviation: float
    largest: float
    code_dtype: torch.dtype

    def nearest(self, x: Float[Tensor, "*rows k"]) -> Integer[Tensor, "*rows tiles"]:
        """Codes of the nearest values; of two at the same distance the lower code."""
        ...

    def values(self, code: Integer[Tensor, "*rows tiles"]) -> Float[Tensor, "*rows k"]:
        """What codes stand for."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class CodebookGrid(ABC):
    """Settings that every grid of a codebook has.

    Attributes:
        group_size: input columns per scale; None is one group a row; ``auto`` the largest of 128, 64, 32 that
            divides every quantized matrix's width, else this one's, else None. The last group may be shorter.
        range: how a group's scale is chosen: ``rms``, the codebook's deviation is the root mean square of the group;
            ``absmax``, its largest value is that of the group; ``error``, the smallest squared error over scales around
            these; ``weighted``, the same weighted by the mean square of each input (diag H).
        scale_per: one scale a group; one a ``row``, or one for the whole ``matrix``, whatever the group size: for
            weights that a transform has made alike.
        scale_dtype: of the stored scales, rounded to it before codes are chosen; ``auto`` is the checkpoint's.
    """

    kind: ClassVar[str]
    group_size: scales.GroupSize = "auto"
    range: Range = "weighted"
    scale_per: scales.ScalePer = "group"
    scale_dtype: scales.ScaleDtype = "auto"

    @property
    @abstractmethod
    def bits(self) -> float:
        """Bits of a weight's share of a code."""

    @property
    @abstractmethod
    def tile(self) -> tuple[int, int]:
        """(1, columns a code stands for)."""

    @property
    @abstractmethod
    def index_bits(self) -> int:
        """Bits of one code: of one tile."""

    @abstractmethod
    def codebook(self, dtype: torch.dtype, device: torch.device) -> Codebook:
        """The values."""

    @property
    def multiple(self) -> tuple[int, int]:
        """Whole tiles."""
        return self.tile

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

    def resolve(self, shape: tuple[int, int], dtype: torch.dtype, widths: Collection[int] = ()) -> "CodebookGrid":
        """The grid with every ``auto`` decided for a matrix of that shape in a checkpoint of that dtype.

        Raises:
            ConfigError: the width is not a whole number of tiles.
        """
        if shape[1] % self.tile[1]:
            raise ConfigError(
                f"grid {self.kind!r} encodes {self.tile[1]} columns together; a matrix of {shape[1]} columns does not "
                "divide. Use grid.kind=lookup for it."
            )
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
        """Codes; scales and what fills up the last word of a row. The codebook itself is part of the program."""
        return Bits.of(shape[0] * (shape[1] // self.tile[1]) * self.index_bits, self.specs(shape))

    def specs(self, shape: tuple[int, int]) -> Mapping[str, tuple[torch.dtype, tuple[int, ...]]]:
        """Codes packed as by `pack_codes`, and scales; the codebook follows from the settings."""
        rows, columns = shape
        stored = self._stored_scales(shape)
        return {
            "packed": (torch.int32, (rows, word_count(columns // self.tile[1], self.index_bits))),
            "scale": (self.storage_dtype, stored),
        }

    def _stored_scales(self, shape: tuple[int, int]) -> tuple[int, int]:
        if self.scale_per == "matrix":
            return 1, 1
        return shape[0], -(-shape[1] // self.columns_per_group(shape[1]))

    def restore(
        self, shape: tuple[int, int], stored: Mapping[str, Tensor]
    ) -> tuple[Integer[Tensor, "out tiles"], "FittedCodebook"]:
        """The inverse of `FittedCodebook.store`."""
        scale = stored["scale"].float()
        scale = scale.expand(shape[0], 1) if self.scale_per == "matrix" else scale
        fitted = FittedCodebook(grid=self, shape=shape, scale=scale.contiguous())
        dtype = self.codebook(fitted.scale.dtype, fitted.scale.device).code_dtype
        return unpack_codes(stored["packed"], self.index_bits, shape[1] // self.tile[1], dtype), fitted

    def fit(self, target: Float[Tensor, "out in"], importance: Float[Tensor, " in"] | None) -> "FittedCodebook":
        """Scales for one target, by the setting ``range``.

        Raises:
            ConfigError: the range is weighted and there is no importance.
        """
        importance = scales.importance_for(self.range, importance, "'error' or 'rms'")
        wide = target.detach() if target.dtype == torch.float64 else target.detach().float()
        rows, width = wide.shape
        weight = torch.ones_like(wide[0]) if importance is None else importance.to(wide)
        search = ScaleSearch(
            codebook=self.codebook(wide.dtype, wide.device),
            range=self.range,
            size=rows * width if self.scale_per == "matrix" else self.columns_per_group(width),
            dtype=self.storage_dtype,
        )
        if self.scale_per == "matrix":
            scale = search.scale(wide.reshape(1, -1), weight.repeat(rows)).expand(rows, 1).contiguous()
            return FittedCodebook(grid=self, shape=(rows, width), scale=scale)
        step = max(1, _CHUNK // width)
        pieces = [search.scale(wide[start : start + step], weight) for start in range(0, rows, step)]
        return FittedCodebook(grid=self, shape=(rows, width), scale=torch.cat(pieces))


@dataclass(frozen=True, slots=True, kw_only=True)
class ScaleSearch:
    """How the scales of groups are chosen.

    Attributes:
        size: columns of a full group.
        dtype: that scales are stored in.
    """

    codebook: Codebook
    range: Range
    size: int
    dtype: torch.dtype

    def scale(self, target: Float[Tensor, "rows n"], weight: Float[Tensor, " n"]) -> Float[Tensor, "rows groups"]:
        """Scales of some rows; 0 for a group of zeros, which decodes to zeros whatever the codebook holds.

        For ``error`` and ``weighted``: the rms range, then 12 steps from half of it to one and a half times it or the
        absmax range, if that is more; then twice 4 scales around the best, thirds of a step apart. The first of equals
        wins.
        """
        values, weights = scales.grouped(target, self.size), scales.grouped(weight[None], self.size)[0]
        inside = scales.grouped(torch.ones_like(weight)[None], self.size)[0].sum(1)
        power = values.square().sum(2, dtype=torch.float64) / inside.double()
        is_zero = power == 0
        by_rms = (power.sqrt() / self.codebook.deviation).to(target.dtype)
        by_max = values.abs().amax(2) / self.codebook.largest
        if self.range in ("rms", "absmax"):
            return torch.where(is_zero, 0.0, self._stored(by_rms if self.range == "rms" else by_max))
        best = self._stored(by_rms)
        least = self._loss(values, weights, best)

        def improve(candidate: Tensor) -> None:
            nonlocal best, least
            scale = self._stored(candidate)
            loss = self._loss(values, weights, scale)
            best = torch.where(loss < least, scale, best)
            least = torch.minimum(loss, least)

        low, high = 0.5 * by_rms, torch.maximum(1.5 * by_rms, by_max)
        step = (high - low) / (_STEPS - 1)
        for i in range(_STEPS):
            improve(low + i * step)
        for _ in range(2):
            step, centre = step / 3, best
            for i in (-2, -1, 1, 2):
                improve(centre + i * step)
        return torch.where(is_zero, 0.0, best)

    def _loss(self, values: Tensor, weights: Tensor, scale: Tensor) -> Float[Tensor, "rows groups"]:
        """Weighted squared error in units of the scale, brought back in float64."""
        x = values / scale.unsqueeze(2)
        error = self.codebook.values(self.codebook.nearest(x)) - x
        return (error * error * weights).sum(2, dtype=torch.float64) * scale.double().square()

    def _stored(self, scale: Float[Tensor, "rows groups"]) -> Float[Tensor, "rows groups"]:
        limits = torch.finfo(self.dtype)
        return scale.clamp(limits.smallest_normal, limits.max).to(self.dtype).to(scale.dtype)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class FittedCodebook:
    """Grid of a codebook with the scales of one matrix; codes are ``[out, in / tile]``.

    Attributes:
        scale: ``[out, groups]``, values that the storage dtype represents exactly; 0 for groups of zeros.
    """

    grid: CodebookGrid
    shape: tuple[int, int]
    scale: Float[Tensor, "out groups"]

    @property
    def parameters(self) -> Mapping[str, Tensor]:
        """The scales."""
        return {"scale": self.scale}

    @property
    def affine(self) -> None:
        """The values of a codebook are not evenly spaced."""
        return

    @property
    def group_size(self) -> int:
        """Columns of a full group."""
        return self.grid.columns_per_group(self.shape[1])

    def new_code(self) -> Integer[Tensor, "out tiles"]:
        """An empty code tensor."""
        shape = (self.shape[0], self.shape[1] // self.grid.tile[1])
        return torch.empty(shape, dtype=self._codebook(self.scale.dtype).code_dtype, device=self.scale.device)

    def encode_(
        self, code: Integer[Tensor, "out tiles"], values: Float[Tensor, "out k"], columns: Int[Tensor, " k"]
    ) -> Float[Tensor, "out k"]:
        """Write the nearest codes of whole tiles of columns into ``code`` and return what they decode to."""
        width, scale = self.grid.tile[1], self._of_columns(columns)
        piece = self._nearest(values, scale)
        code.index_copy_(1, columns[::width] // width, piece)
        return self._values(piece, scale)

    def encode(self, values: Float[Tensor, "out in"]) -> Integer[Tensor, "out tiles"]:
        """The nearest codes of a whole matrix, of any floating dtype."""
        return self._nearest(values, self._of_columns(torch.arange(self.shape[1], device=self.scale.device)))

    def feed_(
        self,
        code: Integer[Tensor, "out tiles"],
        work: Float[Tensor, "out k"],
        upper: Float[Tensor, "k k"],
        columns: Int[Tensor, " k"],
    ) -> Float[Tensor, "out k"]:
        """`feed_tiles_` for this grid."""
        return feed_tiles_(self, code, work, upper, columns)

    def decode(self, code: Integer[Tensor, "out tiles"]) -> Float[Tensor, "out in"]:
        """``scale * codebook[code]``."""
        return self._values(code, self._of_columns(torch.arange(self.shape[1], device=self.scale.device)))

    def store(self, code: Integer[Tensor, "out tiles"], shape: tuple[int, int]) -> Mapping[str, Tensor]:
        """Packed codes and scales."""
        scale = self.scale[:1] if self.grid.scale_per == "matrix" else self.scale
        return {"packed": pack_codes(code, self.grid.index_bits), "scale": scale.to(self.grid.storage_dtype)}

    def storable(self, scale: Float[Tensor, "*any"]) -> Float[Tensor, "*any"]:
        """Scales rounded to the dtype they are stored in."""
        return scale.to(self.grid.storage_dtype).to(scale.dtype)

    def with_scale(self, scale: Float[Tensor, "out groups"]) -> "FittedCodebook":
        """The grid with other scales, which the storage dtype represents exactly."""
        return replace(self, scale=scale)

    def take_rows(self, rows: slice) -> "FittedCodebook":
        """The grid of some rows."""
        scale = self.scale[rows]
        return replace(self, shape=(scale.shape[0], self.shape[1]), scale=scale)

    def join_rows(self, code: Tensor, join: Callable[[Tensor, int], Tensor]) -> tuple[Tensor, "FittedCodebook"]:
        """Codes and grid of the whole matrix."""
        scale = join(self.scale, 0)
        return join(code, 0), replace(self, shape=(scale.shape[0], self.shape[1]), scale=scale)

    def scaled(self, factor: float) -> "FittedCodebook":
        """The grid of ``factor`` times the values."""
        return replace(self, scale=self.scale * factor)

    def _codebook(self, dtype: torch.dtype) -> Codebook:
        return self.grid.codebook(dtype, self.scale.device)

    def _of_columns(self, columns: Int[Tensor, " k"]) -> Float[Tensor, "out k"]:
        return self.scale.index_select(1, columns // self.group_size)

    def _nearest(self, values: Float[Tensor, "out k"], scale: Float[Tensor, "out k"]) -> Integer[Tensor, "out tiles"]:
        x = values.detach() / scale.masked_fill(scale == 0, torch.inf)  # groups of zeros: all the same code
        return self._codebook(x.dtype).nearest(x)

    def _values(self, code: Integer[Tensor, "out tiles"], scale: Float[Tensor, "out k"]) -> Float[Tensor, "out k"]:
        return scale * self._codebook(scale.dtype).values(code)
