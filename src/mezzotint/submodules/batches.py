"""Activations of one batch of windows that the submodules of a block use, in both streams."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, Protocol, TypeVar, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from mezzotint.core.statistics import Statistics
from mezzotint.submodules.relax import Batches, Search, Slope
from mezzotint.submodules.scores import Pattern

T = TypeVar("T")
Projection = Callable[[Float[Tensor, "windows seqlen rows"]], Tensor]


class Linear(NamedTuple):
    """Rows of a matrix that play one part, with their bias."""

    weight: Float[Tensor, "rows in"]
    bias: Float[Tensor, " rows"] | None = None

    def __call__(self, inputs: Float[Tensor, "*tokens in"]) -> Float[Tensor, "*tokens rows"]:
        """``inputs W' + b``."""
        outputs = inputs @ self.weight.t()
        return outputs if self.bias is None else outputs + self.bias


Linears = Mapping[str, Linear]  # by kind of role


class Memo:
    """Something that is made again only when a tensor that it is made from has changed."""

    def __init__(self) -> None:
        self._known: tuple[tuple[Tensor, ...], Any] | None = None

    def get(self, made_from: tuple[Tensor, ...], make: Callable[[], T]) -> T:
        """What ``make`` gives, or gave for equal tensors."""
        if self._known is None or not all(map(torch.equal, self._known[0], made_from)):
            self._known = tuple(tensor.clone() for tensor in made_from), make()
        return self._known[1]


class Goal(NamedTuple):
    """What the stream should be after a submodule.

    Attributes:
        values: of the full-precision stream, times the scale.
        scale: of each token in differences: zero for padding; None is one each.
    """

    values: Float[Tensor, "windows seqlen out"]
    scale: Float[Tensor, "windows seqlen 1"] | None

    def at(self, windows: slice, rows: slice) -> "Goal":
        """Some of the tokens."""
        return Goal(self.values[windows, rows], None if self.scale is None else self.scale[windows, rows])

    def scaled(self, values: Float[Tensor, "windows seqlen any"]) -> Tensor:
        """Values times the tokens' scales."""
        return values if self.scale is None else values * self.scale

    def squared(self, values: Float[Tensor, "windows seqlen any"]) -> Tensor:
        """Values times the squares of the scales: what a difference weighs in a sum of squares."""
        return values if self.scale is None else values * self.scale.square()


@dataclass(frozen=True, slots=True, kw_only=True)
class Outer:
    """What the last linear of a submodule, whose output the stream takes up, sees of one batch.

    Attributes:
        original: its inputs in the full-precision stream.
        original_stream, stream: what its output is added to in the two streams; None where it is not added unchanged.
        mask: zero for padding, one elsewhere; None is one everywhere.
        normed: differences of a token count over the root mean square of the full-precision stream after the
            submodule, which is what the next RMSNorm makes of them (LoaQ, MATH.md section 8).
    """

    original: Float[Tensor, "windows seqlen in"]
    original_stream: Float[Tensor, "windows seqlen out"] | None = None
    stream: Float[Tensor, "windows seqlen out"] | None = None
    mask: Float[Tensor, "windows seqlen"] | None = None
    normed: bool = False
    _goal: Memo = field(default_factory=Memo, init=False, repr=False, compare=False)

    @property
    def tokens(self) -> float:
        """How many tokens count."""
        return float(self.original[..., 0].numel()) if self.mask is None else float(self.mask.sum())

    def goal(self, last: Linear) -> Goal:
        """What the full-precision stream is after the submodule, with the original of the last linear."""

        def make() -> Goal:
            values = last(self.original)
            values = values if self.original_stream is None else values.add_(self.original_stream)
            scale = None if self.mask is None else self.mask.unsqueeze(-1)
            if self.normed and self.stream is not None:
                tiny = torch.finfo(values.dtype).tiny
                own = values.square().mean(-1, keepdim=True).clamp_min(tiny).rsqrt()
                scale = own if scale is None else own * scale
            return Goal(values if scale is None else values * scale, scale)

        return self._goal.get((last.weight,), make)

    def off(self, output: Float[Tensor, "windows seqlen out"], goal: Goal, *at: slice) -> Tensor:
        """How far the quantized stream with this output is from the goal, scaled; of some windows and rows."""
        stream = output if self.stream is None else self.stream[at] + output
        return goal.scaled(stream) - goal.values


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionBatch:
    """One batch in attention.

    Attributes:
        inputs: of q, k and v in the quantized stream.
        original: the same in the full-precision stream.
        query, key, value: what attention multiplies, ``[windows, heads, seqlen, dim]``, from the linear's outputs:
            heads apart, norms and positions applied, by the model's own code.
        pattern: what lies between.
        outer: of the output projection; None before it has run.
        first: number of its first window among those of all processes.
        target, mixer: of the submodule that the batch is made for, as long as its weights stay.
    """

    inputs: Float[Tensor, "windows seqlen in"]
    original: Float[Tensor, "windows seqlen in"]
    query: Projection
    key: Projection
    value: Projection
    pattern: Pattern
    outer: Outer | None = None
    first: int = 0
    target: Memo = field(default_factory=Memo, init=False, repr=False, compare=False)
    mixer: Memo = field(default_factory=Memo, init=False, repr=False, compare=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class MlpBatch:
    """One batch in an MLP.

    Attributes:
        inputs: of up in the quantized stream.
        hidden: the inputs of down from the outputs of up, the gate held at its quantized weights.
        outer: of down.
        first: as of `AttentionBatch`.
    """

    inputs: Float[Tensor, "windows seqlen in"]
    hidden: Projection
    outer: Outer
    first: int = 0


class Submodule(Protocol):
    """Several linears and what they give together.

    Attributes:
        members: kinds of roles, in the order in which they are relaxed.
    """

    @property
    def members(self) -> tuple[str, ...]: ...  # noqa: D102

    def energy(self, batch: "AttentionBatch | MlpBatch") -> float:
        """Sum of squares of the full-precision output: what a loss is measured against."""
        ...

    def loss(self, linears: Linears, batch: "AttentionBatch | MlpBatch") -> float:
        """Sum of squares of what quantized weights miss of the full-precision output."""
        ...

    def relax(
        self,
        member: str,
        linears: Linears,
        batches: Callable[[], Iterable],
        fit: Statistics,
        *,
        start: Tensor,
        search: Search,
    ) -> Float[Tensor, "rows in"]:
        """The member's weight that is best for the submodule, the other linears held fixed."""
        ...


@runtime_checkable
class _Sloped(Protocol):
    def slope(self, member: str, linears: Linears, batch: Any) -> Slope: ...


def slopes(part: _Sloped, member: str, linears: Linears, batches: Callable[[], Iterable[Any]]) -> Batches:
    """The problem of a member, batch by batch, at any weight of it."""

    def at(weight: Tensor) -> Iterator[Slope]:
        changed = {**linears, member: linears[member]._replace(weight=weight)}
        for batch in batches():
            windows = range(batch.first, batch.first + len(batch.inputs))
            yield replace(part.slope(member, changed, batch), windows=windows)

    return at


def product_back(outputs: Float[Tensor, "*tokens in"], weight: Float[Tensor, "out in"]) -> Float[Tensor, "*tokens in"]:
    """``outputs W' W`` in the cheaper order."""
    if 2 * weight.shape[0] < weight.shape[1]:
        return (outputs @ weight.t()) @ weight
    return outputs @ (weight.t() @ weight)
