"""Knapsacks: small ones drawn at random, and one with the sizes and the spread of a model of 8 billion weights."""

from collections.abc import Sequence

import numpy as np
from hypothesis import strategies as st

from mezzotint.allocation import Choice, Item
from reference.knapsack import Triple

# Mean squared error of a trellis code on Gaussian weights at P/8 bits a weight: V = 1, mul1, 16 bits of state.
DISTORTION = {
    12: 0.1374,
    14: 0.0969,
    16: 0.0686,
    18: 0.0486,
    20: 0.0345,
    22: 0.0245,
    24: 0.0174,
    26: 0.0124,
    28: 0.0088,
    30: 0.0063,
    32: 0.0045,
    36: 0.00228,
    40: 0.00118,
    48: 0.00032,
}
QUARTERS = (*range(12, 42, 2), 44, 48)
INTEGERS = (16, 24, 32, 40, 48)
SIXTEENTHS = tuple(p / 2 for p in range(24, 97))
# rows, columns, and the mean over 32 blocks of the loss per unit of relative error in Llama-3.1-8B
LINEARS = {
    "q": (4096, 4096, 0.0125),
    "k": (1024, 4096, 0.0069),
    "v": (1024, 4096, 0.0317),
    "o": (4096, 4096, 0.0240),
    "gate": (14336, 4096, 0.0260),
    "up": (14336, 4096, 0.0386),
    "down": (4096, 14336, 0.1163),
}
BLOCKS = 32
WEIGHTS = BLOCKS * sum(rows * columns for rows, columns, _ in LINEARS.values())


def distortion(p: float) -> float:
    """Interpolated in the logarithm."""
    return float(np.exp(np.interp(p, list(DISTORTION), np.log(list(DISTORTION.values())))))


def sensitivities(seed: int) -> dict[str, float]:
    """Log-normal around the means, with one outlier that has a quarter of the total, as in the model."""
    draw = np.random.default_rng(seed).lognormal(-0.5, 1.0, (BLOCKS, len(LINEARS)))
    found = {
        f"{block}.{name}": float(mean * draw[block, column])
        for block in range(BLOCKS)
        for column, (name, (_, _, mean)) in enumerate(LINEARS.items())
    }
    return found | {"1.down": 2.097}


def model(seed: int, rates: Sequence[float], *, jitter: float = 0.0) -> list[Item]:
    """224 items; ``jitter`` makes sizes and losses irregular, as measured losses and side data do."""
    noise = np.random.default_rng(seed + 1)
    items = []
    for name, a in sensitivities(seed).items():
        rows, columns, _ = LINEARS[name.split(".")[1]]
        choices = tuple(
            Choice(
                label=p,
                loss=a * distortion(p) * float(np.exp(jitter * noise.standard_normal())),
                bits=round(rows * columns * p / 8 * (1 + jitter * noise.random())),
                seconds=2e-6 + rows * columns * p / 8 / 3e13 * (0.8 + 0.4 * noise.random()),
            )
            for p in rates
        )
        items.append(Item(name=name, choices=choices))
    return items


def items_of(menus: Sequence[Sequence[Triple]]) -> list[Item]:
    """Called 0, 1, ...; labels are places."""
    return [
        Item(
            name=str(number),
            choices=tuple(Choice(label=p, loss=t[0], bits=t[1], seconds=t[2]) for p, t in enumerate(menu)),
        )
        for number, menu in enumerate(menus)
    ]


# Few values make ties; many make every sum differ. Losses are in no order of the bits.
_LOSSES = st.one_of(st.integers(0, 6).map(float), st.floats(0, 10, allow_subnormal=False))
_BITS = st.one_of(st.integers(0, 6), st.integers(0, 1000))
_SECONDS = st.integers(0, 40).map(lambda eighths: eighths / 8)  # sums are exact


def menus(most_items: int = 5, most_choices: int = 4) -> st.SearchStrategy[list[list[Triple]]]:
    choice = st.tuples(_LOSSES, _BITS, _SECONDS)
    return st.lists(st.lists(choice, min_size=1, max_size=most_choices), min_size=1, max_size=most_items)


def budget(lows: Sequence[float], highs: Sequence[float], share: float) -> float:
    """Between the least and the most that can be spent, and a little more."""
    return sum(lows) + share * (sum(highs) - sum(lows))
