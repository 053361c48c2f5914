"""Every allocation there is, one by one; numpy is not even needed."""

import math
from collections.abc import Iterator, Sequence
from itertools import permutations, product

Triple = tuple[float, int, float]  # loss, bits, seconds


def everything(menus: Sequence[Sequence[Triple]]) -> Iterator[tuple[tuple[int, ...], Triple]]:
    """Places of the choices, and their sums."""
    for places in product(*(range(len(menu)) for menu in menus)):
        taken = [menu[place] for menu, place in zip(menus, places, strict=True)]
        yield (
            places,
            (math.fsum(t[0] for t in taken), sum(t[1] for t in taken), math.fsum(t[2] for t in taken)),
        )


def least_loss(menus: Sequence[Sequence[Triple]], bits: float = math.inf, seconds: float = math.inf) -> float:
    """Infinite when nothing fits."""
    return min((t[0] for _, t in everything(menus) if t[1] <= bits and t[2] <= seconds), default=math.inf)


def dual_bound(menus: Sequence[Sequence[Triple]], bits: float) -> float:
    """The greatest Lagrangian bound: it is reached at a slope between two choices of one item, or at 0."""
    pairs = [(a, b) for menu in menus for a, b in permutations(menu, 2) if a[1] < b[1] and a[0] > b[0]]
    slopes = {0.0, *((a[0] - b[0]) / (b[1] - a[1]) for a, b in pairs)}
    return max(math.fsum(min(t[0] + s * t[1] for t in menu) for menu in menus) - s * bits for s in slopes)


def lower_hull(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Corners of the lower convex hull, down to the least y, by gift wrapping."""
    x, y = min(points)
    corners = [(x, y)]
    while below := [p for p in points if p[1] < y]:
        slope = max((y - q[1]) / (q[0] - x) for q in below)
        # of several on one line, the farthest
        x, y = max(p for p in below if math.isclose((y - p[1]) / (p[0] - x), slope, rel_tol=1e-12))
        corners.append((x, y))
    return corners


def undominated(points: Sequence[tuple[float, ...]]) -> set[tuple[float, ...]]:
    """Those that no different point matches in every coordinate."""
    return {p for p in points if not any(q != p and all(a <= b for a, b in zip(q, p, strict=True)) for q in points)}
