"""Scales and minima of GGUF blocks of least weighted error, their own rounding included.

All tensors of a search have the axes ``[rows, blocks, groups, columns]``, or less the last ones. The squared error of
a group for fixed codes is a quadratic of its scale and minimum, so that a few sums over its columns (`_Sums`) stand for
the columns, and candidates of stored scales are compared at the cost of groups, not of weights.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from mezzotint.grids.gguf.types import BlockType

_FACTORS = {
    2: 16,
    3: 16,
    4: 14,
    5: 12,
    6: 6,
    8: 3,
}  # candidates of a group's scale, by bits: fewer where steps are fine
_SHRUNK = {2: 0.65, 3: 0.5, 4: 0.4, 5: 0.25, 6: 0.12, 8: 0.03}  # the share of the range that the narrowest leaves out
_SUPER_FACTORS = torch.linspace(0.8, 1.2, 17, dtype=torch.float64)
_ROUNDS = 3
_FLAT = 1e-6  # a determinant below this share of what it could be says that there is no slope to fit


class Parameters(NamedTuple):
    """Stored parameters of blocks; what a type does not have is one (``sub``) or zero (``super_min``)."""

    super_scale: Float[Tensor, "rows blocks 1"]
    sub_scale: Float[Tensor, "rows blocks groups"]
    super_min: Float[Tensor, "rows blocks 1"]
    sub_min: Float[Tensor, "rows blocks groups"]

    @property
    def scale(self) -> Float[Tensor, "rows blocks groups"]:
        """Of each group."""
        return self.super_scale * self.sub_scale

    @property
    def least(self) -> Float[Tensor, "rows blocks groups"]:
        """What is subtracted in each group."""
        return self.super_min * self.sub_min


class _Sums(NamedTuple):
    """Weighted sums over the columns of each group: of codes ``q`` and of values ``x``."""

    qq: Tensor
    q: Tensor
    xq: Tensor
    w: Tensor
    x: Tensor

    def loss(self, scale: Tensor, least: Tensor) -> Tensor:
        """Squared error of ``scale q - least``, less that of zero."""
        return scale * (scale * self.qq - 2 * (self.xq + least * self.q)) + least * (least * self.w + 2 * self.x)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class BlockSearch:
    """The search for the parameters of some rows.

    Attributes:
        x: values.
        w: weight of each column's squared error, positive.
    """

    block_type: BlockType
    x: Float[Tensor, "rows blocks groups n"]
    w: Float[Tensor, "1 blocks groups n"]

    def parameters(self) -> Parameters:
        """Parameters of least ``sum w (x - decoded)^2`` of those that the search meets.

        First each group has its best scale (and minimum), unrounded, over shrunken ranges, refitted to the codes of
        each. Then these are rounded to what is stored, and codes, super scales and sub scales refitted in turn; the
        best of all rounds is kept for each block.
        """
        found = self._stored(*self._ideal())
        sums = self._sums(found.scale, found.least)
        best, best_loss = found, sums.loss(found.scale, found.least).sum(2, keepdim=True)
        for _ in range(_ROUNDS):
            found = self._refitted(found, sums)
            sums = self._sums(found.scale, found.least)
            loss = sums.loss(found.scale, found.least).sum(2, keepdim=True)
            better = loss < best_loss
            best = Parameters(*(torch.where(better, new, old) for new, old in zip(found, best, strict=True)))
            best_loss = torch.minimum(loss, best_loss)
        if self.block_type.values is not None:  # no code stands for zero
            best = best._replace(super_scale=best.super_scale.masked_fill((self.x == 0).all(3), 0.0))
        return best

    def _sums(self, scale: Tensor, least: Tensor) -> _Sums:
        """Of the nearest codes, in units of the scale."""
        q = nearest_units(self.block_type, (self.x + least[..., None]) / scale[..., None])
        wq = self.w * q
        wx = self.w * self.x
        return _Sums((wq * q).sum(3), wq.sum(3), (wx * q).sum(3), self.w.sum(3), wx.sum(3))

    def _ideal(self) -> tuple[Tensor, Tensor]:
        """The best unrounded scale and minimum of each group; scales of groups of zeros are tiny."""
        best: tuple[Tensor, Tensor, Tensor] | None = None
        for scale, least in self._candidates():
            sums = self._sums(scale, least)
            scale, least = self._line(sums, scale)
            loss = sums.loss(scale, least)
            if best is None:
                best = scale, least, loss
            better = loss < best[2]
            best = (
                torch.where(better, scale, best[0]),
                torch.where(better, least, best[1]),
                torch.minimum(loss, best[2]),
            )
        assert best is not None
        return best[0], best[1]

    def _candidates(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Scales and minima to start from: of the whole range of a group and of shrunken ones."""
        t, low, high = self.block_type, self.x.amin(3).clamp_max(0), self.x.amax(3).clamp_min(0)
        tiny, zero = torch.finfo(low.dtype).smallest_normal, torch.zeros_like(low)
        below, above = t.reach
        count = _FACTORS[t.bits]
        for i in range(count):
            p = 1 - _SHRUNK[t.bits] * i / count
            if t.has_min:
                width = p * (high - low)
                scale = (width / above).clamp_min(tiny)
                yield scale, -p * low
                if i:  # the same width, but from the lowest value on, and up to the highest
                    yield scale, -low
                    yield scale, width - high
                continue
            # the lowest code, which reaches furthest, for the lowest value or for the highest
            for sign, near, far in ((1.0, -low, high), (-1.0, high, -low)):
                scale = p * torch.maximum(near / below, far / (above + 0.5 * (i > 0)))
                yield sign * scale.clamp_min(tiny), zero

    def _line(self, sums: _Sums, otherwise: Tensor) -> tuple[Tensor, Tensor]:
        """The best scale and minimum for codes; a K type has no negative minimum, and a minimum no negative scale."""
        alone = _ratio(sums.xq, sums.qq, otherwise)
        if not self.block_type.has_min:
            return alone, torch.zeros_like(alone)
        determinant = sums.qq * sums.w - sums.q * sums.q
        flat = determinant <= _FLAT * sums.qq * sums.w  # all codes equal, or nearly
        scale = (sums.xq * sums.w - sums.x * sums.q) / torch.where(flat, 1.0, determinant)
        scale = torch.where(flat | (scale <= 0), otherwise, scale)
        least = (scale * sums.q - sums.x) / sums.w
        if self.block_type.sub is not None:
            scale = torch.where((least < 0) & (alone > 0), alone, scale)
            least = least.clamp_min(0)
        return scale, least

    def _stored(self, scale: Tensor, least: Tensor) -> Parameters:
        """Parameters near the ideal ones."""
        t = self.block_type
        if t.sub is None:
            one = torch.ones_like(scale)
            return Parameters(nonzero_half(scale), one, half(least), one)
        sums = self._sums(scale, least)
        super_scale, sub_scale = _products(scale, sums.qq, t.sub)
        if not t.has_min:
            return Parameters(super_scale, sub_scale, torch.zeros_like(super_scale), torch.ones_like(scale))
        # the best minima once the scales are what they are
        least = ((super_scale * sub_scale * sums.q - sums.x) / sums.w).clamp_min(0)
        return Parameters(super_scale, sub_scale, *_products(least, sums.w, (0, t.sub[1])))

    def _refitted(self, found: Parameters, sums: _Sums) -> Parameters:
        """Super scales, then sub scales, that are best for the codes whose sums are given."""
        t = self.block_type
        if t.sub is None:
            scale, least = self._line(sums, found.super_scale)
            return found._replace(super_scale=nonzero_half(scale), super_min=half(least))
        return _subs_refitted(_super_refitted(found, sums, has_min=t.has_min), sums, t)


