"""Queries and keys: scores before the softmax."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import ClassVar

from jaxtyping import Float
from torch import Tensor

from mezzotint.core.statistics import Statistics
from mezzotint.submodules.batches import AttentionBatch, Linears
from mezzotint.submodules.relax import Search, Slope, is_linear, relax, slopes_of
from mezzotint.submodules.scores import Metric, Pair, Scores, Side


@dataclass(frozen=True, slots=True, kw_only=True)
class QueryKey:
    """``sum over heads |M o (Q K' - S)|^2`` (LPCD, arXiv 2512.01546, section 4; MATH.md section 9).

    Given keys it is a least-squares problem in the queries' weight and the other way round: positions are a linear map
    of each token. Norms of queries and keys and capped scores are not linear; they get steps of Gauss-Newton.

    The key step that the paper prints takes ``vec(S)`` and the mask of the queries; it must be those of ``S'``. Here
    both sides are derivatives of one sum, so there is nothing to transpose.

    Attributes:
        originals: q and k of the full-precision model.
        metric: of scores, see `Scores`.
    """

    members: ClassVar[tuple[str, ...]] = ("q", "k")
    originals: Linears
    metric: Metric = "plain"

    def target(self, batch: AttentionBatch) -> Pair:
        """Queries and keys of the full-precision stream; their scores are never kept."""
        return self._pair(self.originals, batch, batch.original)

    def energy(self, batch: AttentionBatch) -> float:
        """Sum of squares of the full-precision scores."""
        target = self.target(batch)
        nothing = Pair(target.query * 0, target.key)
        return Scores(nothing, batch.pattern, target, self.metric).loss()

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
        first = next(iter(batches()))
        function = first.query if member == "q" else first.key
        straight = is_linear(function, linears[member](first.inputs))
        linear = straight and first.pattern.softcap is None

        def slopes(weight: Tensor) -> Iterator[Slope]:
            changed = {**linears, member: linears[member]._replace(weight=weight)}
            for batch in batches():
                yield self.slope(member, changed, batch, linear=straight)

        return relax(slopes, start, self.originals[member].weight, fit, search=search, linear=linear)

    def slope(self, member: str, linears: Linears, batch: AttentionBatch, *, linear: bool = False) -> Slope:
        """The problem of a member around ``linears`` on one batch; ``linear`` says what `is_linear` found."""
        side: Side = "q" if member == "q" else "k"
        outputs = linears[side](batch.inputs)
        _, push, pull = slopes_of(batch.query if side == "q" else batch.key, outputs, linear=linear)
        pair = self._pair(linears, batch, batch.inputs)

        def residual() -> tuple[float, Tensor]:
            loss, gradient = self._scores(pair, batch).gradient(side)
            return loss, pull(gradient).flatten(0, 1)

        def curvature(change: Tensor) -> Tensor:
            # without weights by the target's attention the curvature does not depend on a target
            scores = Scores(pair, batch.pattern, pair) if self.metric == "plain" else self._scores(pair, batch)
            return pull(scores.curvature(side, push(change.view_as(outputs)))).flatten(0, 1)

        return Slope(
            inputs=batch.inputs.flatten(0, 1),
            tokens=batch.pattern.tokens(batch.inputs),
            residual=residual,
            curvature=curvature,
        )

    def _scores(self, pair: Pair, batch: AttentionBatch) -> Scores:
        return Scores(pair, batch.pattern, self.target(batch), self.metric)

    @staticmethod
    def _pair(linears: Linears, batch: AttentionBatch, inputs: Tensor) -> Pair:
        return Pair(batch.query(linears["q"](inputs)), batch.key(linears["k"](inputs)))
