"""Attention in pieces: scores of some windows and some rows at a time, never of all of them.

Heads are grouped as the model groups them: query head ``g * own + i`` reads key and value head ``g``.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

PIECE = 2**18  # scores at a time: 1 MiB in float32, which stays in the cache of a core
ROWS = 64  # of queries at a time: under a causal mask nearly half of the products are saved
KEPT = 2**23  # numbers of attention that are kept of a batch between passes: 32 MiB in float32

Side = Literal["q", "k"]
Metric = Literal["plain", "attention"]


class Pair(NamedTuple):
    """Queries and keys as attention multiplies them: positions and norms applied."""

    query: Float[Tensor, "windows heads seqlen dim"]
    key: Float[Tensor, "windows groups seqlen dim"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Pattern:
    """What attention does between products.

    Attributes:
        scaling: of the scores.
        softcap: scores become ``softcap * tanh(score / softcap)``; None leaves them.
        visible: which keys (last axis) a query sees, of each window or of all; None: itself and all before it.
        weights: of each query's row in losses: zero for padding; None is one each.
        sinks: a score per head that competes for attention and brings no value; None: there are none.
    """

    scaling: float
    softcap: float | None = None
    visible: Bool[Tensor, "some seqlen seqlen"] | None = None
    weights: Float[Tensor, "windows seqlen"] | None = None
    sinks: Float[Tensor, " heads"] | None = None

    def tokens(self, inputs: Float[Tensor, "windows seqlen any"]) -> float:
        """How many tokens of a batch count."""
        return float(inputs.shape[0] * inputs.shape[1]) if self.weights is None else float(self.weights.sum())

    @property
    def causal(self) -> bool:
        """No query sees a later key."""
        return self.visible is None or not bool(self.visible.triu(1).any())


class Piece(NamedTuple):
    """Some windows, some rows of queries, and the keys that these may see."""

    windows: slice
    rows: slice
    keys: slice
    seen: Bool[Tensor, "some 1 1 rows keys"]


def pieces(pattern: Pattern, like: Float[Tensor, "windows heads seqlen dim"]) -> Iterator[Piece]:
    """Cut the scores of all windows, heads and tokens into pieces of about `PIECE` numbers."""
    windows, heads, seqlen = like.shape[:3]
    rows = max(1, min(seqlen, ROWS, PIECE // (heads * seqlen)))
    count = max(1, PIECE // (heads * rows * seqlen))
    causal = pattern.causal
    for first in range(0, windows, count):
        some = slice(first, min(first + count, windows))
        for start in range(0, seqlen, rows):
            stop = min(start + rows, seqlen)
            keys = slice(0, stop if causal else seqlen)
            if pattern.visible is None:
                seen = torch.ones(1, stop - start, keys.stop, dtype=torch.bool, device=like.device).tril(start)
            else:
                visible = pattern.visible
                seen = visible[some if visible.shape[0] > 1 else slice(None), start:stop, keys]
            yield Piece(some, slice(start, stop), keys, seen[:, None, None])


def grouped(query: Float[Tensor, "windows heads seqlen dim"], groups: int) -> Tensor:
    """Query heads beside the key head that they share, ``[windows, groups, own, seqlen, dim]``."""
    return query.unflatten(1, (groups, -1))


class Scores:
    """How far the scores of one pair are from those of another: its gradient, and its curvature in one of the sides.

    Args:
        at: queries and keys.
        pattern: of attention.
        target: queries and keys whose scores are to be reached.
        attention: how differences ``d`` of a query's scores are measured: None by ``d'd``; the target's attention ``p``
            by ``d' (diag(p) - p p') d``, twice what attention loses in nats of KL to second order: what no query
            attends to, and what softmax cancels, costs nothing.
    """

    def __init__(self, at: Pair, pattern: Pattern, target: Pair, attention: "Mixer | None" = None) -> None:
        self._pattern = pattern
        self._at, self._target = _scaled(at, pattern), _scaled(target, pattern)
        self._attention = attention

    def loss(self) -> float:
        """``sum over heads |M o (S - T)|^2``, M the mask (LPCD, arXiv 2512.01546, section 4), in the metric."""
        total = 0.0
        for piece, taken in self._pieces():
            difference, _ = self._difference(piece)
            total += _dot(difference, self._measured(difference, piece, taken))
        return total

    def gradient(self, side: Side) -> tuple[float, Tensor]:
        """The loss, and the gradient of half of it in the queries or the keys."""
        result = torch.zeros_like(self._at.query if side == "q" else self._at.key)
        total = 0.0
        for piece, taken in self._pieces():
            difference, slope = self._difference(piece)
            measured = self._measured(difference, piece, taken)
            total += _dot(difference, measured)
            self._pull_(result, side, piece, measured if slope is None else measured * slope)
        return total, result if side == "k" else result.mul_(self._pattern.scaling)

    def curvature(self, side: Side, change: Tensor) -> Tensor:
        """``J' M J change`` for a change of the queries or the keys, M the metric."""
        result = torch.zeros_like(change)
        scaling, cap = self._pattern.scaling, self._pattern.softcap
        pushed = Pair(change * scaling, self._at.key) if side == "q" else Pair(self._at.query, change)
        for piece, taken in self._pieces():
            scores = _plain(pushed, piece)
            slope = None if cap is None else _slope(_plain(self._at, piece), cap)
            measured = self._measured(scores if slope is None else scores.mul_(slope), piece, taken)
            self._pull_(result, side, piece, measured if slope is None else measured.mul_(slope))
        return result if side == "k" else result.mul_(scaling)

    def _pieces(self) -> Iterator[tuple[Piece, Tensor | None]]:
        if self._attention is not None:
            yield from self._attention.probabilities()
        else:
            for piece in pieces(self._pattern, self._at.query):
                yield piece, None

    def _measured(self, difference: Tensor, piece: Piece, taken: Tensor | None) -> Tensor:
        """The metric times a difference; zero for scores that are not seen, and for padding."""
        if taken is None:
            found = difference * piece.seen
        else:  # what is not seen is not taken; with sinks the rest is lost, and its scores have no difference
            found = taken * difference
            found.addcmul_(taken, found.sum(-1, keepdim=True), value=-1)
        weights = self._pattern.weights
        return found if weights is None else found.mul_(weights[piece.windows, None, None, piece.rows, None])

    def _difference(self, piece: Piece) -> tuple[Tensor, Tensor | None]:
        cap, at = self._pattern.softcap, _plain(self._at, piece)
        if cap is None:
            return at.sub_(_plain(self._target, piece)), None
        return _capped(at, cap) - _capped(_plain(self._target, piece), cap), _slope(at, cap)

    def _pull_(self, result: Tensor, side: Side, piece: Piece, scores: Tensor) -> None:
        """Add ``scores`` times the other side to the piece's part of ``result``, less the scaling of queries."""
        flat = scores.flatten(2, 3)  # [some, groups, own * rows, keys]
        if side == "q":
            found = flat @ self._at.key[piece.windows, :, piece.keys]
            found = found.unflatten(2, (-1, piece.rows.stop - piece.rows.start)).flatten(1, 2)
            result[piece.windows, :, piece.rows] += found
        else:
            query = grouped(self._at.query[piece.windows, :, piece.rows], scores.shape[1]).flatten(2, 3)
            result[piece.windows, :, piece.keys] += flat.transpose(-1, -2) @ query


