"""Classes of matrices that may run as one: every joint choice against a list of all."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from allocation.problems import items_of, menus
from mezzotint.allocation import Choice, Item, Part, Parts, allocate, fused_alternatives
from mezzotint.allocation.pareto import undominated
from mezzotint.errors import ConfigError
from reference import knapsack as twin

# losses of three members below 10, in two orders
ROUNDING = {"rel": 1e-12, "abs": 1e-12}
EIGHTHS = st.integers(0, 40).map(lambda eighths: eighths / 8)
TRIPLES = st.tuples(EIGHTHS, st.integers(0, 20), EIGHTHS)
MEMBERS = st.lists(st.lists(TRIPLES, min_size=1, max_size=4), min_size=1, max_size=3)


def choices_of(triples):
    return [Choice(label=f"fused {n}", loss=t[0], bits=t[1], seconds=t[2]) for n, t in enumerate(triples)]


@settings(max_examples=200)
@given(points=st.lists(st.tuples(EIGHTHS, st.integers(0, 6), st.integers(0, 6).map(float)), min_size=1, max_size=40))
def test_undominated(points):
    loss, bits, seconds = (np.array(column) for column in zip(*points, strict=True))
    kept = [points[place] for place in undominated(loss, bits, seconds).tolist()]
    assert len(kept) == len(set(kept))
    assert set(kept) == twin.undominated(points)


@settings(max_examples=150)
@given(members=MEMBERS, fused=st.lists(TRIPLES, max_size=4))
def test_joint_choices_are_all_that_nothing_matches(members, fused):
    items = items_of(members)
    joint = fused_alternatives(items, choices_of(fused))
    assert joint.name == "+".join(item.name for item in items)
    found = {(c.loss, c.bits, c.seconds) for c in joint.choices}
    # eighths: sums are exact
    assert found == twin.undominated([*(t for _, t in twin.everything(members)), *fused])
    assert len(found) == len(joint.choices)


@settings(max_examples=100)
@given(
    members=MEMBERS, fused=st.lists(TRIPLES, max_size=4), alone=menus(1, 4), share=st.floats(0, 1), both=st.booleans()
)
def test_allocation_with_a_class_against_every_allocation(members, fused, alone, share, both):
    items = items_of(members)
    other = Item(name="o", choices=items_of(alone)[0].choices)
    joint = fused_alternatives(items, choices_of(fused))
    pool = [*(t for _, t in twin.everything(members)), *fused]
    low, high = (pick(t[1] for t in pool) + pick(t[1] for t in alone[0]) for pick in (min, max))
    bits = round(low + share * (high - low))
    seconds = sum(max(t[2] for t in menu) for menu in (pool, alone[0])) / 2 if both else None
    best = twin.least_loss([pool, alone[0]], bits, math.inf if seconds is None else seconds)
    if math.isinf(best):
        return
    found = allocate([joint, other], bits=bits, seconds=seconds)
    assert found.bits <= bits
    assert seconds is None or found.seconds <= seconds
    assert found.loss == pytest.approx(best, rel=1e-6 if both else 1e-12, abs=1e-8)
    check_read_back(found, items, choices_of(fused), other)


def check_read_back(found, items, fused, other):
    """The parts name every member once, and their choices have the sums of the allocation."""
    by_label = {(item.name,): {c.label: c for c in item.choices} for item in [*items, other]}
    together = tuple(item.name for item in items)
    taken = []
    for part in found.parts:
        if part.label in {c.label for c in fused}:
            assert part.names == together
            taken.append(next(c for c in fused if c.label == part.label))
        else:
            taken.append(by_label[part.names][part.label])
    assert sorted(name for part in found.parts for name in part.names) == sorted([*together, other.name])
    assert list(found.labels) == [*together, other.name]
    assert sum(c.bits for c in taken) == found.bits
    assert math.fsum(c.loss for c in taken) == pytest.approx(found.loss, **ROUNDING)
    assert math.fsum(c.seconds for c in taken) == pytest.approx(found.seconds, **ROUNDING)


def one(name, loss, bits, seconds):
    return Item(name=name, choices=(Choice(label=f"{name} alone", loss=loss, bits=bits, seconds=seconds),))


def test_part_of_a_class_may_run_fused():
    q, k, v = one("q", 1.0, 10, 3.0), one("k", 1.0, 10, 3.0), one("v", 1.0, 10, 3.0)
    pair = fused_alternatives([q, k], [Choice(label="pair", loss=4.0, bits=20, seconds=4.0)])
    joint = fused_alternatives([pair, v], [Choice(label="all", loss=9.0, bits=30, seconds=5.0)])
    assert [(c.loss, c.bits, c.seconds) for c in joint.choices] == [(9.0, 30, 5.0), (5.0, 30, 7.0), (3.0, 30, 9.0)]
    assert [c.label for c in joint.choices] == [
        Parts((Part(names=("q", "k", "v"), label="all"),)),
        Parts((Part(names=("q", "k"), label="pair"), Part(names=("v",), label="v alone"))),
        Parts(tuple(Part(names=(n,), label=f"{n} alone") for n in "qkv")),
    ]
    found = allocate([joint], seconds=8.0)
    assert found.labels == {"q": "pair", "k": "pair", "v": "v alone"}
    assert [part.names for part in found.parts] == [("q", "k"), ("v",)]


def test_refusals():
    q = Item(name="q", choices=tuple(Choice(label=n, loss=float(n), bits=9 - n) for n in range(10)))
    k = Item(name="k", choices=q.choices)
    with pytest.raises(ConfigError, match=r"class 'q\+k' has 100 joint choices up to 'k', over the limit of 99"):
        fused_alternatives([q, k], [], max_joint=99)
    assert len(fused_alternatives([q, k], [], max_joint=100).choices) == 19
    with pytest.raises(ConfigError, match="at least one member, each once"):
        fused_alternatives([q, q], [])
    with pytest.raises(ConfigError, match="at least one member, each once"):
        fused_alternatives([], [])
    with pytest.raises(ConfigError, match=r"item 'q\+k', choice 'nan': loss is nan"):
        fused_alternatives([q, k], [Choice(label="nan", loss=math.nan, bits=1)])
