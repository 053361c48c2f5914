"""Uncertainty of means over windows and items, and of the difference of two models on the same ones."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from scipy.stats import t as student

CONFIDENCE = 0.95


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """Mean of a difference, first minus second, over windows or items that both were measured on.

    Attributes:
        mean: of the differences.
        stderr: standard error of the mean.
        low: lower end of the confidence interval (`CONFIDENCE`, Student's t).
        high: upper end.
        count: windows or items.
    """

    mean: float
    stderr: float
    low: float
    high: float
    count: int

    @property
    def clear(self) -> bool:
        """Whether the interval leaves zero out."""
        return self.low > 0 or self.high < 0


def standard_error(sums: Sequence[float], counts: Sequence[int]) -> float | None:
    """Standard error of ``sum(sums) / sum(counts)`` over windows (ratio estimator).

    With ``n`` windows of equal counts this is the standard deviation of the window means over ``sqrt(n)``.
    """
    n, total = len(sums), sum(counts)
    if n < 2:
        return None
    mean = math.fsum(sums) / total
    squares = math.fsum((s - c * mean) ** 2 for s, c in zip(sums, counts, strict=True))
    return math.sqrt(n / (n - 1) * squares) / total


def difference(first: Sequence[float], second: Sequence[float], counts: Sequence[int] | None = None) -> Difference:
    """The paired difference of two models.

    What both find hard cancels, so the interval is narrower than that of two separate means; on tasks most items
    cancel altogether.

    Args:
        first: sums over the tokens of each window, or scores of items.
        second: the same of the other model, in the same order.
        counts: tokens of each window; None for items, which count one each.

    Raises:
        ValueError: fewer than two windows or items, or not as many in both.

    Example:
        >>> found = difference([1.0, 0.0, 1.0, 1.0], [0.0, 0.0, 1.0, 0.0])
        >>> found.mean, round(found.stderr, 3), found.clear
        (0.5, 0.289, False)
    """
    if len(first) < 2:
        raise ValueError(f"a difference over {len(first)} windows or items has no standard error; measure at least 2")
    counts = [1] * len(first) if counts is None else counts
    sums = [a - b for a, b in zip(first, second, strict=True)]
    mean = math.fsum(sums) / sum(counts)
    stderr = standard_error(sums, counts) or 0.0
    reach = float(student.ppf((1 + CONFIDENCE) / 2, len(sums) - 1)) * stderr
    return Difference(mean=mean, stderr=stderr, low=mean - reach, high=mean + reach, count=len(sums))
