"""The multiple-choice knapsack: the smallest loss within a size or a time (Q-Palette, arXiv 2509.20214)."""

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from jaxtyping import Int64

from mezzotint.allocation.core import Regrets, search
from mezzotint.allocation.exchange import exchange
from mezzotint.allocation.items import Allocation, Item, total
from mezzotint.allocation.joint import solve_jointly
from mezzotint.allocation.table import (
    Table,
    check_size,
    check_time,
    flatten,
    hull,
    picked,
    prune,
    size_budget,
    time_budget,
)
from mezzotint.errors import ConfigError

TIME_LIMIT = 60.0
_FINEST = 1e-8  # of the largest loss: what the branch and bound can tell apart at most


def allocate(
    items: Sequence[Item],
    *,
    bits: int | None = None,
    seconds: float | None = None,
    time_constant: float = 0.0,
    time_limit: float = TIME_LIMIT,
) -> Allocation:
    """Take one choice of every item, so that the losses sum to the least within the budgets.

        minimize  sum_i loss_i(c_i)   subject to   sum_i bits_i(c_i) <= bits,
                                                   time_constant + sum_i seconds_i(c_i) <= seconds

    With one constraint that binds: the Lagrangian solution at the multiplier where the budget is reached, the best
    exchange of one item's choice, or of two items', until none helps, and then a search of the few choices that could
    still be part of something better, which usually ends with the optimum. With two: a branch and bound (HiGHS).
    ``gap`` of the result says how far from the optimum it can be. The order of the items decides only which of
    several with equal choices gets the better one: the first.

    Args:
        items: with names of their own.
        bits: budget of stored bits; None is no limit.
        seconds: budget of time, kept to float64's accuracy; None is no limit.
        time_constant: seconds that no choice changes.
        time_limit: seconds for the branch and bound, which then gives the best it has found.

    Raises:
        ConfigError: no budget is given, or one that nothing fits; the message says what would.
        RunError: nothing was found within the time limit.

    Example:
        >>> from mezzotint.allocation import Choice
        >>> menus = {"up": (9.0, 2.0, 1.0), "down": (7.0, 3.0, 1.0)}
        >>> items = [
        ...     Item(name=name, choices=tuple(Choice(label=b, loss=loss, bits=100 * b) for b, loss in enumerate(menu)))
        ...     for name, menu in menus.items()
        ... ]
        >>> found = allocate(items, bits=300)
        >>> found.labels, found.loss, found.bits, found.bound
        ({'up': 1, 'down': 2}, 3.0, 300, 3.0)
    """
    if bits is None and seconds is None:
        raise ConfigError("there is no budget. Give bits, seconds, or both.")
    for what, value in (("seconds", seconds), ("time_constant", time_constant)):
        if value is not None and not 0 <= value < math.inf:
            raise ConfigError(f"{what} is {value}, not a time. Give seconds, 0 or more.")
    everything = flatten(items)
    size, time = size_budget(everything, bits), time_budget(items, seconds, time_constant)
    check_size(everything, size)
    if seconds is not None:
        check_time(items, everything, time, (seconds, time_constant))
    least = 0.0
    for limited, other in ((size, time), (time, size)) if bits is not None else ((time, size),):
        table = prune(everything, limited, other)
        taken, bound = _solve(table, limited.budget)
        picks = table.pick[taken]
        # the best within one budget that happens to meet the other: no better one meets both
        if int(other.cost[picks].sum()) <= other.budget:
            return total(picked(items, picks), bound=bound, time_constant=time_constant, method="lagrangian")
        least = max(least, math.fsum(table.loss[taken]) if bound is None else bound)
    assert bits is not None, "a budget alone is always met"
    assert seconds is not None, "a budget alone is always met"
    joint = solve_jointly(
        everything, (size, time), scale=max(least, _FINEST * float(everything.loss.max())) or 1.0, time_limit=time_limit
    )
    if joint is None:
        raise _unreachable(items, bits, seconds, time_constant)
    picks, bound = joint
    return total(picked(items, picks), bound=max(least, bound), time_constant=time_constant, method="milp")


