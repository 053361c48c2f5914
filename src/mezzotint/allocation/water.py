"""The allocation that real-valued rates would allow."""

import math
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float64

from mezzotint.errors import ConfigError


def reverse_water_filling(
    sensitivity: Sequence[float], sizes: Sequence[int], average_bits: float, floor: float = 0.0
) -> Float64[np.ndarray, " items"]:
    """Rates that minimize ``sum_l a_l 2^(-2 b_l)`` with ``sum_l n_l b_l`` given and ``b_l >= floor``.

        b_l = max(floor, 1/2 log2(a_l / n_l) + C),   C fixed by the budget

    (Q-Palette, arXiv 2509.20214): twice the sensitivity per weight is worth
    half a bit. No menu of rates whose distortion is ``2^(-2b)`` or more does better at equal size.

    Args:
        sensitivity: ``a_l``, loss per unit of relative squared error; not negative.
        sizes: ``n_l``, weights of each item, positive.
        average_bits: per weight, over all items.
        floor: the smallest rate.

    Raises:
        ConfigError: the average is below the floor, or a number is not usable.

    Example:
        >>> reverse_water_filling([4.0, 1.0, 0.0], [10, 10, 20], 1.5, floor=1.0)
        array([2.5, 1.5, 1. ])
    """
    a, n = np.asarray(sensitivity, np.float64), np.asarray(sizes, np.float64)
    if a.shape != n.shape or not a.size or not (np.isfinite(a) & (a >= 0) & (n > 0)).all():
        raise ConfigError(
            f"{a.size} sensitivities and {n.size} sizes: one of each is needed, finite and not negative, with sizes "
            "above 0."
        )
    if not math.isfinite(average_bits) or average_bits < floor:
        raise ConfigError(
            f"an average of {average_bits} bits is below the floor of {floor}. Raise the one, or lower the other."
        )
    rates = np.full(len(a), float(floor))
    wet = np.flatnonzero(a > 0)
    level = np.full(len(a), -np.inf)
    level[wet] = 0.5 * np.log2(a[wet] / n[wet])
    order = wet[np.argsort(-level[wet], kind="stable")]
    spare = (average_bits - floor) * n.sum()
    if not len(order):
        return np.full(len(a), float(average_bits))
    # an item is above the floor if raising all higher ones to where it joins them does not need more than there is
    weight, moment = np.cumsum(n[order]), np.cumsum(n[order] * level[order])
    k = int(np.flatnonzero(moment - level[order] * weight <= spare)[-1])
    rates[order[: k + 1]] += (level[order[: k + 1]] + (spare - moment[k]) / weight[k]).clip(0.0)
    return rates
