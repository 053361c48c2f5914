"""The core problem after the Lagrange multiplier is known: few choices of few items, searched exhaustively."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float64, Int64

from mezzotint.allocation.table import Table

# Partial allocations formed before the search gives up: a fraction of a second.
MAX_PARTIALS = 2**21
_RELATIVE_ROUNDING = 2.0**-50


@dataclass(frozen=True, slots=True, kw_only=True)
class Regrets:
    """What choices lose against the Lagrangian's, for a multiplier ``s``.

    The loss of any allocation is the dual bound, plus the regrets of its choices, plus ``s`` times what it leaves of
    the budget. So only choices whose regret is below the gap of a known allocation can be part of a better one: the
    core (Pisinger 1995).

    Attributes:
        regret: of each choice: ``loss + s cost`` above the least of its item.
        multiplier: ``s``, loss per unit of cost.
        rounding: regrets are not known better than this.
    """

    regret: Float64[np.ndarray, " choices"]
    multiplier: float
    rounding: float

    @classmethod
    def of(cls, table: Table, multiplier: float) -> "Regrets":
        """Of every choice of the table."""
        penalized = table.loss + multiplier * table.cost
        least = np.minimum.reduceat(penalized, table.start)
        return cls(
            regret=penalized - least[table.item],
            multiplier=multiplier,
            rounding=_RELATIVE_ROUNDING * math.fsum(least),
        )

    def gap(self, taken: Int64[np.ndarray, " items"], spare: int) -> float:
        """Loss of an allocation above the dual bound."""
        return self.multiplier * spare + math.fsum(self.regret[taken])


@dataclass(frozen=True, slots=True, kw_only=True)
class _Partials:
    """Choices for the items so far, all others taking theirs of no regret; none matches another in cost and loss.

    Attributes:
        cost: above that of no regret.
        regret: sum of the choices'.
        parent: the partial of the layer before it came from.
        choice: the item's, a place in the table.
    """

    cost: Int64[np.ndarray, " partials"]
    regret: Float64[np.ndarray, " partials"]
    parent: Int64[np.ndarray, " partials"]
    choice: Int64[np.ndarray, " partials"]

    @classmethod
    def none(cls) -> "_Partials":
        """Before the first item."""
        zero = np.zeros(1, np.int64)
        return cls(cost=zero, regret=np.zeros(1), parent=zero, choice=zero)

    def extended(
        self, table: Table, regrets: Regrets, choices: Int64[np.ndarray, " choices"], gap: float
    ) -> "_Partials":
        """With the choices of one more item, the first of which has no regret."""
        parent, choice = np.divmod(np.arange(len(self.cost) * len(choices)), len(choices))
        regret = self.regret[parent] + regrets.regret[choices][choice]
        hopeful = np.flatnonzero(regret < gap)
        parent, choice, regret = parent[hopeful], choice[hopeful], regret[hopeful]
        cost = self.cost[parent] + (table.cost[choices] - table.cost[choices[0]])[choice]
        loss = regret - regrets.multiplier * cost
        order = np.lexsort((loss, cost))
        lowest = np.minimum.accumulate(loss[order])
        kept = order[loss[order] < np.concatenate([[np.inf], lowest[:-1]])] if len(order) else order
        return _Partials(cost=cost[kept], regret=regret[kept], parent=parent[kept], choice=choices[choice[kept]])


def search(
    table: Table, taken: Int64[np.ndarray, " items"], *, spare: int, regrets: Regrets, max_partials: int = MAX_PARTIALS
) -> tuple[Int64[np.ndarray, " items"], bool]:
    """The best allocation, or the best that was found before the search gave up.

    Partial allocations of the core are enumerated item after item, the most contested first. One is dropped when its
    regrets reach the gap of the best allocation so far, or when another matches it in both cost and loss.

    Args:
        table: pruned.
        taken: a choice of every item, within the budget.
        spare: what they leave of it.
        regrets: for the multiplier where the budget is reached.
        max_partials: give up after so many.

    Returns:
        Places in the table, and whether no allocation is better, but for rounding.
    """
    regret = regrets.regret
    gap = regrets.gap(taken, spare) - regrets.rounding
    relaxed = np.flatnonzero(regret == 0)
    base = relaxed[np.unique(table.item[relaxed], return_index=True)[1]]
    room = spare + int(table.cost[taken].sum()) - int(table.cost[base].sum())
    rivals = np.setdiff1d(np.flatnonzero(regret < gap), base)
    if not len(rivals):
        return taken, True
    first = np.unique(table.item[rivals], return_index=True)[1]
    groups = np.split(rivals, first[1:])
    layers = [_Partials.none()]
    best, formed = (0, -1), 0
    for at in np.argsort(np.minimum.reduceat(regret[rivals], first), kind="stable").tolist():
        group = groups[at][regret[groups[at]] < gap]
        if not len(group):
            break  # nor has any item after it a choice that could be part of a better one
        formed += len(layers[-1].cost) * (len(group) + 1)
        if formed > max_partials:
            break
        layer = layers[-1].extended(table, regrets, np.append(base[table.item[group[0]]], group), gap)
        layers.append(layer)
        fitting = np.flatnonzero(layer.cost <= room)
        if not len(fitting):
            continue
        above = layer.regret[fitting] + regrets.multiplier * (room - layer.cost[fitting])
        if above.min() < gap:
            gap = float(above.min()) - regrets.rounding
            best = (len(layers) - 1, int(fitting[above.argmin()]))
    return _walk_back(table, taken, base, layers, best), formed <= max_partials


def _walk_back(
    table: Table,
    taken: Int64[np.ndarray, " items"],
    base: Int64[np.ndarray, " items"],
    layers: Sequence[_Partials],
    best: tuple[int, int],
) -> Int64[np.ndarray, " items"]:
    """The choices of a partial of some layer, and those of no regret elsewhere; ``taken`` when it is of layer 0."""
    at, partial = best
    if at == 0:
        return taken
    found = base.copy()
    for layer in reversed(layers[1 : at + 1]):
        choice = int(layer.choice[partial])
        found[table.item[choice]] = choice
        partial = int(layer.parent[partial])
    return found