def frontier(items: Sequence[Item], *, points: int = 100) -> tuple[Allocation, ...]:
    """The lower convex hull of size against loss: the best allocation at sizes from the smallest to where loss ends.

    These are the break points of the Lagrangian, each the optimum at its own size. Where there are more than
    ``points``, those nearest to sizes evenly spaced; both ends are always among them.

    Args:
        items: with names of their own.
        points: at most so many, 2 or more.

    Raises:
        ConfigError: there are fewer than two points, or the items cannot be used.

    Example:
        >>> from mezzotint.allocation import Choice
        >>> choices = tuple(Choice(label=b, loss=4.0**-b, bits=b) for b in (2, 3, 4))
        >>> [(point.bits, point.loss) for point in frontier([Item(name="up", choices=choices)])]
        [(2, 0.0625), (3, 0.015625), (4, 0.00390625)]
    """
    if points < 2:
        raise ConfigError(f"points is {points}, but a frontier has two ends. Ask for 2 or more.")
    everything = flatten(items)
    table = prune(everything, size_budget(everything, None), time_budget(items, None, 0.0))
    edges = hull(table)
    sizes = np.concatenate([[0], np.cumsum(edges.cost)])
    counts = np.arange(len(sizes))
    if len(sizes) > points:
        wanted = np.linspace(0, sizes[-1], points)
        above = np.searchsorted(sizes, wanted).clip(1, len(sizes) - 1)
        counts = np.unique(np.where(wanted - sizes[above - 1] <= sizes[above] - wanted, above - 1, above))
    found: list[Allocation] = []
    taken, done = table.start.copy(), 0
    for count in counts.tolist():
        np.maximum.at(taken, edges.item[done:count], edges.end[done:count])
        done = count
        point = total(picked(items, table.pick[taken]), bound=None, method="lagrangian")
        if not found or point.loss < found[-1].loss:  # an edge may save less than rounding shows
            found.append(point)
    return tuple(found)


def _solve(table: Table, budget: int) -> tuple[Int64[np.ndarray, " items"], float | None]:
    """Choices within the budget, as places in the table, and a lower bound of the loss; None says it is the least.

    For a multiplier ``s`` every item minimizes ``loss + s cost``, which walks along its hull as ``s`` falls. Edges
    of all hulls are taken in the order of their slopes until the next does not fit. Its slope is the multiplier at
    which the linear program would take a fraction of it, and that program's loss is the bound (Sinha & Zoltners 1979).

    Exchanges then bring the gap down in any instance, and the search closes it, unless it gives up because many
    choices are nearly as good as each other.
    """
    edges = hull(table)
    taken = table.start.copy()
    spare = budget - int(table.cost[taken].sum())
    spent = np.concatenate([[0], np.cumsum(edges.cost)])
    count = int(np.searchsorted(spent, spare, side="right")) - 1
    np.maximum.at(taken, edges.item[:count], edges.end[:count])
    if count == len(edges.cost):
        return taken, None
    spare -= int(spent[count])
    multiplier = float(edges.slope[count])
    bound = math.fsum(table.loss[taken]) - multiplier * spare
    regrets = Regrets.of(table, multiplier)
    taken, spare = exchange(table, taken, spare=spare, regrets=regrets)
    taken, proven = search(table, taken, spare=spare, regrets=regrets)
    return taken, None if proven else bound


def _unreachable(items: Sequence[Item], bits: int, seconds: float, time_constant: float) -> ConfigError:
    """The refusal of two budgets that can only be met one at a time."""
    fast = [replace(i, choices=tuple(replace(c, loss=c.seconds) for c in i.choices)) for i in items]
    small = [replace(i, choices=tuple(replace(c, loss=float(c.bits)) for c in i.choices)) for i in items]
    fastest = allocate(fast, bits=bits, time_constant=time_constant).seconds
    smallest = allocate(small, seconds=seconds, time_constant=time_constant).bits
    return ConfigError(
        f"no choices keep {bits} bits and {seconds:.6g} seconds together: within these bits {fastest:.6g} seconds are "
        f"reachable, within this time {smallest} bits. Raise one budget to that, or allow other choices."
    )
