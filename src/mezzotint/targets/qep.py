"""QEP: the target is the original output, given the inputs that the quantized earlier layers produce."""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from mezzotint.core.contracts import Aim, Quadratic
from mezzotint.core.curvature import Curvature
from mezzotint.core.metrics import energies
from mezzotint.core.statistics import Statistics
from mezzotint.errors import ConfigError

AUTO_ALPHAS = (0.25, 0.5, 0.75, 1.0)
AUTO_DAMPINGS = (0.01, 0.1, 1.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Qep:
    """Settings of quantization error propagation (arXiv 2504.09629, eq. of the weight correction).

    ``T = W + alpha W D (H + lambda I)^-1`` with ``D = (X - Xh) Xh'``: the ridge pulls towards W, never towards 0.

    Attributes:
        alpha: strength from 0 (no correction) to 1 (least squares); ``auto`` chooses alpha and damping per matrix by
            the held-out quadratic, 0 included.
        damping: lambda as a fraction of the mean diagonal of H; not used under ``auto``.
    """

    kind: ClassVar[str] = "qep"
    alpha: float | Literal["auto"] = 0.5
    damping: float = 1.0
    norm_scale: ClassVar[Literal["none"]] = "none"

    def __post_init__(self) -> None:
        if self.alpha != "auto" and not 0 <= self.alpha <= 1:
            raise ConfigError(f"target.alpha is {self.alpha}; it must be from 0 to 1, or auto.")
        if not 0 <= self.damping <= 100:
            raise ConfigError(f"target.damping is {self.damping}; it must be from 0 to 100 (typical 0.01 to 1).")

    @property
    def needs(self) -> frozenset[str]:
        """Nothing at strength 0: there, no drift is summed."""
        return frozenset({"gram", "drift"}) if self.alpha != 0 else frozenset()

    @property
    def decides(self) -> bool:
        """Under ``auto``."""
        return self.alpha == "auto"

    def aim(self, weight: Float[Tensor, "out in"], fit: Statistics | None, held_out: Statistics | None) -> Aim:
        """The corrected weight.

        Raises:
            ConfigError: there are no statistics with drift, or ``auto`` has no held-out ones.
        """
        w = weight if weight.dtype == torch.float64 else weight.float()
        if self.alpha == 0:
            return Aim(matrix=w)
        if fit is None or not fit.has_drift:
            raise ConfigError(
                "target 'qep' needs statistics of the original and the quantized model. Use target.kind=weight."
            )
        pull = fit.drift_of(w)
        if self.alpha != "auto":
            matrix = w + self.alpha * fit.solve(pull, self.damping)
            needed = fit.ridge(self.damping).needed("target.damping", self.damping)
            return Aim(matrix=matrix, corrected=True, decisions=needed)
        if held_out is None or not held_out.has_drift:
            raise ConfigError(
                "target.alpha is 'auto', but there is no held-out window. Give a number, or more windows."
            )
        judge = quadratic_of(w, held_out, residual=False)
        best, chosen, decisions = judge.value(w).sum(), w, {"alpha": 0.0, "damping": 0.0}
        for damping in AUTO_DAMPINGS:
            correction = fit.solve(pull, damping)
            for alpha in AUTO_ALPHAS:
                candidate = w + alpha * correction
                loss = judge.value(candidate).sum()
                if loss < best:
                    best, chosen = loss, candidate
                    decisions = {"alpha": alpha, "damping": fit.ridge(damping).damping}
        return Aim(matrix=chosen, corrected=decisions["alpha"] > 0, decisions=decisions)


def quadratic_of(
    weight: Float[Tensor, "out in"], s: Statistics, *, residual: bool = True, curvature: Curvature | None = None
) -> Quadratic:
    """``||W X - V Xh||^2`` as a function of V, less the energy of ``W (X - Xh)``, which no V changes.

    With ``residual``, where the statistics have it, the same of ``(R + W X) - (Rh + V Xh)``. With ``curvature`` in the
    norm ``tr(E' A E)``.
    """
    cross = weight @ s.gram
    if s.has_drift:
        cross += s.drift_of(weight)  # not the sum first: that is another matrix as large as the Hessian
    if residual and s.residual is not None:
        cross = cross + s.residual
    left = weight if curvature is None else curvature.mixed(weight)
    const = 2 * (left * cross).sum(-1) - energies(weight, s.gram, left)
    return Quadratic(gram=s.gram, cross=cross, const=const, curvature=curvature)
