"""Settings of an allocation."""

import pytest

from mezzotint.allocation.knapsack import Knapsack
from mezzotint.errors import ConfigError


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"bits": 3.0, "size": 100}, "each of them limits the size"),
        ({"bits": 0.0}, "allocation.bits is 0"),
        ({"size": -5}, "allocation.size is -5"),
        ({"tokens_per_second": 0.0}, "more than 0"),
        ({"menu": ()}, "menu is empty"),
        ({"limits": {"*": (4, 2)}}, "at least 4 and at most 2"),
        ({"windows": 0}, "at least one"),
    ],
)
def test_what_makes_no_sense_is_refused(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Knapsack(**settings)  # pyright: ignore[reportArgumentType]


def test_limits_go_before_the_least() -> None:
    some = Knapsack(bits=3.0, least=2, limits={"*.v_proj": (4, 6), "*.0.*": (1, 8)})
    assert [b for b in (1, 2, 4, 6, 8) if some.allows("layers.0.v_proj", b)] == [4, 6]
    assert [b for b in (1, 2, 4, 6, 8) if some.allows("layers.0.q_proj", b)] == [1, 2, 4, 6, 8]
    assert [b for b in (1, 2, 4, 6, 8) if some.allows("layers.1.q_proj", b)] == [2, 4, 6, 8]
    assert Knapsack(bits=3.0, menu=(1, 2)).allows("any", 1)


def test_budgets_are_those_that_are_given() -> None:
    assert Knapsack(size=7, tokens_per_second=3.0).budgets == ("size", "tokens_per_second")
    assert Knapsack().budgets == ()
