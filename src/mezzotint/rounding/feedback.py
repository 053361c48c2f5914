"""What roundings with error feedback have in common: limits of settings, and what is asked of statistics."""

from jaxtyping import Float
from torch import Tensor

from mezzotint.core.contracts import Aim, FittedGrid, Rounded
from mezzotint.core.linalg import Factor
from mezzotint.core.statistics import Statistics
from mezzotint.errors import ConfigError


def check_settings(damping: float, block_size: int) -> None:
    """Refuse settings out of range.

    Raises:
        ConfigError: says which, its value and the limit.
    """
    if not 0 <= damping <= 100:
        raise ConfigError(f"rounding.damping is {damping}; it must be from 0 to 100 (typical 0.01).")
    if block_size < 1:
        raise ConfigError(f"rounding.block_size is {block_size}; it must be at least 1 (default 128).")


def check_drift(kind: str, aim: Aim, fit: Statistics | None) -> tuple[Statistics, Float[Tensor, "in in"]]:
    """The statistics of a rounding that corrects for drift itself, and the drift.

    Raises:
        ConfigError: there is no drift in them, or the aim is already corrected for it.
    """
    if fit is None or fit.drift is None:
        raise ConfigError(
            f"rounding {kind!r} needs statistics of the original and the quantized model. Use rounding.kind=gptq."
        )
    if aim.corrected:
        raise ConfigError(
            f"rounding {kind!r} corrects drift itself; with a corrected target, drift would be corrected twice."
        )
    return fit, fit.drift


def finished(code: Tensor, grid: FittedGrid, before: Tensor, *, factor: Factor, damping: float) -> Rounded:
    """The result of a rounding with feedback, with the damping its Hessian needed if that is more than was asked."""
    return Rounded(
        code=code,
        grid=grid,
        value=grid.decode(code),
        before=before,
        decisions=factor.needed("rounding.damping", damping),
    )
