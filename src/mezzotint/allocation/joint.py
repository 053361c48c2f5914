"""A size and a time at once: the knapsack with two constraints, by branch and bound."""

import math
import time
from collections.abc import Sequence
from itertools import pairwise

import numpy as np
from jaxtyping import Float64, Int64
from scipy.optimize import Bounds, LinearConstraint, OptimizeResult, milp
from scipy.sparse import csr_array

from mezzotint.allocation.pareto import undominated
from mezzotint.allocation.table import Resource, Table
from mezzotint.errors import RunError

RELATIVE_GAP = 1e-6
# The solver's tolerances are absolute, 1e-6: the numbers it sees are large against them.
_OBJECTIVE, _BUDGET = 1e4, 1e6
_REPAIRS = 10
_INFEASIBLE = 2


def solve_jointly(
    everything: Table, resources: Sequence[Resource], *, scale: float, time_limit: float
) -> tuple[Int64[np.ndarray, " items"], float] | None:
    """One choice of every item within all budgets, as places in the table, and a lower bound of the loss.

    A 0-1 program with one variable a choice, solved by HiGHS. It works with tolerances in float64, so what it finds
    is counted again in whole units; a budget that is overdrawn is lowered by as much, and it starts anew.
    HiGHS 1.12 may print a line about its ``tmpSolver``, whatever it is told (ERGO-Code/HiGHS#2783).

    Args:
        everything: every choice of every item.
        resources: each can be met by itself.
        scale: what the loss will be, roughly.
        time_limit: seconds.

    Returns:
        None when nothing fits.

    Raises:
        RunError: nothing was found in time.
    """
    program = _Program(everything, resources, scale)
    overdrawn = [0] * len(resources)
    deadline = time.monotonic() + time_limit
    bound = 0.0
    for _ in range(_REPAIRS):
        result = program.solve(overdrawn, deadline)
        if result.status == _INFEASIBLE and not any(overdrawn):
            return None
        if result.x is None:
            break
        if not any(overdrawn):  # lower budgets bound nothing
            bound = program.base + (result.mip_dual_bound or 0.0) / program.factor
        picks = program.picks(result.x)
        excess = [int(resource.cost[picks].sum()) - resource.budget for resource in resources]
        if max(excess) <= 0:
            return picks, bound
        overdrawn = [so_far + max(0, more) for so_far, more in zip(overdrawn, excess, strict=True)]
    raise RunError(
        f"no allocation within both budgets was found in {time_limit:g} seconds. Raise time_limit, give fewer choices, "
        "or loosen a budget a little."
    )


class _Program:
    """The 0-1 program, in numbers that suit the solver's tolerances.

    Args:
        everything: every choice of every item.
        resources: what is limited.
        scale: of the loss.
    """

    def __init__(self, everything: Table, resources: Sequence[Resource], scale: float) -> None:
        start = np.append(everything.start, len(everything.item))
        kept = [
            first + undominated(everything.loss[first:end], *(resource.cost[first:end] for resource in resources))
            for first, end in pairwise(start.tolist())
        ]
        self._table = everything.subset(np.concatenate(kept))
        self._start, item = self._table.start, self._table.item
        least = np.minimum.reduceat(self._table.loss, self._start)
        self.base, self.factor = math.fsum(least), _OBJECTIVE / scale
        above = [r.cost[self._table.pick] for r in resources]
        smallest = [np.minimum.reduceat(cost, self._start) for cost in above]
        above = [cost - s[item] for cost, s in zip(above, smallest, strict=True)]
        self._rooms = [r.budget - int(s.sum()) for r, s in zip(resources, smallest, strict=True)]
        self._units = [_BUDGET / max(1, room) for room in self._rooms]
        # a choice that overdraws a budget alone is ruled out by its bound, so that its numbers are not too large
        self._possible = np.all([cost <= room for cost, room in zip(above, self._rooms, strict=True)], axis=0)
        self._rows = [self._possible * cost * unit for cost, unit in zip(above, self._units, strict=True)]
        self._objective = self._possible * (self._table.loss - least[item]) * self.factor
        self._one_each = csr_array((np.ones(len(item)), (item, np.arange(len(item)))))

    def solve(self, overdrawn: Sequence[int], deadline: float) -> OptimizeResult:
        """What HiGHS says, with every budget lowered by so many units."""
        limits = [(room - o) * unit for room, o, unit in zip(self._rooms, overdrawn, self._units, strict=True)]
        return milp(
            self._objective,
            integrality=np.ones(len(self._objective)),
            bounds=Bounds(0, self._possible.astype(np.float64)),
            constraints=[
                LinearConstraint(self._one_each, 1, 1),
                *(LinearConstraint(row[None], -np.inf, limit) for row, limit in zip(self._rows, limits, strict=True)),
            ],
            options={"mip_rel_gap": RELATIVE_GAP, "time_limit": max(0.0, deadline - time.monotonic())},
        )

    def picks(self, x: Float64[np.ndarray, " variables"]) -> Int64[np.ndarray, " items"]:
        """The choice of every item, a place in the table of all choices."""
        item = self._table.item
        largest = np.flatnonzero(x == np.maximum.reduceat(x, self._start)[item])
        return self._table.pick[largest[np.unique(item[largest], return_index=True)[1]]]
