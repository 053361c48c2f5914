"""What was done to a matrix and a block, as data."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class MatrixRecord:
    """What was done to one matrix.

    Attributes:
        bits_per_weight: side data included.
        weight_error: ``||V - W||^2 / ||W||^2``.
        h_error: the same in the norm of the inputs it was fitted on; None where there were none.
        h_error_held_out: the same on the held-out windows.
        objective: ``||W X - V Xh||^2``, with the residual stream where its drift is known, less what no V changes, over
            ``||W Xh||^2``: below 0 where the matrix makes up for more than it adds. None where no drift was summed.
        objective_held_out: the same on the held-out windows, where something was decided by them.
        tokens: that its statistics saw.
    """

    name: str
    bits_per_weight: float
    weight_error: float
    h_error: float | None
    h_error_held_out: float | None
    objective: float | None
    objective_held_out: float | None
    tokens: float
    seconds: float
    decisions: Mapping[str, float | str]


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockRecord:
    """What came out of one block.

    Attributes:
        error: mean squared difference of full-precision block on full-precision stream and quantized block on
            quantized stream, on the held-out windows; None when no stream ran.
        relative_error: the same over the mean square of the full-precision output.
        submodules: loss of each that was optimised on the held-out windows, over the energy of the full-precision
            output, ``before`` and ``after``.
    """

    index: int
    error: float | None
    relative_error: float | None
    seconds: float
    submodules: Mapping[str, Mapping[str, float]] = field(default_factory=dict)


def as_json(record: MatrixRecord | BlockRecord) -> dict[str, Any]:
    """A record for the report."""
    return asdict(record)
