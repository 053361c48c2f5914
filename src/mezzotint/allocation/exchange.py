"""Local search on the knapsack: spend the rest of the budget of a Lagrangian solution, and swap pairs of items."""

import math

import numpy as np
from jaxtyping import Float64, Int64

from mezzotint.allocation.core import Regrets
from mezzotint.allocation.table import Table

# An exchange counts when it saves more than the rounding errors of the differences it is judged by.
_RELATIVE_ROUNDING = 2.0**-50


def exchange(
    table: Table, taken: Int64[np.ndarray, " items"], *, spare: int, regrets: Regrets
) -> tuple[Int64[np.ndarray, " items"], int]:
    """Make the best change of one item, or of two, until none within the budget lowers the loss.

    Args:
        table: pruned.
        taken: a choice of every item.
        spare: what they leave of the budget.
        regrets: for the multiplier where the budget is reached.

    Returns:
        Places in the table, and what they leave of the budget.
    """
    taken = taken.copy()
    core = np.arange(len(table.cost))
    while True:
        core = core[regrets.regret[core] <= regrets.gap(taken, spare) + regrets.rounding]
        change = _best_change(table, taken, core, spare)
        if not change:
            return taken, spare
        for place in change:
            whose = table.item[place]
            spare -= int(table.cost[place] - table.cost[taken[whose]])
            taken[whose] = place


def _best_change(
    table: Table, taken: Int64[np.ndarray, " items"], core: Int64[np.ndarray, " core"], spare: int
) -> tuple[int, ...]:
    """New choices of one or two items that save most, or none where nothing saves anything.

    One item moves up: to more cost and less loss. Another may move down to make room.
    """
    now = taken[table.item[core]]
    cost = table.cost[core] - table.cost[now]
    gain = table.loss[now] - table.loss[core]
    up, down = np.flatnonzero(gain > 0), np.flatnonzero(gain < 0)
    up = up[np.argsort(cost[up], kind="stable")]
    riser = table.item[core[up]]
    # the first way down is to leave everything as it is
    faller = np.concatenate([[-1], table.item[core[down]]])
    room = spare - np.concatenate([[0], cost[down]])
    pain = np.concatenate([[0.0], -gain[down]])
    partner, saved = _partners(cost[up], gain[up], room)
    saved -= pain
    itself = np.append(riser, -1)[partner] == np.where(partner < 0, -2, faller)  # one item cannot go both ways
    least = _RELATIVE_ROUNDING * math.fsum(table.loss[taken])
    hopeful = itself & (saved > saved[~itself].max(initial=least))
    saved[itself] = -np.inf
    for whose in np.unique(faller[hopeful]):
        falls, others = np.flatnonzero(faller == whose), np.flatnonzero(riser != whose)
        second, gained = _partners(cost[up[others]], gain[up[others]], room[falls])
        partner[falls] = np.append(others, -1)[second]
        saved[falls] = gained - pain[falls]
    best = int(saved.argmax())
    if saved[best] <= least:
        return ()
    rise = int(core[up[partner[best]]])
    return (rise,) if best == 0 else (int(core[down[best - 1]]), rise)


def _partners(
    cost: Int64[np.ndarray, " up"], gain: Float64[np.ndarray, " up"], room: Int64[np.ndarray, " down"]
) -> tuple[Int64[np.ndarray, " down"], Float64[np.ndarray, " down"]]:
    """For every room the greatest gain that fits it and whose it is; -1 and minus infinity where nothing fits.

    Args:
        cost: rising.
        gain: of the same.
        room: to be filled by one of them.
    """
    record = np.concatenate([[-np.inf], np.maximum.accumulate(gain)])
    holder = np.maximum.accumulate(np.where(record[1:] > record[:-1], np.arange(len(gain)), -1))
    fitting = np.searchsorted(cost, room, side="right")
    return np.concatenate([[-1], holder])[fitting], record[fitting]
