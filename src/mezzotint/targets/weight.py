"""The weight itself as the target."""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from mezzotint.core.contracts import Aim
from mezzotint.core.statistics import Statistics


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightTarget:
    """No correction: approximate the stored weight."""

    kind: ClassVar[str] = "weight"
    decides: ClassVar[bool] = False
    norm_scale: ClassVar[Literal["none"]] = "none"
    needs: ClassVar[frozenset[str]] = frozenset()

    def aim(self, weight: Float[Tensor, "out in"], fit: Statistics | None, held_out: Statistics | None) -> Aim:
        """The weight, in float32 or wider."""
        return Aim(matrix=weight if weight.dtype == torch.float64 else weight.float())
