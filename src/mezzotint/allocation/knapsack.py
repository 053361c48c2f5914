"""Settings of an allocation: the budget, and what may be chosen."""

from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import ClassVar, Literal

from mezzotint.errors import ConfigError

ALLOCATED = "allocation"  # why a matrix has the grid it has


@dataclass(frozen=True, slots=True, kw_only=True)
class Knapsack:
    """Every matrix takes the grid of a menu with which the model loses least within a budget (arXiv 2509.20214, 4).

    Attributes:
        bits: budget: average that is stored for a quantized weight, side data included.
        size: budget: bytes of the folder, everything in it counted.
        fits: budget: bytes of memory that weights, key-value cache and activations of one sequence may take together.
        context: tokens of that sequence.
        tokens_per_second: budget: least speed of generating one sequence on this machine with our own kernels.
        menu: bits of the codes to choose from, or types of GGUF; None is everything that grid, format and engine can do
            from ``least`` up.
        least: no fewer bits than this, unless the menu says so.
        limits: glob of matrices -> (fewest, most) bits of a code; the first that matches counts.
        sensitivity: what an error costs: from the ``fisher`` information of sampled labels; from its cheap estimate
            ``diagonal``, squared inputs times squared gradients of outputs; or from ``noise``, tried in one matrix
            after the other, which takes a forward pass for each.
        windows: of the calibration text that sensitivities are measured on.
        guard: quantize also with the same grid everywhere, at the same size, and keep what is better on held-out text.
    """

    kind: ClassVar[str] = "knapsack"
    bits: float | int | None = None
    size: int | None = None
    fits: int | None = None
    context: int = 4096
    tokens_per_second: float | int | None = None
    menu: tuple[float | int | str, ...] | None = None
    least: float | int = 1.5
    limits: Mapping[str, tuple[float | int, float | int]] | None = None
    sensitivity: Literal["fisher", "diagonal", "noise"] = "fisher"
    windows: int = 8
    guard: bool = True

    def __post_init__(self) -> None:
        for name in (*self.budgets, "context"):
            if getattr(self, name) <= 0:
                raise ConfigError(f"allocation.{name} is {getattr(self, name)}; it must be more than 0.")
        sizes = [name for name in self.budgets if name != "tokens_per_second"]
        if len(sizes) > 1:
            raise ConfigError(
                f"allocation.{' and allocation.'.join(sizes)} are given, and each of them limits the size. "
                "Give only one."
            )
        if self.menu is not None and not self.menu:
            raise ConfigError("allocation.menu is empty. Give the bits to choose from, for example [2, 3, 4, 8].")
        for pattern, (fewest, most) in (self.limits or {}).items():
            if fewest > most:
                raise ConfigError(
                    f"allocation.limits of {pattern!r}: at least {fewest} and at most {most} bits. Swap them."
                )
        if self.windows < 1:
            raise ConfigError(f"allocation.windows is {self.windows}; sensitivities need at least one.")

    @property
    def budgets(self) -> tuple[str, ...]:
        """Names of the budgets that are given."""
        names = ("bits", "size", "fits", "tokens_per_second")
        return tuple(name for name in names if getattr(self, name) is not None)

    def allows(self, matrix: str, bits: float | int) -> bool:
        """Whether a matrix may have codes of so many bits."""
        for pattern, (fewest, most) in (self.limits or {}).items():
            if fnmatchcase(matrix, pattern):
                return fewest <= bits <= most
        return self.menu is not None or bits >= self.least