def nearest_units(t: BlockType, u: Tensor) -> Tensor:
    """What the nearest codes stand for in units of the scale, where ``u`` is wished; halves go to the even code."""
    if t.values is None:
        below, above = t.reach
        return u.round().clamp_(-below, above)
    return table_values(t, u)[nearest_entry(t, u)]


def table_values(t: BlockType, like: Tensor) -> Tensor:
    """The values of a type that has a table."""
    assert t.values is not None
    return torch.tensor(t.values, dtype=like.dtype, device=like.device)


def nearest_entry(t: BlockType, u: Tensor) -> Tensor:
    """Index of the nearest value of the table; a value halfway between two goes to the lower."""
    values = table_values(t, u)
    return torch.bucketize(u.contiguous(), (values[1:] + values[:-1]) / 2)


def half(value: Tensor) -> Tensor:
    """Rounded to float16."""
    limit = torch.finfo(torch.float16).max
    return value.clamp(-limit, limit).to(torch.float16).to(value.dtype)


def nonzero_half(scale: Tensor) -> Tensor:
    """Rounded to float16, but not to zero: the smallest become 2^-24."""
    rounded = half(scale)
    return rounded.masked_fill(rounded == 0, 2.0**-24)


def _ratio(numerator: Tensor, denominator: Tensor, otherwise: Tensor) -> Tensor:
    """The best scale for codes; ``otherwise`` where all codes are zero or it would be zero."""
    ratio = numerator / denominator.masked_fill(denominator == 0, 1.0)
    return torch.where((denominator == 0) | (ratio == 0), otherwise, ratio)


