"""The two linears of an MLP: the residual stream after it."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import ClassVar

from jaxtyping import Float
from torch import Tensor

from mezzotint.core.statistics import Statistics
from mezzotint.submodules.batches import Goal, Linears, MlpBatch, product_back, slopes
from mezzotint.submodules.relax import Search, Slope, derivative, relax
from mezzotint.submodules.vo import least_squares


@dataclass(frozen=True, slots=True, kw_only=True)
class UpDown:
    """``|Rh + (phi(Xh G') o Xh U') D' - (R + the same of the full-precision stream)|^2`` (LPCD, section 4).

    The gate stays at its quantized weights. Given down the problem in up is a least-squares problem, and where there is
    no gate it is one of Gauss-Newton; given up the step of down is LoaQ's at full strength.

    Attributes:
        originals: up and down of the full-precision model.
    """

    members: ClassVar[tuple[str, ...]] = ("up", "down")
    originals: Linears

    def energy(self, batch: MlpBatch) -> float:
        """Sum of squares of the full-precision output."""
        return float(self._goal(batch).values.square().sum())

    def loss(self, linears: Linears, batch: MlpBatch) -> float:
        """Sum of squares of what the stream misses after the MLP."""
        return float(self._off(linears, batch, batch.hidden(linears["up"](batch.inputs))).square().sum())

    def relax(
        self,
        member: str,
        linears: Linears,
        batches: Callable[[], Iterable[MlpBatch]],
        fit: Statistics,
        *,
        start: Float[Tensor, "rows in"],
        search: Search,
    ) -> Float[Tensor, "rows in"]:
        """The weight of up by conjugate gradients; that of down in closed form, from the statistics of its inputs."""
        if member == "down":
            return least_squares(self.originals["down"].weight, fit, search)
        return relax(slopes(self, member, linears, batches), start, self.originals[member].weight, fit, search=search)

    def slope(self, member: str, linears: Linears, batch: MlpBatch) -> Slope:
        """The problem of a member around ``linears`` on one batch."""
        assert member == "up"
        outputs = linears["up"](batch.inputs)
        hidden, push, pull, linear = derivative(batch.hidden, outputs)
        down, goal = linears["down"].weight, self._goal(batch)

        def residual() -> tuple[float, Tensor]:
            off = self._off(linears, batch, hidden)
            return float(off.square().sum()), pull(goal.scaled(off) @ down).flatten(0, 1)

        def curvature(change: Tensor) -> Tensor:
            found = product_back(push(change.view_as(outputs)), down)
            return pull(goal.squared(found)).flatten(0, 1)

        return Slope(
            inputs=batch.inputs.flatten(0, 1),
            tokens=batch.outer.tokens,
            residual=residual,
            curvature=curvature,
            linear=linear,
        )

    def _off(self, linears: Linears, batch: MlpBatch, hidden: Tensor) -> Tensor:
        return batch.outer.off(linears["down"](hidden), self._goal(batch))

    def _goal(self, batch: MlpBatch) -> Goal:
        return batch.outer.goal(self.originals["down"])
