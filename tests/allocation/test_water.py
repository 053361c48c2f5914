import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from allocation.problems import LINEARS, WEIGHTS, sensitivities
from mezzotint.allocation import Choice, Item, allocate, reverse_water_filling
from mezzotint.errors import ConfigError

SENSITIVE = st.floats(1e-6, 1e3) | st.just(0.0)


@given(
    pairs=st.lists(st.tuples(SENSITIVE, st.integers(1, 10**8)), min_size=1, max_size=12),
    floor=st.floats(0, 3),
    above=st.floats(0, 4),
)
def test_conditions_of_an_optimum(pairs, floor, above):
    a, n = (list(column) for column in zip(*pairs, strict=True))
    rates = reverse_water_filling(a, n, floor + above, floor)
    assert rates.min() >= floor - 1e-12
    assert np.dot(rates, n) == pytest.approx((floor + above) * sum(n), rel=1e-12)
    # loss saved per bit: the same for all above the floor, and no more at the floor
    saved = np.array(a) * 4.0**-rates / np.array(n)
    wet = rates > floor + 1e-9
    if wet.any() and any(a):
        np.testing.assert_allclose(saved[wet], saved[wet].max(), rtol=1e-9)
        assert saved.max() <= saved[wet].max() * (1 + 1e-8)


def shape(name):
    rows, columns, _ = LINEARS[name.split(".")[1]]
    return rows * columns


@pytest.mark.parametrize("average", [2.25, 3.25])
def test_no_menu_of_rates_beats_it_and_a_fine_one_comes_near(average):
    a = sensitivities(0)
    sizes = [shape(name) for name in a]
    rates = reverse_water_filling(list(a.values()), sizes, average, 1.5)
    bound = math.fsum(value * 4.0**-rate for value, rate in zip(a.values(), rates, strict=True))
    losses = []
    for step in (1.0, 0.25, 0.0625):
        items = [
            Item(
                name=name,
                choices=tuple(
                    Choice(label=float(b), loss=value * float(4.0**-b), bits=round(b * size))
                    for b in np.arange(1.5, 8.1, step)
                ),
            )
            for (name, value), size in zip(a.items(), sizes, strict=True)
        ]
        losses.append(allocate(items, bits=round(average * WEIGHTS)).loss)
    assert bound <= losses[2] <= losses[1] <= losses[0]
    # half a step away on average, uniformly: E 4^d over |d| < 1/32 is 1 + (ln 4)^2 / 32^2 / 6 = 1.0003
    assert losses[2] <= bound * 1.001


def test_nothing_sensitive():
    np.testing.assert_array_equal(reverse_water_filling([0.0, 0.0], [3, 5], 2.5, 1.0), [2.5, 2.5])


@pytest.mark.parametrize(
    ("a", "n", "average", "floor", "message"),
    [
        ([1.0], [1, 2], 3.0, 0.0, "1 sensitivities and 2 sizes"),
        ([], [], 3.0, 0.0, "0 sensitivities and 0 sizes"),
        ([math.nan], [1], 3.0, 0.0, "finite and not negative"),
        ([-1.0], [1], 3.0, 0.0, "finite and not negative"),
        ([1.0], [0], 3.0, 0.0, "sizes above 0"),
        ([1.0], [1], 1.4, 1.5, "an average of 1.4 bits is below the floor of 1.5"),
        ([1.0], [1], math.nan, 1.5, "an average of nan bits"),
    ],
)
def test_refusals(a, n, average, floor, message):
    with pytest.raises(ConfigError, match=message):
        reverse_water_filling(a, n, average, floor)
