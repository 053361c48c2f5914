"""Queries and keys: scores before the softmax."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import ClassVar

from jaxtyping import Float
from torch import Tensor

from mezzotint.core.statistics import Statistics
from mezzotint.submodules.batches import AttentionBatch, Linears, slopes
from mezzotint.submodules.relax import Search, Slope, derivative, relax
from mezzotint.submodules.scores import Metric, Mixer, Pair, Scores, Side


@dataclass(frozen=True, slots=True, kw_only=True)
class QueryKey:
    """``sum over heads |M o (Q K' - S)|^2`` (LPCD, arXiv 2512.01546, section 4; MATH.md section 9).

    Given keys it is a least-squares problem in the queries' weight and the other way round: positions are a linear map
    of each token. Norms of queries and keys and capped scores are not linear; they get steps of Gauss-Newton.

    The key step that the paper prints takes ``vec(S)`` and the mask of the queries; it must be those of ``S'``. Here
    both sides are derivatives of one sum, so there is nothing to transpose.

    Attributes:
        originals: q and k of the full-precision model.
        metric: of scores: ``plain`` as in the paper, or by the target's ``attention``, see `Scores`.
    """

    members: ClassVar[tuple[str, ...]] = ("q", "k")
    originals: Linears
    metric: Metric = "plain"

    def target(self, batch: AttentionBatch) -> Pair:
        """Queries and keys of the full-precision stream; their scores are never kept."""
        weights = self.originals["q"].weight, self.originals["k"].weight
        return batch.target.get(weights, lambda: self._pair(self.originals, batch, batch.original))

    def energy(self, batch: AttentionBatch) -> float:
        """Sum of squares of the full-precision scores."""
        target = self.target(batch)
        nothing = Pair(target.query * 0, target.key)
        return Scores(nothing, batch.pattern, target, self._attention(batch)).loss()

    def loss(self, linears: Linears, batch: AttentionBatch) -> float:
        """Sum of squares of what the scores miss."""
        return self._scores(self._pair(linears, batch, batch.inputs), batch).loss()

    def relax(
        self,
        member: str,
        linears: Linears,
        batches: Callable[[], Iterable[AttentionBatch]],
        fit: Statistics,
        *,
        start: Float[Tensor, "rows in"],
        search: Search,
    ) -> Float[Tensor, "rows in"]:
        """The weight of q or k that is best for the scores, the other one held fixed."""
        return relax(slopes(self, member, linears, batches), start, self.originals[member].weight, fit, search=search)

    def slope(self, member: str, linears: Linears, batch: AttentionBatch) -> Slope:
        """The problem of a member around ``linears`` on one batch."""
        side: Side = "q" if member == "q" else "k"
        outputs = linears[side](batch.inputs)
        value, push, pull, linear = derivative(batch.query if side == "q" else batch.key, outputs)
        if side == "q":
            pair = Pair(value, batch.key(linears["k"](batch.inputs)))
        else:
            pair = Pair(batch.query(linears["q"](batch.inputs)), value)
        scores = self._scores(pair, batch)

        def residual() -> tuple[float, Tensor]:
            loss, gradient = scores.gradient(side)
            return loss, pull(gradient).flatten(0, 1)

        def curvature(change: Tensor) -> Tensor:
            return pull(scores.curvature(side, push(change.view_as(outputs)))).flatten(0, 1)

        return Slope(
            inputs=batch.inputs.flatten(0, 1),
            tokens=batch.pattern.tokens(batch.inputs),
            residual=residual,
            curvature=curvature,
            linear=linear and batch.pattern.softcap is None,
        )

    def _scores(self, pair: Pair, batch: AttentionBatch) -> Scores:
        return Scores(pair, batch.pattern, self.target(batch), self._attention(batch))

    def _attention(self, batch: AttentionBatch) -> Mixer | None:
        """That of the full-precision stream."""
        if self.metric == "plain":
            return None
        weights = self.originals["q"].weight, self.originals["k"].weight
        return batch.mixer.get(weights, lambda: Mixer(self.target(batch), batch.pattern))

    @staticmethod
    def _pair(linears: Linears, batch: AttentionBatch, inputs: Tensor) -> Pair:
        return Pair(batch.query(linears["q"](inputs)), batch.key(linears["k"](inputs)))
