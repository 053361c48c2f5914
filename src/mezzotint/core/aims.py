"""The target of a matrix: a matrix to approximate, or a quadratic loss."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from jaxtyping import Float
from torch import Tensor

from mezzotint.core.curvature import Curvature
from mezzotint.core.metrics import energies


@dataclass(frozen=True, slots=True, kw_only=True)
class Quadratic:
    """``q(V) = tr(A V gram V') - 2 tr(A V cross') + const`` with ``cross = W (gram + drift) + residual``.

    Attributes:
        curvature: ``A``; None is the identity, with which every row has a quadratic of its own.
    """

    gram: Float[Tensor, "in in"]
    cross: Float[Tensor, "out in"]
    const: Float[Tensor, " out"]
    curvature: Curvature | None = None

    def value(self, v: Float[Tensor, "out in"]) -> Float[Tensor, " out"]:
        """The objective per output row; with a curvature only sums over whole blocks of rows mean something."""
        left = self.mixed(v)
        return energies(v, self.gram, left) - 2 * (left * self.cross).sum(-1) + self.const

    def mixed(self, values: Float[Tensor, "out k"]) -> Float[Tensor, "out k"]:
        """``A values``."""
        return values if self.curvature is None else self.curvature.mixed(values)


@dataclass(frozen=True, slots=True, kw_only=True)
class Aim:
    """The matrix to approximate.

    Attributes:
        matrix: ``[out, in]``, float32 or wider.
        corrected: already contains the correction for upstream error.
        curvature: of the loss in the outputs, where it was measured.
        decisions: what was chosen and why, for the report.
    """

    matrix: Float[Tensor, "out in"]
    corrected: bool = False
    curvature: Curvature | None = None
    decisions: Mapping[str, float | str] = field(default_factory=dict)
