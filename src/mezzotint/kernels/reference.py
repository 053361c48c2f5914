"""The kernels in plain torch: any device, float64 kept in float64. The C++ is tested against these, bit for bit.

Elementwise steps are written in the order the C++ takes them, and sums use its sixteen accumulators and its tree.
"""

from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Float, Int32, UInt8
from torch import Tensor

from mezzotint.core.curvature import Squares

_LANES = 16


def pack_bits(code: UInt8[Tensor, "rows n"], bits: int) -> tuple[bool, Int32[Tensor, "rows words"]]:
    """Whether every code fits, and the packed words; see `mezzotint.kernels.pack_bits`."""
    rows, n = code.shape
    fits = not bool((code.to(torch.int32) >> bits).any())
    steps = torch.arange(bits, device=code.device)
    stream = (code[:, :, None].to(torch.int64) >> steps) & 1  # [rows, n, bits]
    words = -(-n * bits // 32)
    stream = torch.nn.functional.pad(stream.reshape(rows, n * bits), (0, words * 32 - n * bits))
    word = (stream.reshape(rows, words, 32) << torch.arange(32, device=code.device)).sum(dim=2)
    return fits, torch.where(word >= 2**31, word - 2**32, word).to(torch.int32)


def unpack_bits(packed: Int32[Tensor, "rows words"], bits: int, n: int) -> UInt8[Tensor, "rows n"]:
    """See `mezzotint.kernels.unpack_bits`."""
    rows, words = packed.shape
    stream = (packed[:, :, None].to(torch.int64) >> torch.arange(32, device=packed.device)) & 1  # [rows, words, 32]
    stream = stream.reshape(rows, words * 32)[:, : n * bits].reshape(rows, n, bits)
    return (stream << torch.arange(bits, device=packed.device)).sum(dim=2).to(torch.uint8)


def _common_dtype(*tensors: Tensor | None) -> torch.dtype:
    wide = any(t is not None and t.dtype == torch.float64 for t in tensors)
    return torch.float64 if wide else torch.float32


def _per_column(per_group: Float[Tensor, "rows groups"], group_size: int, n: int) -> Float[Tensor, "rows n"]:
    return per_group.repeat_interleave(min(group_size, max(n, 1)), dim=1)[:, :n]


def affine_encode(
    values: Float[Tensor, "rows n"],
    scale: Float[Tensor, "rows groups"],
    zero_point: Float[Tensor, "rows groups"],
    group_size: int,
    bits: int,
) -> UInt8[Tensor, "rows n"]:
    """See `mezzotint.kernels.affine_encode`."""
    dtype, n = _common_dtype(values, scale, zero_point), values.shape[1]
    scale, zero_point = (_per_column(t.to(dtype), group_size, n) for t in (scale, zero_point))
    return _encode(values.to(dtype), scale, zero_point, bits).to(torch.uint8)


def _encode(values: Tensor, scale: Tensor, zero_point: Tensor, bits: int) -> Tensor:
    return (torch.round(values / scale) + zero_point).clamp(0, 2**bits - 1)


def affine_decode(
    code: UInt8[Tensor, "rows n"],
    scale: Float[Tensor, "rows groups"],
    zero_point: Float[Tensor, "rows groups"],
    group_size: int,
) -> Float[Tensor, "rows n"]:
    """See `mezzotint.kernels.affine_decode`."""
    dtype, n = _common_dtype(scale, zero_point), code.shape[1]
    scale, zero_point = (_per_column(t.to(dtype), group_size, n) for t in (scale, zero_point))
    return scale * (code.to(dtype) - zero_point)


def min_max(
    values: Float[Tensor, "rows n"], group_size: int
) -> tuple[Float[Tensor, "rows groups"], Float[Tensor, "rows groups"]]:
    """See `mezzotint.kernels.min_max`."""
    rows, n = values.shape
    values = values.to(_common_dtype(values))
    whole = n // group_size
    pieces = [values[:, : whole * group_size].reshape(rows, whole, group_size)] if whole else []
    if n > whole * group_size:
        pieces.append(values[:, None, whole * group_size :])
    if not pieces:
        return values.new_empty(rows, 0), values.new_empty(rows, 0)
    return torch.cat([p.amin(dim=2) for p in pieces], dim=1), torch.cat([p.amax(dim=2) for p in pieces], dim=1)


def _stored(scale: Tensor, scale_dtype: torch.dtype) -> Tensor:
    limits = torch.finfo(scale_dtype)
    return scale.clamp(limits.smallest_normal, limits.max).to(scale_dtype).to(scale.dtype)


def _where_zero(
    scale: Tensor, zero_point: Tensor, is_zero: Tensor, symmetric: bool
) -> tuple[Float[Tensor, "rows groups"], Float[Tensor, "rows groups"]]:
    if not symmetric:
        zero_point = torch.where(is_zero, 0.0, zero_point)
    return torch.where(is_zero, 1.0, scale), zero_point


def full_range(
    low: Float[Tensor, "rows groups"],
    high: Float[Tensor, "rows groups"],
    bits: int,
    symmetric: bool,
    scale_dtype: torch.dtype,
) -> tuple[Float[Tensor, "rows groups"], Float[Tensor, "rows groups"]]:
    """Scale and zero point that clip nothing of ``[low, high]``, which has zero in it; see `min_max_range`."""
    half, top = 2 ** (bits - 1), 2**bits - 1
    if symmetric:
        scale = _stored(torch.maximum(-low / half, high / (half - 1)), scale_dtype)
        zero_point = torch.full_like(scale, half)
    else:
        scale = _stored((high - low) / top, scale_dtype)
        zero_point = torch.round(-low / scale).clamp(0, top)
    return _where_zero(scale, zero_point, low == high, symmetric)


@dataclass(frozen=True, slots=True, kw_only=True)
class RangeSearch:
    """Settings of `mezzotint.kernels.search_range`, and the search itself.

    Attributes:
        bits: of a code.
        symmetric: whether the zero point is fixed in the middle.
        scale_dtype: what scales are rounded to.
        span: how far from the nearest zero point to look.
        power: of errors.
    """

    bits: int
    symmetric: bool
    scale_dtype: torch.dtype
    span: int
    power: float = 2.0

    def run(
        self,
        values: Float[Tensor, "rows n"],
        group_size: int,
        importance: Float[Tensor, " n"] | None,
        fractions: Float[Tensor, "2 steps"],
    ) -> tuple[Float[Tensor, "rows groups"], Float[Tensor, "rows groups"]]:
        """Scale and zero point of the best candidate of each group."""
        dtype = _common_dtype(values, importance)
        grouped = _in_lanes(values.to(dtype), group_size)  # [rows, groups, chunks, 16]
        weight = None if importance is None else _in_lanes(importance.to(dtype)[None], group_size)
        low = grouped.amin(dim=(2, 3)).clamp(max=0) if grouped.numel() else grouped.new_zeros(grouped.shape[:2])
        high = grouped.amax(dim=(2, 3)).clamp(min=0) if grouped.numel() else low
        best_scale = best_zero_point = torch.zeros_like(low)
        best_error = torch.full(low.shape, torch.inf, dtype=torch.float64, device=low.device)
        for i, (scale, zero_point) in enumerate(self._candidates(low, high, fractions.to(dtype))):
            error = self._error(self._sums(grouped, weight, scale, zero_point).double(), scale.double())
            better = (error < best_error) if i else torch.ones_like(error, dtype=torch.bool)
            best_error = torch.where(better, error, best_error)
            best_scale = torch.where(better, scale, best_scale)
            best_zero_point = torch.where(better, zero_point, best_zero_point)
        return _where_zero(best_scale, best_zero_point, low == high, self.symmetric)

    def _candidates(self, low: Tensor, high: Tensor, fractions: Tensor):
        """Pairs of scale and zero point, ``[rows, groups]`` each, in the order that decides ties."""
        half, top = 2 ** (self.bits - 1), 2**self.bits - 1
        extreme = torch.maximum(-low, high)
        for p, between in fractions.T:
            if self.symmetric:
                yield _stored(p * extreme / half, self.scale_dtype), torch.full_like(low, half)
                yield _stored(between * extreme / (half - 0.5), self.scale_dtype), torch.full_like(low, half)
                continue
            scale = _stored(p * (high - low) / top, self.scale_dtype)
            centre = torch.round(-low * p / scale).clamp(0, top)
            yield scale, centre
            for d in range(1, self.span + 1):
                yield scale, (centre - d).clamp(0, top)
                yield scale, (centre + d).clamp(0, top)

    def _error(self, sums: Tensor, scale: Tensor) -> Tensor:
        """``scale**power`` times as much, to compare; its square where a root would not be exact."""
        if self.power == 2:
            return sums * (scale * scale)
        if self.power == 3:
            return sums * (scale * scale * scale)
        error = sums * (scale * scale)
        return error * error * scale

    def _sums(self, grouped: Tensor, weight: Tensor | None, scale: Tensor, zero_point: Tensor) -> Tensor:
        """``sum weight * |code - zero_point - value * (1 / scale)|**power`` of each group."""
        x = grouped * (1 / scale)[:, :, None, None]
        zero_point = zero_point[:, :, None, None]
        e = torch.minimum(torch.maximum(torch.round(x), -zero_point), (2**self.bits - 1) - zero_point) - x
        error = e * e
        if self.power != 2:
            error = error * (e.abs() if self.power == 3 else e.abs().sqrt())
        error = error if weight is None else error * weight
        total = torch.zeros_like(error[:, :, 0]) if error.shape[2] else error.new_zeros(*error.shape[:2], _LANES)
        for chunk in error.unbind(dim=2):
            total = total + chunk
        for width in (8, 4, 2, 1):
            total = total[..., :width] + total[..., width:]
        return total[..., 0]


def _in_lanes(values: Float[Tensor, "rows n"], group_size: int) -> Float[Tensor, "rows groups chunks lanes"]:
    """Groups cut into runs of sixteen, with zeros behind the end of each group."""
    rows, n = values.shape
    group_size = min(group_size, max(n, 1))
    groups = -(-n // group_size)
    padded = -(-group_size // _LANES) * _LANES
    values = torch.nn.functional.pad(values, (0, groups * group_size - n)).reshape(rows, groups, group_size)
    return torch.nn.functional.pad(values, (0, padded - group_size)).reshape(rows, groups, padded // _LANES, _LANES)


def gptq_block_(
    work: Float[Tensor, "rows k"],
    factor: Float[Tensor, "k k"],
    scale: Float[Tensor, "rows k"],
    zero_point: Float[Tensor, "rows k"],
    bits: int,
    *,
    taken: Float[Tensor, "blocks size size"] | None = None,
) -> tuple[UInt8[Tensor, "rows k"], Float[Tensor, "rows k"]]:
    """Modifies `work`; see `mezzotint.kernels.gptq_block_`."""
    factor, scale, zero_point = (t.to(work.dtype) for t in (factor, scale, zero_point))
    code, error = torch.empty_like(work, dtype=torch.uint8), torch.empty_like(work)
    for j in range(work.shape[1]):
        wish = work[:, j] if taken is None else _joint_wish(work[:, j], scale[:, j], zero_point[:, j], bits, taken)
        chosen = _encode(wish, scale[:, j], zero_point[:, j], bits)
        error[:, j] = (work[:, j] - scale[:, j] * (chosen - zero_point[:, j])) / factor[j, j]
        code[:, j] = chosen.to(torch.uint8)
        work[:, j] = wish
        work[:, j + 1 :] -= error[:, j, None] * factor[j, j + 1 :]
    return code, error


def _joint_wish(
    value: Float[Tensor, " rows"],
    scale: Float[Tensor, " rows"],
    zero_point: Float[Tensor, " rows"],
    bits: int,
    taken: Float[Tensor, "blocks size size"],
) -> Float[Tensor, " rows"]:
    """What the rows of a column are rounded from, each less what it takes of the errors before it in its block."""
    (value_, scale, zero_point), taken = _in_blocks(taken, value, scale, zero_point), taken.to(value.dtype)
    wish = value_.clone()
    for i in range(taken.shape[1]):
        now = scale[:, i] * (_encode(wish[:, i], scale[:, i], zero_point[:, i], bits) - zero_point[:, i])
        wish -= (now - value_[:, i])[:, None] * taken[:, i]
    return wish.flatten()[: len(value)]


def _in_blocks(between: Float[Tensor, "blocks size size"], *columns: Float[Tensor, " rows"]) -> list[Tensor]:
    """Columns as ``[blocks, size]``; rows behind the end are ones."""
    blocks, size, _ = between.shape
    return [torch.nn.functional.pad(c, (0, blocks * size - len(c)), value=1.0).view(blocks, size) for c in columns]


def descend_block_(
    value: Float[Tensor, "rows k"],
    gradient: Float[Tensor, "rows k"],
    gram: Float[Tensor, "k k"],
    scale: Float[Tensor, "rows k"],
    zero_point: Float[Tensor, "rows k"],
    *,
    bits: int,
    curvature: Float[Tensor, "blocks size size"] | None = None,
) -> UInt8[Tensor, "rows k"]:
    """Modifies `value`; see `mezzotint.kernels.descend_block_`."""
    gradient = gradient.to(value.dtype).clone()
    gram, scale, zero_point = (t.to(value.dtype) for t in (gram, scale, zero_point))
    code = torch.empty_like(value, dtype=torch.uint8)
    for j in range(value.shape[1]):
        column = value[:, j], gradient[:, j], scale[:, j], zero_point[:, j]
        if curvature is None:
            ideal = column[0] - column[1] / gram[j, j] if gram[j, j] > 0 else column[0]
            chosen = _encode(ideal, scale[:, j], zero_point[:, j], bits)
            change = scale[:, j] * (chosen - zero_point[:, j]) - value[:, j]
        else:
            chosen, change = _joint_descent(column, gram[j, j], bits, curvature.to(value.dtype))
        gradient[:, j + 1 :] += change[:, None] * gram[j, j + 1 :]
        value[:, j] = scale[:, j] * (chosen - zero_point[:, j])
        code[:, j] = chosen.to(torch.uint8)
    return code


def _joint_descent(
    column: tuple[Float[Tensor, " rows"], ...], spread: Float[Tensor, ""], bits: int, curvature: Float[Tensor, "b s s"]
) -> tuple[Float[Tensor, " rows"], Float[Tensor, " rows"]]:
    """Codes of a column, chosen row by row, and what their changes come to in every row of their block.

    ``column`` is value, gradient, scale and zero point.
    """
    count, like = len(column[0]), column[0]
    value, slope, scale, zero_point = _in_blocks(curvature, *column)
    slope, chosen, change = slope.clone(), torch.empty_like(value), torch.zeros_like(value)
    real = _in_blocks(curvature, torch.zeros_like(like))[0] == 0
    for i in range(curvature.shape[1]):
        bend = torch.where(real[:, i], curvature[:, i, i], 1.0) * spread
        ideal = value[:, i] - slope[:, i] / bend if spread > 0 else value[:, i]
        chosen[:, i] = _encode(ideal, scale[:, i], zero_point[:, i], bits)
        step = scale[:, i] * (chosen[:, i] - zero_point[:, i]) - value[:, i]
        given = torch.where(real[:, i], step, 0.0)[:, None] * curvature[:, i]
        change += given
        slope += given * spread
    return chosen.flatten()[:count], change.flatten()[:count]


def refit_group_(
    scale: Float[Tensor, " rows"],
    zero_point: Float[Tensor, " rows"],
    pulls: Float[Tensor, "2 rows"],
    bends: Float[Tensor, "2 rows"],
    flat: Float[Tensor, ""],
    *,
    bits: int,
    symmetric: bool,
    scale_dtype: torch.dtype,
    joint: Squares = None,
) -> Float[Tensor, "2 rows"]:
    """Modifies `scale` and `zero_point`; see `mezzotint.kernels.refit_group_`."""
    refit = partial(_refit, bits=bits, symmetric=symmetric, scale_dtype=scale_dtype)
    if joint is None:
        return refit(scale, zero_point, tuple(pulls), (*bends, flat))
    between, curvature = (squares.to(scale.dtype) for squares in joint)
    scales, zero_points, pull, lift, own, both = (
        _in_blocks(curvature, t)[0].clone() for t in (scale, zero_point, *pulls, *bends)
    )
    real = _in_blocks(curvature, torch.zeros_like(scale))[0] == 0
    steps = torch.zeros_like(pull), torch.zeros_like(pull)
    for i in range(curvature.shape[1]):
        weight = curvature[:, i, i]
        bend = weight * own[:, i], weight * both[:, i], weight * flat
        stretch, shift = refit(scales[:, i], zero_points[:, i], (pull[:, i], lift[:, i]), bend)
        stretch, shift = torch.where(real[:, i], stretch, 0.0), torch.where(real[:, i], shift, 0.0)
        steps[0][:, i], steps[1][:, i] = stretch, shift
        given = curvature[:, i] * shift[:, None]
        pull += between[:, i] * stretch[:, None] + given * both
        lift += curvature[:, i] * (stretch * both[:, i])[:, None] + given * flat
    scale.copy_(scales.flatten()[: len(scale)])
    zero_point.copy_(zero_points.flatten()[: len(scale)])
    return torch.stack([step.flatten()[: len(scale)] for step in steps])


def _refit(
    scale: Tensor,
    zero_point: Tensor,
    pulls: tuple[Tensor, ...],
    bends: tuple[Tensor, ...],
    *,
    bits: int,
    symmetric: bool,
    scale_dtype: torch.dtype,
) -> Float[Tensor, "2 rows"]:
    """Steps of rows that do not see each other; modifies `scale` and `zero_point`."""
    tiny = torch.finfo(scale.dtype).tiny
    bend, both, flat = bends
    ideal = scale - pulls[0] / bend.clamp_min(tiny)
    near = (ideal > 0.5 * scale) & (ideal < 2 * scale)
    step = torch.where((bend > tiny) & near, _stored(ideal, scale_dtype) - scale, 0.0)
    stretch = _falling(step, pulls[0], bend)
    scale.add_(stretch)
    if symmetric:
        return torch.stack([stretch, torch.zeros_like(stretch)])
    slope = pulls[1] + stretch * both
    wish = (zero_point + slope / flat.clamp_min(tiny) / scale).round().clamp(0, 2**bits - 1)
    shift = _falling(scale * (zero_point - wish), slope, flat)
    zero_point.copy_(torch.where(shift == 0, zero_point, wish))
    return torch.stack([stretch, shift])


def _falling(step: Tensor, slope: Tensor, bend: Tensor) -> Tensor:
    """The steps that lower ``step^2 bend + 2 step slope``, zero for the others."""
    return torch.where(step * (step * bend + 2 * slope) < 0, step, 0.0)


def hadamard(values: Float[Tensor, "rows n"], block: int) -> Float[Tensor, "rows n"]:
    """See `mezzotint.kernels.hadamard`."""
    rows, n = values.shape
    x = values.to(_common_dtype(values))
    stride = 1
    while stride < block:
        low, high = x.reshape(rows, n // (2 * stride), 2, stride).unbind(dim=2)
        x = torch.stack((low + high, low - high), dim=2)
        stride *= 2
    return x.reshape(rows, n) * block**-0.5
