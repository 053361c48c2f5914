"""Activation-aware scales of input columns (AWQ), folded into the previous matrix or norm."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from mezzotint.core.contracts import Aim
from mezzotint.core.statistics import Statistics
from mezzotint.errors import ConfigError

_LEAST = 1e-4  # of a scale before the extremes are balanced, as in the paper's code


@dataclass(frozen=True, slots=True, kw_only=True)
class Awq:
    """Settings of AWQ's search for scales (arXiv 2306.00978, section 3.2).

    ``T' = T diag(s)`` and ``x' = x / s`` with ``s = mean|x|^r``, balanced so that ``max s * min s = 1``; of the
    strengths ``r = 0, 1/steps, ... 1 - 1/steps`` the one with the least loss of nearest rounding is taken, the first
    of equals.

    Attributes:
        strength: ``auto`` searches; a number is taken as ``r``.
        steps: strengths that are tried.
        tokens: about how many of the calibration the losses are measured on; whole windows.
    """

    kind: ClassVar[str] = "awq"
    strength: float | Literal["auto"] = "auto"
    steps: int = 20
    tokens: int = 1024
    needs: ClassVar[frozenset[str]] = frozenset({"gram", "mean_abs"})
    run_time: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if self.strength != "auto" and not 0 <= self.strength <= 1:
            raise ConfigError(f"transform.strength is {self.strength}; it must be 0 to 1, or auto.")
        for name, value in (("steps", self.steps), ("tokens", self.tokens)):
            if value < 1:
                raise ConfigError(f"transform.{name} is {value}; it must be at least 1.")

    def fit(
        self,
        aims: Sequence[Aim],
        fit: Statistics | None,
        probe: Callable[[Tensor], float] | None,
        generator: torch.Generator,
    ) -> tuple["ScaleBasis", ...]:
        """The same basis for every aim; all scales are one where no input was seen.

        Args:
            aims: matrices of one width.
            fit: of their inputs, with ``mean_abs``.
            probe: loss of the scales that it is given; needed to search.
            generator: not used.

        Raises:
            ConfigError: the strength is to be searched and there is no probe.
        """
        first = aims[0].matrix
        if fit is None or fit.mean_abs is None:
            found = ScaleBasis(scale=torch.ones_like(first[0]), strength=0.0)
            return (found,) * len(aims)
        if self.strength == "auto" and probe is None:
            raise ConfigError(
                "transform.strength is 'auto' but it needs calibration text to search with. Give a number from 0 to 1."
            )
        strengths = [i / self.steps for i in range(self.steps)] if self.strength == "auto" else [self.strength]
        mean_abs = fit.mean_abs.to(first)
        candidates = [ScaleBasis(scale=scales_of(mean_abs, r), strength=r) for r in strengths]
        if probe is None or len(candidates) == 1:
            return (candidates[0],) * len(aims)
        losses = [probe(candidate.scale) for candidate in candidates]
        return (candidates[losses.index(min(losses))],) * len(aims)

    def specs(self, shape: tuple[int, int]) -> Mapping[str, tuple[torch.dtype, tuple[int, ...]]]:
        """Nothing: once the scales are folded, the matrix that is stored is the one that runs."""
        return {}

    def restore(self, shape: tuple[int, int], stored: Mapping[str, Tensor]) -> "ScaleBasis":
        """The basis of what is stored, which has no scales left."""
        return ScaleBasis(scale=torch.ones(shape[1]), strength=0.0)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ScaleBasis:
    """``R = diag(s)``: columns of the matrix are multiplied, inputs divided.

    Attributes:
        scale: positive.
        strength: the exponent of ``mean|x|``.
    """

    kind: ClassVar[str] = Awq.kind
    run_time: ClassVar[bool] = False
    scale: Float[Tensor, " in"]
    strength: float

    @property
    def stored(self) -> Mapping[str, Tensor]:
        """Nothing; see `Awq.specs`."""
        return {}

    def weight(self, w: Float[Tensor, "out in"]) -> Float[Tensor, "out in"]:
        """``w diag(s)``, in float32 (float64 if ``w`` is)."""
        return w * self._scale(w)

    def inverse(self, w: Float[Tensor, "out in"]) -> Float[Tensor, "out in"]:
        """``w diag(1/s)``, in float32 (float64 if ``w`` is)."""
        return w / self._scale(w)

    def statistics(self, s: Statistics) -> Statistics:
        """The sums of ``x / s``: every one but those of outputs is divided."""
        scale = self._scale(s.gram)
        both = scale.unsqueeze(1) * scale
        return replace(
            s,
            gram=s.gram / both,
            drift=None if s.drift is None else s.drift / both,
            output_drift=None if s.output_drift is None else s.output_drift / scale,
            residual=None if s.residual is None else s.residual / scale,
            mean_abs=None if s.mean_abs is None else s.mean_abs / scale,
        )

    def input(self, x: Float[Tensor, "tokens in"]) -> Float[Tensor, "tokens in"]:
        """``x / s``; of a model into which the scales are folded that is what it makes itself."""
        return x / self._scale(x)

    def output(self, y: Float[Tensor, "tokens out"]) -> Float[Tensor, "tokens out"]:
        """Outputs are not changed."""
        return y

    def _scale(self, like: Tensor) -> Float[Tensor, " in"]:
        return self.scale.to(like.device, torch.promote_types(like.dtype, torch.float32))


def scales_of(mean_abs: Float[Tensor, " in"], strength: float) -> Float[Tensor, " in"]:
    """``mean|x|^r`` with the largest and the smallest balanced around 1; 1 for inputs that are never there.

    Example:
        >>> scales_of(torch.tensor([1.0, 16.0, 0.0]), 0.5)
        tensor([0.5000, 2.0000, 1.0000])
    """
    alive = mean_abs > 0
    raised = (mean_abs**strength).clamp_min(_LEAST)
    if not bool(alive.any()):
        return torch.ones_like(raised)
    balanced = raised / (raised[alive].max() * raised[alive].min()).sqrt()
    return torch.where(alive, balanced, 1.0)
