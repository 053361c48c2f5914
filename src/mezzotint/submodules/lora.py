"""Low-rank compensation of the rounding error."""

from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from mezzotint.core.statistics import Statistics
from mezzotint.errors import ConfigError
from mezzotint.targets.loaq import Loaq


class Factors(NamedTuple):
    """A change ``up @ down`` of a matrix; PEFT calls them lora_B and lora_A."""

    up: Float[Tensor, "out rank"]
    down: Float[Tensor, "rank in"]

    @property
    def change(self) -> Float[Tensor, "out in"]:
        """What is added to the matrix."""
        return self.up @ self.down


@dataclass(frozen=True, slots=True, kw_only=True)
class Lora:
    """Settings of low-rank compensation (LPCD, arXiv 2512.01546, appendix B.4).

    ``E`` of a rank minimises ``|| (W0 + E) Xh - W X ||^2 + lambda |W0 + E - W|^2`` for given codes ``W0``, with the
    residual stream where the output is added to it: the best change at all is ``LoaQ's target - W0``, and the best of
    a rank is its truncated singular value decomposition in the norm of ``H + lambda I``.

    Attributes:
        rank: of each change.
        damping: lambda as a fraction of the mean diagonal of H.
    """

    kind: ClassVar[str] = "lora"
    rank: int = 16
    damping: float = 0.3
    needs: ClassVar[frozenset[str]] = frozenset({"gram", "drift", "residual"})

    def __post_init__(self) -> None:
        if not 1 <= self.rank <= 1024:
            raise ConfigError(f"compensation.rank is {self.rank}; it must be from 1 to 1024.")
        if not 0 <= self.damping <= 100:
            raise ConfigError(f"compensation.damping is {self.damping}; it must be from 0 to 100.")

    def factors(self, weight: Float[Tensor, "out in"], value: Float[Tensor, "out in"], fit: Statistics) -> Factors:
        """The change of ``value``, the quantized matrix, that comes closest to the output of ``weight``, the original.

        With ``R' R = H + lambda I`` a change ``E`` costs ``|E R'|^2``; any factor does as well as the square root.
        """
        ideal = Loaq(alpha=1.0, beta=1.0, damping=self.damping).aim(weight, fit, None).matrix
        upper = fit.ridge(self.damping).upper
        left, singular, right = torch.linalg.svd((ideal - value) @ upper.t(), full_matrices=False)
        rank = min(self.rank, len(singular))
        root = singular[:rank].sqrt()
        down = torch.linalg.solve_triangular(upper.t(), root[:, None] * right[:rank], upper=False, left=False)
        return Factors(up=left[:, :rank] * root, down=down)
