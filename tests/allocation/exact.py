"""The exact optimum under a size limit by dynamic programming: slow, used to check the fast solver."""

import math
from collections.abc import Sequence
from itertools import pairwise

import numpy as np
from jaxtyping import Int64

from mezzotint.allocation.items import Allocation, Item, total
from mezzotint.allocation.table import Table, check_size, flatten, picked, prune, size_budget, time_budget
from mezzotint.errors import ConfigError

MAX_CELLS = 2**27


def allocate_exact(items: Sequence[Item], *, bits: int, max_cells: int = MAX_CELLS) -> Allocation:
    """The optimum within a size: `allocate` without a gap, but for rounding of the sums.

    Over items ``i`` and sizes ``u`` in units of the greatest common divisor of all differences between an item's
    sizes:

        f_i(u) = min over choices c of  f_(i-1)(u - bits_i(c)) + loss_i(c),   f_0 = 0

    Args:
        items: with names of their own.
        bits: budget of stored bits.
        max_cells: items times sizes; each needs 2 bytes and a few nanoseconds per choice.

    Raises:
        ConfigError: nothing fits the budget, or the table would have more cells than allowed.
    """
    everything = flatten(items)
    size = size_budget(everything, bits)
    check_size(everything, size)
    table = prune(everything, size, time_budget(items, None, 0.0))
    start = table.start
    above = table.cost - table.cost[start][table.item]
    unit = math.gcd(*above.tolist()) or 1
    room = min(size.budget - int(table.cost[start].sum()), int(np.maximum.reduceat(above, start).sum())) // unit
    if len(start) * (room + 1) > max_cells:
        raise ConfigError(
            f"{len(start)} items and {room + 1} sizes in steps of {unit} bits are {len(start) * (room + 1)} cells, "
            f"over the limit of {max_cells}. Use `allocate`, or round sizes to a coarser step."
        )
    taken = _walk_back(table, above // unit, room)
    return total(picked(items, table.pick[taken]), bound=None, method="dynamic")


def _walk_back(table: Table, units: Int64[np.ndarray, " choices"], room: int) -> Int64[np.ndarray, " items"]:
    """The best choices, as places in the table; every item's first needs 0 units."""
    bounds = [*table.start.tolist(), len(units)]
    most = max(end - first for first, end in pairwise(bounds))
    picks = np.zeros((len(bounds) - 1, room + 1), np.uint16 if most <= 2**16 else np.uint32)
    best = np.zeros(room + 1)
    for item, (first, end) in enumerate(pairwise(bounds)):
        before, best = best, best + table.loss[first]
        for choice in range(first + 1, end):
            need = int(units[choice])
            if need > room:
                break
            value = before[: room + 1 - need] + table.loss[choice]
            better = value < best[need:]
            best[need:][better] = value[better]
            picks[item, need:][better] = choice - first
    taken = np.array(bounds[:-1], np.int64)
    for item in reversed(range(len(taken))):
        taken[item] += int(picks[item, room])
        room -= int(units[taken[item]])
    return taken