def _products(wish: Tensor, weight: Tensor, limits: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """A float16 of a block times whole numbers of its groups, of least ``sum weight (product - wish)^2``.

    Args:
        wish: ``[rows, blocks, groups]``.
        weight: of each.
        limits: of the whole numbers.
    """
    low, high = limits
    extreme = wish.gather(2, wish.abs().argmax(2, keepdim=True))
    best: tuple[Tensor, Tensor, Tensor] | None = None
    for end in (high,) if low >= 0 else (high, low):
        for factor in _SUPER_FACTORS.tolist():
            found = nonzero_half(extreme / end * factor)
            sub = _whole(wish / found, limits)
            loss = (weight * (found * sub - wish).square()).sum(2, keepdim=True)
            if best is None:
                best = found, sub, loss
            better = loss < best[2]
            best = torch.where(better, found, best[0]), torch.where(better, sub, best[1]), torch.minimum(loss, best[2])
    assert best is not None
    return best[0], best[1]


def _whole(value: Tensor, limits: tuple[int, int]) -> Tensor:
    """The nearest whole numbers within limits, and where negative ones are allowed not zero: a scale is none."""
    rounded = value.round().clamp(*limits)
    return rounded if limits[0] >= 0 else rounded.masked_fill(rounded == 0, 1.0)


def _super_refitted(found: Parameters, sums: _Sums, *, has_min: bool) -> Parameters:
    """Least squares of the super scale, and of the super minimum with it, for fixed codes and sub scales."""
    sub, least = found.sub_scale, found.sub_min
    qq, xq = (sub * sub * sums.qq).sum(2, keepdim=True), (sub * sums.xq).sum(2, keepdim=True)
    if not has_min:
        return found._replace(super_scale=nonzero_half(_ratio(xq, qq, found.super_scale)))
    qm, mm = (sub * least * sums.q).sum(2, keepdim=True), (least * least * sums.w).sum(2, keepdim=True)
    xm = (least * sums.x).sum(2, keepdim=True)
    determinant = qq * mm - qm * qm
    flat = determinant <= _FLAT * qq * mm
    safe = torch.where(flat, 1.0, determinant)
    scale, minimum = (xq * mm - xm * qm) / safe, (xq * qm - xm * qq) / safe
    keep = flat | (scale <= 0) | (minimum < 0)
    return found._replace(
        super_scale=torch.where(keep, found.super_scale, nonzero_half(scale)),
        super_min=torch.where(keep, found.super_min, half(minimum)),
    )


def _subs_refitted(found: Parameters, sums: _Sums, t: BlockType) -> Parameters:
    """The best of the sub scales, and minima, within one of the present ones, for fixed codes and super scales."""
    assert t.sub is not None
    best = found.sub_scale, found.sub_min, sums.loss(found.scale, found.least)
    for a in (-1, 0, 1):
        scale = _whole(found.sub_scale + a, t.sub)
        for b in (-1, 0, 1) if t.has_min else (0,):
            least = (found.sub_min + b).clamp(0, t.sub[1]) if t.has_min else found.sub_min
            loss = sums.loss(found.super_scale * scale, found.super_min * least)
            better = loss < best[2]
            best = (
                torch.where(better, scale, best[0]),
                torch.where(better, least, best[1]),
                torch.minimum(loss, best[2]),
            )
    return found._replace(sub_scale=best[0], sub_min=best[1])