class Mixer:
    """Attention with given scores, as a linear map of the values.

    Args:
        pair: queries and keys.
        pattern: of attention.
    """

    def __init__(self, pair: Pair, pattern: Pattern) -> None:
        self._pattern = pattern
        self._pair = _scaled(pair, pattern)
        self._pieces = list(pieces(pattern, pair.query))
        self._kept: dict[int, Tensor] = {}
        self._room = KEPT

    def probabilities(self) -> Iterator[tuple[Piece, Float[Tensor, "some groups own rows keys"]]]:
        """What each query takes of each value, piece by piece; as much as there is room for is kept."""
        for number, piece in enumerate(self._pieces):
            taken = self._kept.get(number)
            if taken is None:
                taken = self._taken(piece)
                if taken.numel() <= self._room:
                    self._room -= taken.numel()
                    self._kept[number] = taken
            yield piece, taken

    def _taken(self, piece: Piece) -> Tensor:
        """Softmax over keys, and the sinks where there are some."""
        scores, cap = _plain(self._pair, piece), self._pattern.softcap
        scores = scores if cap is None else _capped(scores, cap)
        scores = scores.masked_fill_(~piece.seen, torch.finfo(scores.dtype).min)
        if self._pattern.sinks is None:
            return scores.softmax(-1)
        sinks = self._pattern.sinks.to(scores).view(1, scores.shape[1], -1, 1, 1)
        wide = torch.cat([scores, sinks.expand(*scores.shape[:-1], 1)], -1)
        return wide.softmax(-1)[..., :-1]

    @staticmethod
    def mixed(piece: Piece, taken: Tensor, value: Float[Tensor, "windows groups seqlen dim"]) -> Tensor:
        """Outputs of all heads beside each other, ``[some, rows, heads * dim]``."""
        flat = taken.flatten(2, 3) @ value[piece.windows, :, piece.keys]
        heads = flat.unflatten(2, taken.shape[2:4]).flatten(1, 2)  # [some, heads, rows, dim]
        return heads.transpose(1, 2).flatten(2)

    @staticmethod
    def pull_(result: Float[Tensor, "windows groups seqlen dim"], piece: Piece, taken: Tensor, outputs: Tensor) -> None:
        """Add the transpose of `mixed`, applied to ``outputs``, to ``result``. Modifies it."""
        groups, own = taken.shape[1:3]
        heads = outputs.unflatten(2, (groups * own, -1)).transpose(1, 2)  # [some, heads, rows, dim]
        flat = heads.unflatten(1, (groups, own)).flatten(2, 3)
        result[piece.windows, :, piece.keys] += taken.flatten(2, 3).transpose(-1, -2) @ flat


def _scaled(pair: Pair, pattern: Pattern) -> Pair:
    """Queries times the scaling of the scores."""
    return Pair(pair.query * pattern.scaling, pair.key)


def _plain(pair: Pair, piece: Piece) -> Float[Tensor, "some groups own rows keys"]:
    key = pair.key[piece.windows, :, piece.keys]
    query = grouped(pair.query[piece.windows, :, piece.rows], key.shape[1])
    flat = query.flatten(2, 3) @ key.transpose(-1, -2)  # [some, groups, own * rows, keys]
    return flat.unflatten(2, query.shape[2:4])


def _dot(a: Tensor, b: Tensor) -> float:
    return float(a.flatten() @ b.flatten())


def _capped(scores: Tensor, cap: float) -> Tensor:
    return cap * torch.tanh(scores / cap)


def _slope(scores: Tensor, cap: float) -> Tensor:
    """Derivative of ``cap * tanh(scores / cap)``."""
    return 1 - torch.tanh(scores / cap).square()
