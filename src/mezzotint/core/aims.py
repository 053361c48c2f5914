"""What a matrix is approximated to: an aim, or the quadratic of its loss."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Quadratic:
    """``q(V) = tr(V gram V') - 2 tr(V cross') + const`` with ``cross = W (gram + drift) + residual``."""

    gram: Float[Tensor, "in in"]
    cross: Float[Tensor, "out in"]
    const: Float[Tensor, " out"]

    def value(self, v: Float[Tensor, "out in"]) -> Float[Tensor, " out"]:
        """The objective per output row."""
        return ((v @ self.gram - 2 * self.cross) * v).sum(-1) + self.const


@dataclass(frozen=True, slots=True, kw_only=True)
class Aim:
    """The matrix to approximate.

    Attributes:
        matrix: ``[out, in]``, float32 or wider.
        corrected: already contains the correction for upstream error.
        decisions: what was chosen and why, for the report.
    """

    matrix: Float[Tensor, "out in"]
    corrected: bool = False
    decisions: Mapping[str, float | str] = field(default_factory=dict)
