"""Choices that no other matches in loss, bits and seconds together."""

from bisect import bisect_right

import numpy as np
from jaxtyping import Float64, Int64, Num


def undominated(
    loss: Float64[np.ndarray, " n"], bits: Int64[np.ndarray, " n"], time: Num[np.ndarray, " n"]
) -> Int64[np.ndarray, " kept"]:
    """Places of the points that no other matches in all three; of equal points the first stays.

    Returns:
        Rising by bits, then time, then loss.
    """
    order = np.lexsort((loss, time, bits))
    # of the points so far those that matter for later ones, whose bits are more: time rises, loss falls
    times: list[float] = []
    losses: list[float] = []
    kept: list[int] = []
    points = zip(order.tolist(), time[order].tolist(), loss[order].tolist(), strict=True)
    for place, seconds, value in points:
        at = bisect_right(times, seconds)
        if at and losses[at - 1] <= value:
            continue
        kept.append(place)
        last = at
        while last < len(losses) and losses[last] >= value:
            last += 1
        times[at:last] = [seconds]
        losses[at:last] = [value]
    return np.array(kept, np.int64)
