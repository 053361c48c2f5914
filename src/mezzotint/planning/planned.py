"""The result of planning, as data."""

from collections.abc import Mapping
from dataclasses import dataclass

from mezzotint.core.plans import CalibrationPlan, Format, Plan, StepDown
from mezzotint.planning.costs import START_SECONDS, Costs, flops_per_second
from mezzotint.planning.importance import Importance
from mezzotint.planning.layout import Layout
from mezzotint.recipes.request import Request


@dataclass(frozen=True, slots=True, kw_only=True)
class Planned:
    """A plan with what it was made for.

    Attributes:
        calibration: None if nothing needs it, or there is an importance matrix.
        importance: what stands in its place.
        costs: predicted memory and time.
        shapes: of the quantized matrices.
        because: why this format.
        precision: of matrix products in blocks and statistics.
    """

    plan: Plan
    request: Request
    layout: Layout
    form: Format
    calibration: CalibrationPlan | None
    importance: Importance | None
    costs: Costs

    @property
    def weights(self) -> int:
        """Number of quantized weights."""
        return sum(weights for _, weights in self._sizes)

    @property
    def bits_per_weight(self) -> float:
        """Of the quantized matrices, scales and zero points included."""
        return sum(e.bits.total for e in self.plan.entries) / max(self.weights, 1)

    @property
    def bits_per_weight_without_side_data(self) -> float:
        """Of the quantized matrices, codes only."""
        return sum(e.bits.code for e in self.plan.entries) / max(self.weights, 1)

    shapes: Mapping[str, tuple[int, int]]
    because: str
    precision: str

    def seconds(self) -> float:
        """Predicted time of the run, from the speed of a matrix product measured now."""
        return START_SECONDS + self.costs.flops / flops_per_second(self.request.device, self.precision)

    @property
    def steps_down(self) -> Mapping[StepDown, tuple[str, ...]]:
        """What the recipe says and some matrices cannot have, with these matrices."""
        found: dict[StepDown, list[str]] = {}
        for entry in self.plan.entries:
            for step in entry.steps_down:
                found.setdefault(step, []).append(entry.matrix)
        return {step: tuple(names) for step, names in found.items()}

    @property
    def _sizes(self) -> list[tuple[str, int]]:
        return [(e.matrix, self.shapes[e.matrix][0] * self.shapes[e.matrix][1]) for e in self.plan.entries]
