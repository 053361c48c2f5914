"""Input of an allocation: items, each with several choices."""

import math
from collections.abc import Hashable, Mapping
from dataclasses import dataclass

from mezzotint.errors import ConfigError

# Sums over any number of items stay finite, and sums of bits over the members of a class fit an int64.
LARGEST = 1e200
LARGEST_BITS = 2**50


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """One alternative of an item.

    Attributes:
        label: what the caller calls it, for example a grid.
        loss: what the model loses with it, in any unit that adds up over items (nats); not negative.
        bits: stored, side data included.
        seconds: of one forward.
    """

    label: Hashable
    loss: float
    bits: int
    seconds: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Item:
    """Something that takes exactly one choice: a matrix, or a class of matrices that are stored and run as one.

    Losses need not fall with the bits: measured ones do not always.

    Raises:
        ConfigError: there are no choices, or a number cannot be summed.
    """

    name: str
    choices: tuple[Choice, ...]

    def __post_init__(self) -> None:
        if not self.choices:
            raise ConfigError(f"item {self.name!r} has no choices. Drop it, or loosen what left none.")
        for choice in self.choices:
            for what, value in (("loss", choice.loss), ("seconds", choice.seconds)):
                if not 0 <= value <= LARGEST:
                    raise ConfigError(
                        f"item {self.name!r}, choice {choice.label!r}: {what} is {value}, not in 0 ... {LARGEST}. "
                        "Drop the choice, or measure it again."
                    )
            if not isinstance(choice.bits, int) or not 0 <= choice.bits <= LARGEST_BITS:
                raise ConfigError(
                    f"item {self.name!r}, choice {choice.label!r}: bits is {choice.bits!r}, not an int in "
                    "0 ... 2^50. Count stored bits, side data included."
                )


@dataclass(frozen=True, slots=True, kw_only=True)
class Allocation:
    """One choice for every item.

    Attributes:
        choices: by the item's name, in the order of the items.
        loss: sum over items.
        bits: sum over items.
        seconds: sum over items and the time constant.
        bound: no allocation within the budget has a smaller loss than this (Lagrangian dual, or the optimum itself).
        method: what found it: ``lagrangian``, ``milp`` or ``dynamic``.
    """

    choices: Mapping[str, Choice]
    loss: float
    bits: int
    seconds: float
    bound: float
    method: str

    @property
    def gap(self) -> float:
        """At most so much of the loss could be saved by a better allocation within the budget."""
        return (self.loss - self.bound) / self.loss if self.loss else 0.0

    @property
    def labels(self) -> Mapping[str, Hashable]:
        """Label of every item."""
        return {name: choice.label for name, choice in self.choices.items()}


def total(choices: Mapping[str, Choice], *, bound: float | None, time_constant: float = 0.0, method: str) -> Allocation:
    """The allocation with its sums; ``bound`` None says that no other has a smaller loss.

    Sums are correctly rounded, so the order of the items does not show in them.
    """
    loss = math.fsum(choice.loss for choice in choices.values())
    return Allocation(
        choices=choices,
        loss=loss,
        bits=sum(choice.bits for choice in choices.values()),
        seconds=math.fsum((time_constant, *(choice.seconds for choice in choices.values()))),
        bound=loss if bound is None else min(loss, max(0.0, bound)),
        method=method,
    )
