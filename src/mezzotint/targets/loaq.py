"""LoaQ: the target is the original residual stream after the block's output is added."""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from mezzotint.core.contracts import Aim
from mezzotint.core.statistics import Statistics
from mezzotint.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class Loaq:
    """Settings of LoaQ (arXiv 2509.06297; MATH.md section 8).

    ``T = W + [alpha W D + beta Gamma](H + lambda I)^-1`` with ``Gamma = (R - Rh) Xh'``, the drift of the residual
    stream that the output is added to. Where nothing is added unchanged (post-norms, and every linear but the last of
    attention and MLP), Gamma does not exist and the target is QEP's.

    Attributes:
        alpha: strength of the correction for the inputs, 0 to 1.
        beta: strength of the correction for the residual stream, 0 to 1.
        damping: lambda as a fraction of the mean diagonal of H.
        norm_aware: match the stream after the RMSNorm that follows, its scale of each token held fixed: at the scale of
            each stream's own (``own``, that of the quantized stream estimated before quantization), or at that of the
            full-precision stream for both (``original``); the same weights enter every statistic of the matrix and its
            rounding. The paper does not say which scale it holds fixed.
    """

    kind: ClassVar[str] = "loaq"
    decides: ClassVar[bool] = False
    alpha: float = 0.75
    beta: float = 0.75
    damping: float = 0.3
    norm_aware: Literal["no", "own", "original"] = "no"

    def __post_init__(self) -> None:
        for name, value, limit in (("alpha", self.alpha, 1), ("beta", self.beta, 1), ("damping", self.damping, 100)):
            if not 0 <= value <= limit:
                raise ConfigError(f"target.{name} is {value}; it must be from 0 to {limit}.")

    @property
    def needs(self) -> frozenset[str]:
        """What strengths above 0 are of: at 0 and 0, nothing is summed."""
        if self.beta == 0:
            return frozenset({"gram", "drift"}) if self.alpha > 0 else frozenset()
        return frozenset({"gram", "drift", "residual"})

    @property
    def norm_scale(self) -> Literal["none", "own", "original"]:
        """Of ``norm_aware``."""
        return "none" if self.norm_aware == "no" else self.norm_aware

    def aim(self, weight: Float[Tensor, "out in"], fit: Statistics | None, held_out: Statistics | None) -> Aim:
        """The corrected weight.

        Raises:
            ConfigError: there are no statistics with drift.
        """
        w = weight if weight.dtype == torch.float64 else weight.float()
        if not self.needs:
            return Aim(matrix=w)
        if fit is None or not fit.has_drift:
            raise ConfigError(
                "target 'loaq' needs statistics of the original and the quantized model. Use target.kind=weight."
            )
        pull = self.alpha * fit.drift_of(w)
        decisions: dict[str, float | str] = {}
        if fit.residual is not None:
            pull = pull + self.beta * fit.residual
        elif self.beta > 0:
            decisions["loaq"] = (
                "as qep: the output is normalised before the residual add, so the term of the stream is left out"
            )
        decisions |= fit.ridge(self.damping).needed("target.damping", self.damping)
        matrix = w + fit.solve(pull, self.damping)
        return Aim(matrix=matrix, corrected=True, decisions=decisions)
