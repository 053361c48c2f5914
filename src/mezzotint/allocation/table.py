"""Choices as arrays: those that are possible under one constraint, and their convex hull."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Float64, Int64

from mezzotint.allocation.items import Choice, Item
from mezzotint.errors import ConfigError

LARGEST_TOTAL = 2**62  # bits of everything: sums and differences fit an int64
_TIME_BITS = 60  # the largest total time is so many bits long in units of time; an int64 holds it


@dataclass(frozen=True, slots=True, kw_only=True)
class Resource:
    """A quantity that is limited, in whole units, so that sums are exact in any order.

    Attributes:
        cost: of every choice of every item, item after item.
        budget: may be negative: nothing fits.
    """

    cost: Int64[np.ndarray, " all"]
    budget: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """Choices under one constraint, item after item.

    Attributes:
        cost: in units of the constraint.
        loss: of each choice.
        item: of each choice, counted from 0.
        pick: of each choice, its place in the caller's list of all choices of all items.
    """

    cost: Int64[np.ndarray, " choices"]
    loss: Float64[np.ndarray, " choices"]
    item: Int64[np.ndarray, " choices"]
    pick: Int64[np.ndarray, " choices"]

    @property
    def start(self) -> Int64[np.ndarray, " items"]:
        """First choice of each item."""
        return np.flatnonzero(np.diff(self.item, prepend=-1))

    def subset(self, kept: np.ndarray) -> "Table":
        """Some of the choices, by mask or by place."""
        return Table(cost=self.cost[kept], loss=self.loss[kept], item=self.item[kept], pick=self.pick[kept])


@dataclass(frozen=True, slots=True, kw_only=True)
class Segments:
    """Edges of all items' lower convex hulls, by falling slope: the break points of the Lagrangian.

    Attributes:
        slope: loss saved per unit of cost.
        cost: units the edge costs.
        item: whose edge it is; an item's edges lie in the order of their cost.
        end: the choice it leads to, a place in the table.
    """

    slope: Float64[np.ndarray, " edges"]
    cost: Int64[np.ndarray, " edges"]
    item: Int64[np.ndarray, " edges"]
    end: Int64[np.ndarray, " edges"]


def flatten(items: Sequence[Item]) -> Table:
    """Every choice of every item, at a cost of its bits.

    Raises:
        ConfigError: there are no items, two share a name, or all of them together are too large.
    """
    if not items:
        raise ConfigError("there is nothing to allocate: 0 items. Give at least one.")
    names = [item.name for item in items]
    if len(set(names)) < len(names):
        twice = next(name for place, name in enumerate(names) if name in names[:place])
        raise ConfigError(f"two items are called {twice!r}. Give every item a name of its own.")
    if sum(max(choice.bits for choice in item.choices) for item in items) >= LARGEST_TOTAL:
        raise ConfigError("the largest choices of all items have 2^62 bits or more. Count stored bits.")
    every = [choice for item in items for choice in item.choices]
    return Table(
        cost=np.array([choice.bits for choice in every], np.int64),
        loss=np.array([choice.loss for choice in every], np.float64),
        item=np.repeat(np.arange(len(items)), [len(item.choices) for item in items]),
        pick=np.arange(len(every)),
    )


def size_budget(everything: Table, bits: int | None) -> Resource:
    """Stored bits; None is no limit."""
    return Resource(cost=everything.cost, budget=LARGEST_TOTAL if bits is None else min(bits, LARGEST_TOTAL))


def time_budget(items: Sequence[Item], seconds: float | None, time_constant: float) -> Resource:
    """Seconds, in units of 2^-60 of the slowest total, rounded to the nearest; None is no limit.

    The budget is looser by what rounding the times of all items and the constant can add up to, so that a sum that
    is the budget to float64's accuracy fits.
    """
    times = np.array([choice.seconds for item in items for choice in item.choices], np.float64)
    slowest = math.fsum(max(choice.seconds for choice in item.choices) for item in items)
    shift = _TIME_BITS - math.frexp(slowest)[1]
    most = math.ldexp(1.0, _TIME_BITS - shift)
    room = most if seconds is None else math.fsum((seconds, -time_constant, seconds * 2.0**-50))
    return Resource(
        cost=np.rint(np.ldexp(times, shift)).astype(np.int64),
        budget=math.floor(math.ldexp(max(-most, min(room, most)), shift)) + (len(items) + 1) // 2,
    )


def check_size(everything: Table, size: Resource) -> None:
    """Refuse a size below the sum of the smallest choices.

    Raises:
        ConfigError: it says what is reachable.
    """
    least = _least_cost(everything, size)
    if least > size.budget:
        raise ConfigError(
            f"a budget of {size.budget} bits is too small: the smallest choices need {least}. Raise it to that at "
            "least, or allow smaller choices."
        )


def check_time(items: Sequence[Item], everything: Table, time: Resource, asked: tuple[float, float]) -> None:
    """Refuse a time below the sum of the fastest choices.

    Args:
        items: as they were given.
        everything: the same as arrays.
        time: their times and the budget.
        asked: the budget and the constant, in seconds.

    Raises:
        ConfigError: it says what is reachable.
    """
    if _least_cost(everything, time) > time.budget:
        seconds, constant = asked
        fastest = math.fsum((constant, *(min(choice.seconds for choice in item.choices) for item in items)))
        raise ConfigError(
            f"a budget of {seconds:.6g} seconds is too small: the fastest choices need {fastest:.6g}, of which "
            f"{constant:.6g} are constant. Raise it to that at least, or allow faster choices."
        )


def _least_cost(everything: Table, resource: Resource) -> int:
    """What the cheapest choices of all items need."""
    return int(np.minimum.reduceat(resource.cost[everything.pick], everything.start).sum())


def prune(everything: Table, resource: Resource, other: Resource) -> Table:
    """Of each item, the choices that no other matches in both cost and loss, by rising cost and falling loss.

    Of two equal ones that stays which needs less of the other resource, or else the first. Items come in an order of
    their contents, so that whatever breaks ties by place does not depend on the order in which the caller gave them.
    """
    table = replace(everything, cost=resource.cost)
    order = np.lexsort((other.cost, table.loss, table.cost, table.item))
    item, loss = table.item[order].tolist(), table.loss[order].tolist()
    kept: list[list[int]] = []
    best = math.inf
    for place, (whose, value) in enumerate(zip(item, loss, strict=True)):
        if whose == len(kept):
            kept.append([])
            best = math.inf
        if value < best:
            kept[-1].append(place)
            best = value
    cost = table.cost[order].tolist()
    keys = [([cost[place] for place in places], [loss[place] for place in places]) for places in kept]
    by_content = sorted(range(len(kept)), key=keys.__getitem__)
    pruned = table.subset(order[[place for whose in by_content for place in kept[whose]]])
    return replace(pruned, item=np.repeat(np.arange(len(kept)), [len(kept[whose]) for whose in by_content]))


def hull(table: Table) -> Segments:
    """The lower convex hull of each item's loss over cost, for a table that is pruned."""
    slopes: list[float] = []
    ends: list[int] = []
    starts: list[int] = []
    cost, loss, item = table.cost.tolist(), table.loss.tolist(), table.item.tolist()
    first = 0  # where the edges of the current item begin
    for place in range(1, len(cost)):
        if item[place] != item[place - 1]:
            first = len(slopes)
            continue
        start = place - 1
        slope = (loss[start] - loss[place]) / (cost[place] - cost[start])
        while len(slopes) > first and slope >= slopes[-1]:
            start = starts.pop()
            slopes.pop()
            ends.pop()
            slope = (loss[start] - loss[place]) / (cost[place] - cost[start])
        slopes.append(slope)
        starts.append(start)
        ends.append(place)
    slope, start, end = np.array(slopes, np.float64), np.array(starts, np.int64), np.array(ends, np.int64)
    order = np.argsort(-slope, kind="stable")
    return Segments(
        slope=slope[order],
        cost=(table.cost[end] - table.cost[start])[order],
        item=table.item[end][order],
        end=end[order],
    )


def picked(items: Sequence[Item], picks: np.ndarray) -> dict[str, Choice]:
    """The choices at those places of the list of all choices, one of each item in any order, by the item's name."""
    places = iter(sorted(picks.tolist()))
    chosen, offset = {}, 0
    for item in items:
        chosen[item.name] = item.choices[next(places) - offset]
        offset += len(item.choices)
    return chosen
