"""Values and the output projection: the residual stream after attention."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from mezzotint.core.statistics import Statistics
from mezzotint.submodules.batches import AttentionBatch, Linears, product_back, slopes
from mezzotint.submodules.relax import Search, Slope, derivative, relax
from mezzotint.submodules.scores import Mixer, Pair
from mezzotint.targets.loaq import Loaq


@dataclass(frozen=True, slots=True, kw_only=True)
class ValueOutput:
    """``|Rh + concat_h(P_h Xh V_g') O' - (R + the same of the full-precision stream)|^2`` (LPCD, section 4).

    ``P`` is the attention that quantized queries and keys make. Given the output projection the problem in the values'
    weight is a least-squares problem; given values the step of the output projection is LoaQ's at full strength.

    Attributes:
        originals: v and o of the full-precision model.
    """

    members: ClassVar[tuple[str, ...]] = ("v", "o")
    originals: Linears

    def energy(self, batch: AttentionBatch) -> float:
        """Sum of squares of the full-precision output."""
        assert batch.outer is not None
        return float(batch.outer.goal(self.originals["o"]).values.square().sum())

    def loss(self, linears: Linears, batch: AttentionBatch) -> float:
        """Sum of squares of what the stream misses after attention."""
        return self._residual(linears, batch, batch.value(linears["v"](batch.inputs)), back=None)[0]

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
        """The weight of v by conjugate gradients; that of o in closed form, from the statistics of its inputs."""
        if member == "o":
            return least_squares(self.originals["o"].weight, fit, search)
        return relax(slopes(self, member, linears, batches), start, self.originals[member].weight, fit, search=search)

    def slope(self, member: str, linears: Linears, batch: AttentionBatch) -> Slope:
        """The problem of a member around ``linears`` on one batch."""
        assert member == "v"
        outer, output = batch.outer, linears["o"].weight
        assert outer is not None
        goal = outer.goal(self.originals["o"])
        outputs = linears["v"](batch.inputs)
        value, push, pull, linear = derivative(batch.value, outputs)
        mixer = _mixer(linears, batch)

        def residual() -> tuple[float, Tensor]:
            gradient = torch.zeros_like(value)
            loss, gradient = self._residual(linears, batch, value, back=gradient)
            assert gradient is not None
            return loss, pull(gradient).flatten(0, 1)

        def curvature(change: Tensor) -> Tensor:
            changed = push(change.view_as(outputs))
            result = torch.zeros_like(changed)
            for piece, taken in mixer.probabilities():
                found = product_back(mixer.mixed(piece, taken, changed), output)
                mixer.pull_(result, piece, taken, goal.at(piece.windows, piece.rows).squared(found))
            return pull(result).flatten(0, 1)

        return Slope(
            inputs=batch.inputs.flatten(0, 1), tokens=batch.pattern.tokens(batch.inputs), residual=residual,
            curvature=curvature, linear=linear,
        )  # fmt: skip

    def _residual(
        self, linears: Linears, batch: AttentionBatch, value: Tensor, *, back: Tensor | None
    ) -> tuple[float, Tensor | None]:
        """The loss and, added to ``back``, the gradient of half of it in the values."""
        outer = batch.outer
        assert outer is not None
        whole = outer.goal(self.originals["o"])
        mixer, loss = _mixer(linears, batch), 0.0
        for piece, taken in mixer.probabilities():
            at = piece.windows, piece.rows
            goal = whole.at(*at)
            off = outer.off(linears["o"](mixer.mixed(piece, taken, value)), goal, *at)
            loss += float(off.square().sum())
            if back is not None:
                mixer.pull_(back, piece, taken, goal.scaled(off) @ linears["o"].weight)
        return loss, back


def _mixer(linears: Linears, batch: AttentionBatch) -> Mixer:
    query, key, inputs = linears["q"], linears["k"], batch.inputs
    return batch.mixer.get(
        (query.weight, key.weight),
        lambda: Mixer(Pair(batch.query(query(inputs)), batch.key(key(inputs))), batch.pattern),
    )


def least_squares(weight: Float[Tensor, "out in"], fit: Statistics, search: Search) -> Float[Tensor, "out in"]:
    """The last linear of a submodule in closed form: LoaQ's target at full strength (MATH.md section 9)."""
    return Loaq(alpha=1.0, beta=1.0, damping=search.damping).aim(weight, fit, None).matrix
