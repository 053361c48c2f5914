"""Matrices that read the same input: run as one with one grid, or one by one with a grid each."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from jaxtyping import Float64, Int64

from mezzotint.allocation.items import Choice, Item, Part, Parts, parts_of
from mezzotint.allocation.pareto import undominated
from mezzotint.errors import ConfigError

MAX_JOINT = 1_000_000


def fused_alternatives(members: Sequence[Item], fused: Sequence[Choice], *, max_joint: int = MAX_JOINT) -> Item:
    """All ways to run a small class of matrices, as the choices of one item.

    Either each member takes a choice of its own, whose losses, bits and seconds add up, or all take one of ``fused``.
    Of all these, only those stay that no other matches in loss, bits and seconds. Labels become `Parts`, from which
    `Allocation.parts` and `Allocation.labels` read what every member gets. Where only some members run fused, make
    that pair an item first and give it as a member; classes with the same members can pool their choices.

    Args:
        members: with names of their own; a member may be such a class itself.
        fused: for all members together: the label they share, the sum of their losses and bits, seconds of one launch.
        max_joint: refuse to look at more joint choices than this at once.

    Raises:
        ConfigError: there are no members, a name comes twice, or there are too many joint choices.

    Example:
        >>> up = Item(name="up", choices=(Choice(label="4b", loss=1.0, bits=40, seconds=3.0),))
        >>> gate = Item(name="gate", choices=(Choice(label="3b", loss=2.0, bits=30, seconds=3.0),))
        >>> both = fused_alternatives([up, gate], [Choice(label="4b", loss=1.5, bits=80, seconds=5.0)])
        >>> [(choice.bits, [(part.names, part.label) for part in choice.label.parts]) for choice in both.choices]
        [(70, [(('up',), '4b'), (('gate',), '3b')]), (80, [(('up', 'gate'), '4b')])]
    """
    names = tuple(
        name for member in members for part in parts_of(member.name, member.choices[0]) for name in part.names
    )
    title = "+".join(member.name for member in members)
    if not members or len(set(names)) < len(names):
        raise ConfigError(f"a fused class of {names!r}. Give at least one member, each once.")
    alone = members[0]
    joint = [replace(choice, label=Parts(parts_of(alone.name, choice))) for choice in alone.choices]
    for member in members[1:]:
        pairs = len(joint) * len(member.choices)
        if pairs > max_joint:
            raise ConfigError(
                f"class {title!r} has {pairs} joint choices up to {member.name!r}, over the limit of {max_joint}. Give "
                "its members fewer choices, or raise max_joint."
            )
        joint = _combine(joint, member)
    if fused:
        together = Item(name=title, choices=tuple(fused))  # refuses numbers that cannot be used
        joint += [replace(choice, label=Parts((Part(names=names, label=choice.label),))) for choice in together.choices]
    loss, bits, seconds = _arrays(joint)
    return Item(name=title, choices=tuple(joint[place] for place in undominated(loss, bits, seconds)))


def _combine(joint: list[Choice], member: Item) -> list[Choice]:
    """Every joint choice with every choice of one more member, as far as no other matches it."""
    mine, theirs = _arrays(joint), _arrays(member.choices)
    sums = [np.add.outer(ours, other).ravel() for ours, other in zip(mine, theirs, strict=True)]
    pairs = (divmod(place, len(member.choices)) for place in undominated(*sums).tolist())
    return [_sum(joint[first], member.name, member.choices[second]) for first, second in pairs]


def _sum(joint: Choice, name: str, choice: Choice) -> Choice:
    """A joint choice with that of one more member."""
    assert isinstance(joint.label, Parts), joint.label
    return Choice(
        label=Parts((*joint.label.parts, *parts_of(name, choice))),
        loss=joint.loss + choice.loss,
        bits=joint.bits + choice.bits,
        seconds=joint.seconds + choice.seconds,
    )


def _arrays(
    choices: Sequence[Choice],
) -> tuple[Float64[np.ndarray, " n"], Int64[np.ndarray, " n"], Float64[np.ndarray, " n"]]:
    """Loss, bits and seconds."""
    return (
        np.array([choice.loss for choice in choices], np.float64),
        np.array([choice.bits for choice in choices], np.int64),
        np.array([choice.seconds for choice in choices], np.float64),
    )
